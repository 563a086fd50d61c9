"""Adaptive clipping: its privacy cost, its updates against the published ones, and the quantile it finds."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from dp_accounting.dp_event import ComposedDpEvent, GaussianDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from securetune.errors import CheckpointError, PrivacyError
from securetune.privacy.adaptive_clipping import COUNT_NOISE_STREAM, AdaptiveClipping
from securetune.privacy.clipping import ROUNDING_EXCESS
from securetune.privacy.noise import NoiseSource
from securetune.privacy.step import GRADIENT_NOISE_STREAM

KEY = bytes(range(32))
LAYERS = ("a.weight", "b.weight", "b.bias", "c.weight")  # three layers
UNIT_COUNTS = st.lists(st.integers(0, 6), min_size=1, max_size=5)


def adaptive(names=LAYERS, *, initial_norm=1.0, per_layer=True, state=None, **options) -> AdaptiveClipping:
    options = {"count_noise_multiplier": 5.0, "expected_batch_size": 8.0, **options}
    clipping = AdaptiveClipping(initial_norm, per_layer=per_layer, **options)
    clipping.assign(names)
    if state is not None:
        clipping.load_state_dict(state)
    return clipping


def squares_of(*norms) -> torch.Tensor:
    return torch.tensor(norms, dtype=torch.float32).square().reshape(len(norms), -1)


def andrew_update(thresholds, norms, drawn, *, quantile, rate, batch):
    """Algorithm 1 of arXiv 1905.03871 with the bits of its Theorem 1 shifted by 1/2, unit by unit."""
    updated = []
    for k, threshold in enumerate(thresholds):
        total = sum((1.0 if unit[k] <= threshold else 0.0) - 0.5 for unit in norms)
        fraction = (total + drawn[k]) / batch + 0.5
        updated.append(threshold * math.exp(-rate * (fraction - quantile)))
    return updated


# ---- what a step costs


@settings(max_examples=100)
@given(z=st.floats(0.3, 30), ratio=st.floats(1.001, 1e4), layers=st.integers(1, 200))
def test_sum_and_counts_compose_to_the_noise_multiplier(z, ratio, layers):
    # squared sensitivity over variance adds up over Gaussian mechanisms on the same sample
    names = [f"layer{i}.w" for i in range(layers)]
    clipping = adaptive(names, count_noise_multiplier=z * ratio)
    stddevs = []

    class Watching(NoiseSource):
        def normal(self, *, stddev, **options):
            stddevs.append(stddev)
            return super().normal(stddev=stddev, **options)

    gradient_part = (clipping.sensitivity / clipping.noise_stddev(z)) ** 2
    clipping.finish(Watching(KEY), step=0, noise_multiplier=z)
    (count_stddev,) = stddevs
    count_part = layers * 0.5**2 / count_stddev**2  # a unit moves each of the counts by 1/2
    assert gradient_part + count_part == pytest.approx(z**-2, rel=1e-9)


def test_one_group_has_the_split_of_theorem_1():
    clipping = adaptive(per_layer=False, count_noise_multiplier=2 * 3.0)  # sigma_b = 3
    expected = (1.1**-2 - (2 * 3.0) ** -2) ** -0.5
    assert clipping.noise_stddev(1.1) / clipping.sensitivity == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("accountant", [RdpAccountant, PLDAccountant])
def test_accountant_charges_sum_and_counts_like_one_gaussian(accountant):
    z, steps = 1.3, 20
    clipping = adaptive(count_noise_multiplier=4.0)
    gradient = GaussianDpEvent(clipping.noise_stddev(z) / clipping.sensitivity)
    both = accountant().compose(ComposedDpEvent([gradient, GaussianDpEvent(4.0)]), steps).get_epsilon(1e-5)
    one = accountant().compose(GaussianDpEvent(z), steps).get_epsilon(1e-5)
    assert both == pytest.approx(one, rel=1e-3)  # the grid of the PLD
    gradient_alone = accountant().compose(GaussianDpEvent(z), steps).compose(GaussianDpEvent(4.0), steps)
    assert gradient_alone.get_epsilon(1e-5) > 1.02 * one  # what unadjusted noise would cost


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**16),
    units=st.integers(1, 6),
    removed=st.integers(0, 5),
    steps_before=st.integers(0, 3),
    broken=st.booleans(),
)
def test_neighbours_differ_in_sum_and_counts_by_one_mechanism(seed, units, removed, steps_before, broken):
    # both parts measured in standard deviations of their noise, over one removed unit, in any step
    z, gradients = 1.2, np.random.default_rng(seed)
    rows = gradients.lognormal(0, 2, (units, 3))  # one entry for each layer
    if broken:
        rows[0, 1] = np.nan
    keep = [row for row in range(units) if row != removed % units]
    released = []
    for batch in (rows, rows[keep]):
        clipping = adaptive(count_noise_multiplier=2.0)
        for step in range(steps_before):
            clipping.factors(squares_of([1.0, 2.0, 0.1]))
            clipping.finish(NoiseSource(KEY), step=step, noise_multiplier=z)
        factors = (
            clipping.factors(torch.tensor(batch**2, dtype=torch.float32).reshape(-1, 3)).double().numpy()
        )
        summed = np.where(factors > 0, factors * batch, 0.0).sum(axis=0)
        votes = (clipping.counts[0] - clipping.counts[1]).numpy() / 2
        count_stddev = clipping.count_noise_multiplier * math.sqrt(3) / 2
        released.append(np.concatenate([summed / clipping.noise_stddev(z), votes / count_stddev]))
    assert np.linalg.norm(released[0] - released[1]) <= 1 / z


def test_worst_unit_costs_the_whole_multiplier():
    # so that less noise on either part would be seen
    z = 1.2
    clipping = adaptive(count_noise_multiplier=2.0)
    factors = clipping.factors(squares_of([1e3, 1e3, 1e3])).double() * 1e3
    votes = (clipping.counts[0] - clipping.counts[1]).double() / 2
    parts = [
        factors.norm() * (1 + ROUNDING_EXCESS) / clipping.noise_stddev(z),
        votes.norm() / (2.0 * math.sqrt(3) / 2),
    ]
    assert math.hypot(*map(float, parts)) == pytest.approx(1 / z, rel=1e-6)


@pytest.mark.parametrize("noise_multiplier", [5.0, 5.0 * (1 + 1e-15), 7.0])
def test_counts_that_eat_the_whole_budget_are_refused_before_their_release(noise_multiplier):
    clipping = adaptive(count_noise_multiplier=5.0)
    clipping.factors(squares_of([3.0, 3.0, 3.0]))
    before = clipping.thresholds
    message = r"count_noise_multiplier=5 must be above noise_multiplier=[57]"
    with pytest.raises(PrivacyError, match=message):
        clipping.noise_stddev(noise_multiplier)
    with pytest.raises(PrivacyError, match=message):
        clipping.finish(NoiseSource(), step=0, noise_multiplier=noise_multiplier)
    assert clipping.thresholds == before


def test_no_noise_asked_for_gives_none_on_the_sum():
    assert adaptive().noise_stddev(0.0) == 0.0


def test_multiplier_is_the_same_in_every_step():
    # Opacus #779 and #807: the accounted multiplier was overwritten by the adjusted one
    clipping, noise = adaptive(count_noise_multiplier=2.0), NoiseSource(KEY)
    ratios = []
    for step in range(5):
        clipping.factors(squares_of([3.0, 0.1, 1.0], [9.0, 0.1, 1.0]))
        ratios.append(clipping.noise_stddev(1.5) / clipping.sensitivity)
        clipping.finish(noise, step=step, noise_multiplier=1.5)
    assert ratios == pytest.approx([(1.5**-2 - 2.0**-2) ** -0.5] * 5, rel=1e-12)
    assert len(set(clipping.thresholds.values())) == 3  # integer counts took noise, and thresholds moved


# ---- updates


@settings(max_examples=40)
@given(
    counts=UNIT_COUNTS,
    seed=st.integers(0, 2**16),
    quantile=st.floats(0.05, 0.95),
    rate=st.floats(0.01, 1),
    per_layer=st.booleans(),
)
def test_updates_are_those_of_the_paper(counts, seed, quantile, rate, per_layer):
    groups = 3 if per_layer else 1
    clipping = adaptive(
        per_layer=per_layer, target_quantile=quantile, learning_rate=rate, expected_batch_size=4.5
    )
    expected = [1 / math.sqrt(groups)] * groups
    random, noise = np.random.default_rng(seed), NoiseSource(KEY)
    stddev = 5.0 * math.sqrt(groups) / 2
    for step, units in enumerate(counts):  # counts differ from the expected 4.5, and may be 0
        norms = random.lognormal(-0.5, 1, (units, groups)).astype(np.float32)
        clipping.factors(torch.tensor(norms.astype(np.float64) ** 2))
        drawn = NoiseSource(KEY).normal(step=step, stream=COUNT_NOISE_STREAM, count=groups, stddev=stddev)
        expected = andrew_update(
            expected, norms.tolist(), drawn.tolist(), quantile=quantile, rate=rate, batch=4.5
        )
        clipping.finish(noise, step=step, noise_multiplier=1.0)
        assert list(clipping.thresholds.values()) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=40)
@given(seed=st.integers(0, 2**16), units=st.integers(1, 12), cuts=st.lists(st.integers(0, 12), max_size=4))
def test_micro_batches_do_not_matter(seed, units, cuts):
    squares = torch.rand(units, 3, generator=torch.Generator().manual_seed(seed))
    whole, parts = adaptive(), adaptive()
    factors = whole.factors(squares)
    ends = sorted({0, units, *(min(cut, units) for cut in cuts)})
    pieces = [parts.factors(squares[low:high]) for low, high in itertools.pairwise(ends)]
    assert torch.equal(torch.cat(pieces), factors)
    for clipping in (whole, parts):
        clipping.finish(NoiseSource(KEY), step=0, noise_multiplier=1.0)
    assert whole.thresholds == parts.thresholds


def test_counts_start_anew_in_each_step():
    clipping = adaptive(count_noise_multiplier=1e-9, learning_rate=0.2, expected_batch_size=4)
    clipping.factors(squares_of(*[[9.0, 9.0, 9.0]] * 4))
    clipping.finish(NoiseSource(), step=0, noise_multiplier=0.0)
    before = clipping.thresholds
    clipping.finish(NoiseSource(), step=1, noise_multiplier=0.0)
    # without units the votes are 0: the fraction reads 1/2, which is the target
    assert clipping.thresholds == pytest.approx(before, rel=1e-6)


def test_update_divides_by_the_expected_size_not_by_the_drawn_one():
    # the drawn size is private: two units below, where 8 are expected, are 2 * 1/2 votes
    clipping = adaptive(per_layer=False, count_noise_multiplier=1e-9, learning_rate=1.0, target_quantile=0.3)
    clipping.factors(squares_of(0.5, 0.5))
    clipping.finish(NoiseSource(), step=0, noise_multiplier=0.0)
    assert clipping.thresholds["all"] == pytest.approx(math.exp(-(1 / 8 + 0.5 - 0.3)), rel=1e-6)


def test_empty_step_still_releases_noisy_counts():
    moves = []
    for step in range(400):
        clipping = adaptive(count_noise_multiplier=2.0, expected_batch_size=10.0, learning_rate=1.0)
        before = np.array(list(clipping.thresholds.values()))
        clipping.finish(NoiseSource(KEY), step=step, noise_multiplier=1.0)
        moves.append(-np.log(np.array(list(clipping.thresholds.values())) / before))
    released = np.array(moves) * 10 / (2.0 * math.sqrt(3) / 2)
    low, high = stats.chi2.interval(1 - 1e-6, released.size)
    assert low < np.square(released).sum() < high
    assert stats.kstest(released.ravel(), "norm").pvalue > 1e-6


def test_counts_have_a_noise_stream_of_their_own_and_the_address_of_the_step():
    asked = []

    class Watching(NoiseSource):
        def normal(self, **options):
            asked.append(options)
            return super().normal(**options)

    clipping = adaptive()
    clipping.finish(Watching(), step=7, noise_multiplier=1.0)
    stddev = 5.0 * math.sqrt(3) / 2
    assert asked == [{"step": 7, "stream": COUNT_NOISE_STREAM, "start": 0, "count": 3, "stddev": stddev}]
    assert COUNT_NOISE_STREAM != GRADIENT_NOISE_STREAM


def test_step_is_finished_once():
    clipping, noise = adaptive(), NoiseSource()
    clipping.finish(noise, step=3, noise_multiplier=1.0)
    before = clipping.thresholds
    for step in (3, 2):
        with pytest.raises(PrivacyError, match=rf"step {step} was finished before \(the last one is 3\)"):
            clipping.finish(noise, step=step, noise_multiplier=1.0)
    assert clipping.thresholds == before
    clipping.finish(noise, step=4, noise_multiplier=1.0)


def test_noise_correlated_over_the_steps_is_refused():
    class Correlated:
        def normal(self, **options):
            raise AssertionError("nothing may be drawn")

    clipping = adaptive()
    with pytest.raises(PrivacyError, match="cannot use Correlated: its thresholds change from step to step"):
        clipping.finish(Correlated(), step=0, noise_multiplier=1.0)


def test_counts_of_several_processes_add_up_to_one_update():
    squares = torch.rand(8, 3, generator=torch.Generator().manual_seed(3))
    whole, ranks = adaptive(), [adaptive(), adaptive()]
    whole.factors(squares)
    for rank, part in zip(ranks, (squares[:3], squares[3:]), strict=True):
        rank.factors(part)
    total = ranks[0].counts + ranks[1].counts
    for clipping in (whole, *ranks):
        if clipping is not whole:
            clipping.counts = total.clone()
        clipping.finish(NoiseSource(KEY), step=0, noise_multiplier=1.0)
    assert whole.thresholds == ranks[0].thresholds == ranks[1].thresholds


def test_sensitivity_follows_the_thresholds_of_the_step():
    clipping = adaptive()
    clipping.factors(squares_of([9.0, 9.0, 0.01]))
    clipping.finish(NoiseSource(), step=0, noise_multiplier=1.0)
    thresholds = list(clipping.thresholds.values())
    assert clipping.sensitivity == pytest.approx(math.hypot(*thresholds) * (1 + ROUNDING_EXCESS), rel=1e-12)
    factors = clipping.factors(squares_of([1e3, 1e3, 1e3]))
    torch.testing.assert_close(factors[0].double() * 1e3, torch.tensor(thresholds, dtype=torch.float64))


# ---- where the thresholds go


@pytest.mark.parametrize("quantile", [0.3, 0.5, 0.9])
def test_threshold_settles_at_the_target_quantile(quantile):
    random, batch = np.random.default_rng(5), 200
    clipping = adaptive(
        per_layer=False, initial_norm=30.0, target_quantile=quantile, expected_batch_size=batch,
        count_noise_multiplier=batch / 10,
    )  # fmt: skip
    noise, late = NoiseSource(KEY), []
    for step in range(500):  # a high quantile is approached from above by 2 % a step at most
        units = random.poisson(batch)
        clipping.factors(squares_of(*random.lognormal(0.0, 1.0, units)))
        clipping.finish(noise, step=step, noise_multiplier=1.0)
        if step >= 300:
            late.append(math.log(clipping.thresholds["all"]))
    reached = stats.norm.cdf(np.mean(late))  # of the lognormal's logarithm
    assert reached == pytest.approx(quantile, abs=0.02)


def test_each_layer_finds_its_own_median():
    random, batch, medians = np.random.default_rng(6), 200, (0.01, 0.4, 20.0)
    clipping = adaptive(expected_batch_size=batch, count_noise_multiplier=batch / 10)
    noise, late = NoiseSource(KEY), []
    for step in range(200):
        units = random.poisson(batch)
        clipping.factors(
            torch.tensor((medians * random.lognormal(0, 1, (units, 3))) ** 2, dtype=torch.float32)
        )
        clipping.finish(noise, step=step, noise_multiplier=1.0)
        if step >= 100:
            late.append([math.log(threshold) for threshold in clipping.thresholds.values()])
    assert np.exp(np.mean(late, axis=0)) == pytest.approx(medians, rel=0.06)


@pytest.mark.parametrize(("norm", "end"), [(0.0, 1e-6), (1e12, 1e6)])
def test_thresholds_stay_within_public_bounds(norm, end):
    clipping = adaptive(per_layer=False, learning_rate=50.0, initial_norm=2.0)
    noise = NoiseSource(KEY)
    for step in range(20):
        clipping.factors(squares_of(*[norm] * 100))
        clipping.finish(noise, step=step, noise_multiplier=1.0)
    assert clipping.thresholds["all"] == pytest.approx(2.0 * end, rel=1e-12)
    assert 0 < clipping.noise_stddev(1.0) < math.inf


def test_enormous_noise_does_not_overflow():
    clipping, noise = adaptive(count_noise_multiplier=1e9, expected_batch_size=1e-3), NoiseSource(KEY)
    for step in range(20):
        clipping.finish(noise, step=step, noise_multiplier=1.0)
    assert all(0 < threshold < 1e7 for threshold in clipping.thresholds.values())


# ---- resume


def test_resumed_run_goes_on_with_the_thresholds():
    squares = torch.rand(10, 6, 3, generator=torch.Generator().manual_seed(2))

    def run(clipping, steps):
        for step in steps:
            clipping.factors(squares[step])
            clipping.finish(NoiseSource(KEY), step=step, noise_multiplier=1.0)
        return clipping

    whole = run(adaptive(), range(10))
    saved = json.loads(json.dumps(run(adaptive(), range(5)).state_dict()))
    resumed = run(adaptive(state=saved), range(5, 10))
    assert resumed.thresholds == whole.thresholds
    assert resumed.sensitivity == whole.sensitivity
    # a resumed run may count its steps from 0 again, under its new key
    run(adaptive(state=saved), range(1))


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"thresholds": {"all": 1.0}},
        {"thresholds": {"a": 1.0, "b": 1.0}},
        {"thresholds": [1.0, 1.0, 1.0]},
        {"thresholds": {"a": 1.0, "b": 1.0, "c": 1.0}, "counts": [1, 2]},
    ],
)
def test_state_of_other_groups_is_refused(state):
    with pytest.raises(CheckpointError, match="does not hold thresholds of these 3 groups"):
        adaptive(state=state)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, 1e7, 1e-8])
def test_saved_threshold_out_of_range_is_refused(bad):
    with pytest.raises(CheckpointError, match="saved threshold of group 'b' must be from"):
        adaptive(state={"thresholds": {"a": 1.0, "b": bad, "c": 1.0}})


@pytest.mark.parametrize("bad", ["1.0", None, True])
def test_saved_threshold_that_is_no_number_is_refused(bad):
    with pytest.raises(CheckpointError, match="saved threshold of group 'b' is no number"):
        adaptive(state={"thresholds": {"a": 1.0, "b": bad, "c": 1.0}})


def test_thresholds_cannot_change_within_a_step():
    clipping = adaptive()
    state = clipping.state_dict()
    clipping.factors(squares_of([1.0, 1.0, 1.0]))
    with pytest.raises(PrivacyError, match="cannot change within a step"):
        clipping.load_state_dict(state)


def test_state_holds_nothing_private():
    clipping = adaptive()
    clipping.factors(squares_of([9.0, 9.0, 9.0]))
    assert clipping.state_dict() == adaptive().state_dict()
    assert clipping.describe() == adaptive().describe()


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["learning_rate", "count_noise_multiplier", "expected_batch_size"])
def test_bad_setting_is_named(name, value):
    with pytest.raises(PrivacyError, match=f"{name} must be a finite number > 0, got {value}"):
        adaptive(**{name: value})


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, math.nan])
def test_bad_quantile_is_named(value):
    with pytest.raises(PrivacyError, match=rf"target_quantile must be in \(0, 1\), got {value}"):
        adaptive(target_quantile=value)
