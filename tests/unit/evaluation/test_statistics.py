"""Intervals and rates against published numbers, scipy and brute force."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from securetune.evaluation.statistics import (
    auc,
    clopper_pearson,
    min_negatives,
    paired_difference,
    proportion,
    ratio,
    roc_curve,
    tpr_at_fpr,
)


def pairs(both: int, first_only: int, second_only: int, neither: int) -> tuple[list[bool], list[bool]]:
    """Outcomes of two models with these counts."""
    first = [True] * (both + first_only) + [False] * (second_only + neither)
    second = [True] * both + [False] * first_only + [True] * second_only + [False] * neither
    return first, second


def ends(estimate_or_interval) -> tuple[float, float]:
    interval = getattr(estimate_or_interval, "interval", estimate_or_interval)
    return interval.low, interval.high


def test_clopper_pearson_known_answers():
    assert clopper_pearson(0, 100, level=0.9).high == pytest.approx(0.029513, abs=1e-6)
    assert ends(clopper_pearson(10, 100)) == pytest.approx((0.049005, 0.176223), abs=1e-6)


@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (3, 7), (7, 7), (250, 1000)])
def test_clopper_pearson_agrees_with_scipy(k, n):
    expected = stats.binomtest(k, n).proportion_ci(method="exact")
    assert ends(clopper_pearson(k, n)) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_clopper_pearson_covers_at_least_its_level():
    for p in (0.01, 0.1, 0.5, 0.83):
        covered = sum(
            stats.binom.pmf(k, 40, p)
            for k in range(41)
            if clopper_pearson(k, 40).low <= p <= clopper_pearson(k, 40).high
        )
        assert covered >= 0.95


def test_no_trial_is_refused():
    with pytest.raises(ValueError, match="successes=0, n=0"):
        clopper_pearson(0, 0)


def test_proportion_counts_true_outcomes():
    estimate = proportion([True, False, True, True])
    assert estimate.value == 0.75
    assert ends(estimate) == ends(clopper_pearson(3, 4))


def test_paired_difference_known_answer():
    # Tango's interval for the airway hyper-responsiveness data in Fagerland et al. 2014, table 5
    estimate = paired_difference(*pairs(both=1, first_only=1, second_only=7, neither=12))
    assert estimate.value == pytest.approx(-0.286, abs=5e-4)
    assert ends(estimate) == pytest.approx((-0.517, -0.026), abs=5e-4)


def test_paired_difference_without_discordant_pairs_is_wider_than_zero():
    estimate = paired_difference(*pairs(both=43, first_only=0, second_only=0, neither=1))
    z = stats.norm.ppf(0.975) ** 2
    # closed form of the score interval for no discordant pair
    assert ends(estimate) == pytest.approx((-z / (44 + z), z / (44 + z)), abs=1e-6)


@settings(max_examples=60)
@given(counts=st.tuples(*[st.integers(0, 40)] * 4).filter(lambda counts: sum(counts) > 0))
def test_paired_difference_is_mirrored_and_contains_its_value(counts):
    first, second = pairs(*counts)
    there, back = paired_difference(first, second), paired_difference(second, first)
    assert -1 <= there.interval.low <= there.value <= there.interval.high <= 1
    assert ends(there) == pytest.approx((-back.interval.high, -back.interval.low), abs=1e-6)


@settings(max_examples=60)
@given(gains=st.integers(0, 60), losses=st.integers(0, 60), same=st.integers(0, 100))
def test_paired_interval_excludes_zero_exactly_if_mcnemar_rejects(gains, losses, same):
    if gains + losses == 0:
        return
    statistic = abs(gains - losses) / math.sqrt(gains + losses)
    critical = stats.norm.ppf(0.975)
    if abs(statistic - critical) < 1e-6:
        return
    low, high = ends(paired_difference(*pairs(same, gains, losses, 0)))
    assert (low > 0 or high < 0) == (statistic > critical)


def test_paired_difference_covers_about_its_level():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        kind = generator.choice(4, p=[0.7, 0.12, 0.06, 0.12], size=150)
        low, high = ends(paired_difference(np.isin(kind, [0, 1]), np.isin(kind, [0, 2])))
        covered += low <= 0.06 <= high
    assert stats.binomtest(covered, 400, 0.95).pvalue > 0.001


def test_paired_difference_of_other_texts_is_refused():
    with pytest.raises(ValueError, match=r"got \(2,\) and \(3,\)"):
        paired_difference([True, False], [True, False, True])


def test_ratio_of_equal_weights_is_the_t_interval_of_the_mean():
    values = np.random.default_rng(0).exponential(size=30)
    estimate = ratio(values, np.ones(30))
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert estimate.value == pytest.approx(values.mean())
    assert ends(estimate) == pytest.approx((expected.low, expected.high))


def test_ratio_weighs_texts_by_their_tokens():
    assert ratio([1.0, 9.0], [1, 3]).value == 2.5


def test_ratio_with_a_broken_loss_is_refused():
    with pytest.raises(ValueError, match="finite numerators"):
        ratio([1.0, math.nan], [1, 1])


def brute_force_auc(x, y) -> float:
    return float(np.mean([(a > b) + 0.5 * (a == b) for a in x for b in y]))


@settings(max_examples=40)
@given(
    x=st.lists(st.integers(-5, 5), min_size=2, max_size=12),
    y=st.lists(st.integers(-5, 5), min_size=2, max_size=12),
)
def test_auc_equals_its_definition_with_ties_counting_half(x, y):
    estimate = auc(x, y)
    assert estimate.value == pytest.approx(brute_force_auc(x, y))
    assert estimate.value == pytest.approx(stats.mannwhitneyu(x, y).statistic / (len(x) * len(y)))
    assert 0 <= estimate.interval.low <= estimate.value <= estimate.interval.high <= 1


def test_delong_variance_equals_its_definition():
    generator = np.random.default_rng(1)
    x, y = generator.normal(1, 1, 40).round(1), generator.normal(0, 2, 25).round(1)
    placements = np.array([[(a > b) + 0.5 * (a == b) for b in y] for a in x])
    error = math.sqrt(placements.mean(axis=1).var(ddof=1) / 40 + placements.mean(axis=0).var(ddof=1) / 25)
    estimate = auc(x, y)
    assert estimate.interval.high - estimate.value == pytest.approx(1.959964 * error, rel=1e-5)


@pytest.mark.parametrize(("n", "half_width"), [(200, 0.057), (500, 0.036), (1000, 0.025), (5000, 0.011)])
def test_auc_half_width_of_chance_scores_matches_the_known_sample_sizes(n, half_width):
    generator = np.random.default_rng(2)
    low, high = ends(auc(generator.normal(size=n), generator.normal(size=n)))
    assert (high - low) / 2 == pytest.approx(half_width, abs=0.002)


def test_auc_covers_about_its_level():
    generator = np.random.default_rng(3)
    truth = stats.norm.cdf(0.5 / math.sqrt(2))
    estimates = [auc(generator.normal(0.5, 1, 80), generator.normal(0, 1, 80)) for _ in range(400)]
    covered = sum(estimate.interval.contains(truth) for estimate in estimates)
    assert stats.binomtest(covered, 400, 0.95).pvalue > 0.001


def test_perfect_separation_still_has_an_interval():
    estimate = auc([2.0] * 20, [1.0] * 50)
    assert estimate.value == 1.0
    assert estimate.interval.low == pytest.approx(0.025 ** (1 / 20))


def test_scores_that_are_all_tied_give_exactly_one_half():
    assert auc([1.0] * 5, [1.0] * 7).value == 0.5


def test_tpr_threshold_keeps_the_false_positive_rate_on_a_hand_made_roc():
    # 1000 negatives 0..999: ten may lie above the threshold 989, the eleventh may not
    negatives = np.arange(1000.0)
    positives = np.array([989.0, 989.5, 995.0, 2000.0])
    point = tpr_at_fpr(positives, negatives, false_positive_rate=0.01)
    assert point.threshold == 989.0
    assert point.false_positive_rate.value == 0.01
    assert point.true_positive_rate.value == 0.75
    assert ends(point.true_positive_rate) == ends(clopper_pearson(3, 4))


def test_tied_negatives_never_push_the_rate_above_its_target():
    # taking the first ROC point past the target would report 2 % here
    negatives = np.concatenate([np.full(20, 5.0), np.zeros(980)])
    point = tpr_at_fpr([5.0, 6.0], negatives, false_positive_rate=0.01)
    assert point.false_positive_rate.value == 0.0
    assert point.true_positive_rate.value == 0.5


@settings(max_examples=40)
@given(seed=st.integers(0, 2**16), decimals=st.integers(0, 3))
def test_no_lower_threshold_keeps_the_rate(seed, decimals):
    generator = np.random.default_rng(seed)
    negatives = generator.normal(size=150).round(decimals)
    point = tpr_at_fpr(generator.normal(size=20), negatives, false_positive_rate=0.1)
    assert (negatives > point.threshold).mean() <= 0.1
    assert (negatives >= point.threshold).mean() > 0.1


def test_rate_that_too_few_negatives_measure_is_refused():
    assert (min_negatives(0.01), min_negatives(0.001)) == (1000, 10000)
    with pytest.raises(ValueError, match=r"0\.01 needs at least 1000 negatives, got 999"):
        tpr_at_fpr([1.0, 2.0], np.zeros(999), false_positive_rate=0.01)


def test_roc_curve_runs_from_corner_to_corner_and_encloses_the_auc():
    generator = np.random.default_rng(4)
    x, y = generator.normal(1, 1, 200).round(1), generator.normal(0, 1, 300).round(1)
    curve = roc_curve(x, y)
    points = np.array(curve)
    assert (points[:, 0].tolist(), points[:, -1].tolist()) == ([0.0, 0.0], [1.0, 1.0])
    assert (np.diff(points) >= 0).all()
    assert np.trapezoid(points[1], points[0]) == pytest.approx(auc(x, y).value)


def test_thinned_roc_curve_keeps_its_shape():
    generator = np.random.default_rng(5)
    x, y = generator.normal(1, 1, 2000), generator.normal(0, 1, 2000)
    curve = roc_curve(x, y, max_points=100)
    assert len(curve.true_positive_rates) <= 100
    assert (curve.false_positive_rates[0], curve.true_positive_rates[-1]) == (0.0, 1.0)
    assert np.trapezoid(curve.true_positive_rates, curve.false_positive_rates) == pytest.approx(
        auc(x, y).value, abs=0.005
    )


def test_score_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="negatives hold 1 scores that are not finite"):
        auc([1.0, 2.0], [0.0, math.nan])
