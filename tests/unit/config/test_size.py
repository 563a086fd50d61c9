"""Too few private records."""

import pytest

from securetune.config.size import require_enough_records, require_places, size_warning
from securetune.errors import DataError
from tests.sample_recipe import sample_recipe


def test_fewer_records_than_a_batch_are_refused():
    with pytest.raises(DataError, match=r"31 training records, fewer than privacy\.expected_batch_size = 32"):
        require_enough_records(sample_recipe(), 31)
    require_enough_records(sample_recipe(), 32)


def test_more_records_than_public_places_are_refused():
    recipe = sample_recipe({"privacy.sampling": "fixed_size", "privacy.num_units": 1000})
    with pytest.raises(DataError, match=r"1,001 training records, more than the privacy\.num_units = 1,000"):
        require_places(recipe, 1001)
    require_places(recipe, 1000)
    require_places(sample_recipe(), 5000)


def test_a_batch_far_from_the_plan_is_named():
    assert size_warning(sample_recipe(), 1000) is None
    assert "privacy.sample_rate = 0.064 would match" in (size_warning(sample_recipe(), 500) or "")
