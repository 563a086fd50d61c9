"""Released counts: the noise is exact, private, and the intervals cover what they promise."""

import math
import random
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from securetune.privacy.release import noisy_count_interval, release_counts, two_sided_geometric


def geometric_pmf(values, epsilon):
    ratio = math.exp(-epsilon)
    return (1 - ratio) / (1 + ratio) * ratio ** np.abs(values)


@pytest.mark.parametrize("epsilon", [Fraction(1, 3), Fraction(1), Fraction(0.7), Fraction(5, 2)])
def test_noise_has_the_exact_distribution(epsilon):
    randrange = random.Random(0).randrange
    draws = np.array([two_sided_geometric(epsilon, rand_below=randrange) for _ in range(20_000)])
    edge = round(6 / float(epsilon))
    values = np.arange(-edge, edge + 1)
    expected = geometric_pmf(values, float(epsilon)) * len(draws)
    observed = np.array([(draws == value).sum() for value in values])
    usual = expected >= 5
    rest = (observed[~usual].sum() + len(draws) - observed.sum(), len(draws) - expected[usual].sum())
    chi_square = ((observed[usual] - expected[usual]) ** 2 / expected[usual]).sum()
    chi_square += (rest[0] - rest[1]) ** 2 / rest[1]
    assert stats.chi2.sf(chi_square, usual.sum()) > 1e-3


def test_noise_of_a_float_epsilon_stays_exact_and_quick():
    # a float's fraction has a denominator up to 2**1074; the sampler must neither round nor slow down
    assert isinstance(two_sided_geometric(Fraction(0.1)), int)
    assert abs(two_sided_geometric(Fraction(1e-3))) < 100_000


def test_neighbouring_counts_are_as_likely_up_to_exp_epsilon():
    # the privacy loss of one count, from the exact probabilities: the bound is met with equality, never
    # passed
    values = np.arange(-50, 51)
    losses = np.log(geometric_pmf(values, 0.3) / geometric_pmf(values - 1, 0.3))
    assert np.abs(losses).max() == pytest.approx(0.3)


def test_each_of_several_counts_spends_its_part():
    alone = release_counts({"a": 5}, {"a": 10}, 1.0)["a"]
    shared = release_counts({"a": 5, "b": 5, "c": 5, "d": 5}, dict.fromkeys("abcd", 10), 1.0)["a"]
    assert alone.noise_scale == 1.0
    assert shared.noise_scale == 4.0


def test_one_release_is_epsilon_private_empirically():
    # two counts on neighbouring data, 40,000 releases each: no outcome is exp(epsilon) times likelier than
    # allowed
    randrange = random.Random(1).randrange
    epsilon, draws = Fraction(1), 20_000
    first = [two_sided_geometric(epsilon / 2, rand_below=randrange) > 0 for _ in range(2 * draws)]
    second = [1 + two_sided_geometric(epsilon / 2, rand_below=randrange) > 0 for _ in range(2 * draws)]
    both_first = np.mean(np.logical_and(first[:draws], first[draws:]))
    both_second = np.mean(np.logical_and(second[:draws], second[draws:]))
    assert math.log(both_second / both_first) < float(epsilon) * 1.05
    assert math.log(both_second / both_first) > 0.8  # and the noise is not far more than needed


@pytest.mark.parametrize(
    ("fraction", "total", "epsilon"),
    [(0.84, 1000, 0.5), (0.5, 200, 0.2), (0.99, 1000, 1.0), (0.0, 50, 0.5), (1.0, 50, 0.5), (0.9, 20, 0.05)],
)
def test_interval_covers_sampling_and_noise_jointly(fraction, total, epsilon):
    generator = np.random.default_rng(0)
    repeats = 2000
    ratio = math.exp(-epsilon)
    noise = generator.geometric(1 - ratio, repeats) - generator.geometric(1 - ratio, repeats)
    noisy, weights = np.unique(generator.binomial(total, fraction, repeats) + noise, return_counts=True)
    ends = [noisy_count_interval(int(value), total, epsilon) for value in noisy]
    covered = sum(w for (low, high), w in zip(ends, weights, strict=True) if low <= fraction <= high)
    assert stats.binomtest(int(covered), repeats, 0.95, alternative="less").pvalue > 1e-3


@pytest.mark.parametrize(("count", "total"), [(84, 100), (0, 30), (30, 30), (1, 7)])
def test_interval_without_noise_is_clopper_pearson(count, total):
    expected = stats.binomtest(count, total).proportion_ci(0.95, method="exact")
    low, high = noisy_count_interval(count, total, 200.0)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-7)


def test_more_noise_gives_a_wider_interval():
    widths = [
        high - low for low, high in (noisy_count_interval(800, 1000, epsilon) for epsilon in (5.0, 0.2, 0.05))
    ]
    assert widths == sorted(set(widths))


@pytest.mark.parametrize("noisy", [-500, -1, 0, 101, 900])
def test_interval_of_any_noisy_count_is_ordered_and_inside(noisy):
    low, high = noisy_count_interval(noisy, 100, 0.1)
    assert 0.0 <= low <= high <= 1.0


def test_released_fractions_are_fractions_near_the_truth():
    released = release_counts({"base": 790, "hardened": 845}, {"base": 1000, "hardened": 1000}, 2.0)
    assert set(released) == {"base", "hardened"}
    for name, truth in (("base", 0.79), ("hardened", 0.845)):
        fraction = released[name]
        assert fraction.value == pytest.approx(truth, abs=0.05)  # 50 records of noise at scale 1: exp(-50)
        assert fraction.low <= fraction.value <= fraction.high
        assert (fraction.level, fraction.total, fraction.noise_scale) == (0.95, 1000, 1.0)


def test_value_stays_a_fraction_under_heavy_noise():
    for _ in range(20):
        assert 0.0 <= release_counts({"a": 0}, {"a": 3}, 0.01)["a"].value <= 1.0


def test_every_release_draws_anew():
    values = {release_counts({"a": 500}, {"a": 1000}, 0.01)["a"].value for _ in range(10)}
    assert len(values) > 1


@pytest.mark.parametrize(
    ("counts", "totals", "epsilon", "message"),
    [
        ({}, {}, 1.0, "must have the same names, at least one"),
        ({"a": 1}, {"b": 2}, 1.0, r"must have the same names.*\['a'\] and \['b'\]"),
        ({"a": 3}, {"a": 2}, 1.0, r"counts\['a'\] must be from 0 to its total, got 3 of 2"),
        ({"a": -1}, {"a": 2}, 1.0, r"counts\['a'\] must be from 0 to its total, got -1 of 2"),
        ({"a": 0}, {"a": 0}, 1.0, r"counts\['a'\] must be from 0 to its total, got 0 of 0"),
        ({"a": 1}, {"a": 2}, 0.0, "epsilon must be a finite number > 0, got 0.0"),
        ({"a": 1}, {"a": 2}, math.inf, "epsilon must be a finite number > 0, got inf"),
    ],
)
def test_values_out_of_range_are_refused(counts, totals, epsilon, message):
    with pytest.raises(ValueError, match=message):
        release_counts(counts, totals, epsilon)


def test_impossible_parameters_are_refused():
    with pytest.raises(ValueError, match="epsilon must be > 0, got 0"):
        two_sided_geometric(Fraction(0))
    with pytest.raises(ValueError, match=r"level must be in \(0, 1\), got 1.0"):
        release_counts({"a": 1}, {"a": 2}, 1.0, level=1.0)
