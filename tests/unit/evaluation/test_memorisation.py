"""The memorisation gap against scipy, and its interval against repeated draws."""

import numpy as np
import pytest
from scipy import stats

from securetune.evaluation.memorisation import memorisation_gap


def test_gap_and_interval_are_those_of_welch():
    generator = np.random.default_rng(0)
    members, others = generator.normal(1.0, 0.5, 40), generator.normal(1.4, 1.5, 75)
    gap = memorisation_gap(members.tolist(), others.tolist())
    truth = stats.ttest_ind(others, members, equal_var=False).confidence_interval(0.95)
    assert gap.value == pytest.approx(others.mean() - members.mean())
    assert (gap.interval.low, gap.interval.high) == pytest.approx((truth.low, truth.high))


def test_a_model_that_learnt_by_heart_has_a_positive_gap():
    assert memorisation_gap([0.1, 0.2, 0.15], [2.0, 2.1, 1.9]).interval.low > 1.5


def test_constant_losses_have_an_exact_gap():
    gap = memorisation_gap([1.0, 1.0], [3.0, 3.0, 3.0])
    assert (gap.interval.low, gap.value, gap.interval.high) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize("members", [[1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_too_few_or_broken_losses_are_refused(members):
    with pytest.raises(ValueError, match="at least two losses a side, all finite"):
        memorisation_gap(members, [1.0, 2.0])
