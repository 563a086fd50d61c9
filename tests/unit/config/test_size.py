"""Too few private records."""

import pytest

from securetune.config.size import require_enough_records, size_warning
from securetune.errors import DataError
from tests.sample_recipe import sample_recipe


def test_fewer_records_than_a_batch_are_refused():
    with pytest.raises(DataError, match=r"31 training records, fewer than privacy\.expected_batch_size = 32"):
        require_enough_records(sample_recipe(), 31)
    require_enough_records(sample_recipe(), 32)


def test_a_batch_far_from_the_plan_is_named():
    assert size_warning(sample_recipe(), 1000) is None
    assert "privacy.sample_rate = 0.064 would match" in (size_warning(sample_recipe(), 500) or "")
