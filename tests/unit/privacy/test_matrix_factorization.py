"""Correlated noise: the matrix, its sensitivity, its accounting, its error, and its addresses."""

import copy
import inspect
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.linalg import toeplitz
from scipy.optimize import minimize

from securetune.errors import PrivacyError
from securetune.privacy import matrix_factorization
from securetune.privacy.accounting import calibrate_noise_multiplier, epsilon_of_phases
from securetune.privacy.ledger import Ledger, LedgerHeader, read_ledger
from securetune.privacy.matrix_factorization import CorrelatedNoise, MatrixMechanism, WholeRunCharge
from securetune.privacy.noise import NoiseSource
from securetune.privacy.participation import EpochOrderSampler, Participation

KEY = bytes(range(32))


def mechanism(steps=6, often=2, separation=3, bands=3):
    pattern = Participation(steps=steps, max_participations=often, min_separation=separation)
    return MatrixMechanism(participation=pattern, bands=bands)


def noising_matrix(steps, bands):
    """``C^-1`` in float64 from the binomial series of ``(1 - x)^(1/2)``, by a loop over its definition."""
    matrix = np.zeros((steps, steps))
    for row, column in itertools.product(range(steps), repeat=2):
        lag = row - column
        if 0 <= lag < bands:
            matrix[row, column] = (-1) ** lag * math.prod((0.5 - i) / (i + 1) for i in range(lag))
    return matrix


def strategy_matrix(steps, bands):
    return np.linalg.inv(noising_matrix(steps, bands))


def patterns(steps, often, separation):
    """All allowed sets of steps of one unit."""
    for count in range(1, often + 1):
        for chosen in itertools.combinations(range(steps), count):
            if all(later - earlier >= separation for earlier, later in itertools.pairwise(chosen)):
                yield chosen


def draw_run(noise, count, stddev=1.0, stream=0):
    """``[steps, count]``, float64: the noise of every step of a run."""
    rows = [
        noise.normal(step=step, stream=stream, count=count, stddev=stddev).double().numpy()
        for step in range(noise.mechanism.participation.steps)
    ]
    return np.stack(rows)


# the matrix


@settings(max_examples=40)
@given(steps=st.integers(1, 40), bands=st.integers(1, 40))
def test_coefficients_are_the_matrix_and_its_inverse(steps, bands):
    bands = min(bands, steps)
    built = mechanism(steps, 1, 1, bands)
    matrix = noising_matrix(steps, bands)
    np.testing.assert_allclose(built.noise_coefficients, matrix[:bands, 0], rtol=1e-13)
    strategy = toeplitz(built.strategy_coefficients, np.zeros(steps))
    np.testing.assert_allclose(strategy @ matrix, np.eye(steps), atol=1e-13)


@settings(max_examples=60)
@given(steps=st.integers(1, 400), bands=st.integers(1, 400))
def test_strategy_is_not_negative_and_does_not_increase(steps, bands):
    column = mechanism(steps, 1, 1, min(bands, steps)).strategy_coefficients
    assert (column >= 0).all()
    assert (np.diff(column) <= 1e-15).all()


def test_all_bands_are_the_square_root_of_the_prefix_sums():
    strategy = toeplitz(mechanism(50, 1, 1, 50).strategy_coefficients, np.zeros(50))
    np.testing.assert_allclose(strategy @ strategy, np.tri(50), rtol=1e-12)


def test_coefficients_cannot_be_changed():
    built = mechanism()
    for values in (built.noise_coefficients, built.strategy_coefficients, built.prefix_sum_stddevs):
        with pytest.raises(ValueError, match="read-only"):
            values[0] = 0


# sensitivity


@pytest.mark.parametrize("steps", [1, 2, 5, 8, 11])
def test_sensitivity_is_the_maximum_over_all_patterns(steps):
    for bands, often, separation in itertools.product(range(1, steps + 1), range(1, 5), range(1, steps + 2)):
        strategy = strategy_matrix(steps, bands)
        worst = max(
            np.linalg.norm(strategy[:, list(chosen)].sum(axis=1))
            for chosen in patterns(steps, often, separation)
        )
        built = mechanism(steps, often, separation, bands)
        assert built.sensitivity == pytest.approx(worst, rel=1e-12), (bands, often, separation)


@settings(max_examples=60)
@given(
    steps=st.integers(2, 12),
    bands=st.integers(1, 12),
    often=st.integers(1, 6),
    separation=st.integers(1, 6),
    seed=st.integers(0, 2**32 - 1),
)
def test_no_vectors_of_any_direction_pass_the_sensitivity(steps, bands, often, separation, seed):
    draw = np.random.default_rng(seed)
    bands = min(bands, steps)
    allowed = list(patterns(steps, often, separation))
    chosen = list(allowed[draw.integers(len(allowed))])
    vectors = np.zeros((steps, 3))
    moves = draw.normal(size=(len(chosen), 3)) * draw.choice([1e-3, 1, 1e3])
    vectors[chosen] = moves / np.maximum(1, np.linalg.norm(moves, axis=1, keepdims=True))  # clipped to 1
    moved = np.linalg.norm(strategy_matrix(steps, bands) @ vectors)
    assert moved <= mechanism(steps, often, separation, bands).sensitivity * (1 + 1e-12)


def test_independent_noise_pays_the_square_root_of_the_participations():
    assert mechanism(100, 7, 5, 1).sensitivity == pytest.approx(math.sqrt(7), rel=1e-14)


@pytest.mark.parametrize(
    ("pattern", "sensitivity", "rmse", "largest"),
    [
        ((64, 1, 64, 64), 1.5455898900728597, 2.229676471581391, 2.3888481082954347),
        ((100, 4, 25, 8), 2.815159413691177, 5.322906055440341, 6.753583440183858),
        ((1000, 10, 100, 32), 5.001579839403905, 13.170795773824462, 17.345192566749397),
        ((300, 3, 90, 16), 2.523673314001567, 5.496827692539207, 7.080220353519086),
        ((50, 50, 1, 5), 24.147645226367636, 42.43588802933091, 53.60348822527622),
    ],
)
def test_sensitivity_and_errors_agree_with_jax_privacy(pattern, sensitivity, rmse, largest):
    # jax-privacy 2.0.0, matrix_factorization.toeplitz: inverse_coef, minsep_sensitivity_squared,
    # per_query_error, in float64
    built = mechanism(*pattern)
    assert built.sensitivity == pytest.approx(sensitivity, rel=1e-12)
    assert built.rmse == pytest.approx(rmse, rel=1e-12)
    assert built.max_stddev == pytest.approx(largest, rel=1e-12)


# error of the prefix sums


@pytest.mark.parametrize(("steps", "bands"), [(1, 1), (7, 3), (30, 30)])
def test_prefix_sum_stddevs_are_those_of_the_matrix(steps, bands):
    built = mechanism(steps, 2, 3, bands)
    decoder = np.tri(steps) @ noising_matrix(steps, bands)
    expected = built.sensitivity * np.linalg.norm(decoder, axis=1)
    np.testing.assert_allclose(built.prefix_sum_stddevs, expected, rtol=1e-12)
    assert built.max_stddev == pytest.approx(expected.max(), rel=1e-12)
    assert built.rmse == pytest.approx(math.sqrt((expected**2).mean()), rel=1e-12)


@pytest.mark.parametrize("steps", [1, 4, 64, 1000])
def test_largest_error_at_one_participation_is_the_published_value(steps):
    # sum of (binom(2t, t) / 4^t)^2 (arXiv 2202.11205); each term at most 1 / (pi t), by Wallis
    expected = math.fsum((math.comb(2 * t, t) / 4**t) ** 2 for t in range(steps))
    largest = mechanism(steps, 1, steps, steps).max_stddev
    assert largest == pytest.approx(expected, rel=1e-12)
    assert largest <= 1 + math.fsum(1 / t for t in range(1, steps)) / math.pi + 1e-12


def test_no_toeplitz_matrix_has_a_smaller_largest_error():
    def error(tail):
        column = np.concatenate([[1.0], tail])
        decoder = np.tri(5) @ np.linalg.inv(toeplitz(column, np.zeros(5)))
        return np.linalg.norm(column) * np.linalg.norm(decoder, axis=1).max()

    starts = np.random.default_rng(0).uniform(-0.5, 0.8, size=(5, 4))
    best = min(
        minimize(error, start, method="Nelder-Mead", options={"maxiter": 2000}).fun for start in starts
    )
    assert mechanism(5, 1, 5, 5).max_stddev == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("steps", [16, 256])
def test_rmse_is_near_the_least_that_any_factorization_has(steps):
    # |A|_* <= |B|_F |C|_F <= |B|_F sqrt(n) sensitivity(C), so rmse >= |A|_* / n
    least = np.linalg.svd(np.tri(steps), compute_uv=False).sum() / steps
    rmse = mechanism(steps, 1, steps, steps).rmse
    assert least <= rmse <= 1.15 * least


def test_correlated_noise_beats_independent_noise_and_tree_aggregation():
    steps = 256
    independent = mechanism(steps, 1, steps, 1)
    assert independent.rmse == pytest.approx(math.sqrt((steps + 1) / 2), rel=1e-12)
    # the binary tree, every node noised: a prefix takes one node for each 1 in its length's binary digits
    levels = steps.bit_length()
    plain_tree = math.sqrt(levels * sum(t.bit_count() for t in range(1, steps + 1)) / steps)
    tree = np.concatenate(
        [np.kron(np.eye(steps >> level), np.ones((1, 1 << level))) for level in range(levels)]
    )
    # or least squares over all nodes: the best, though it has to wait for the end of the run
    best_tree = np.linalg.norm(np.tri(steps) @ np.linalg.pinv(tree)) * math.sqrt(levels / steps)
    correlated = mechanism(steps, 1, steps, 64).rmse
    assert correlated < 0.85 * best_tree
    assert correlated < 0.5 * plain_tree
    assert correlated < 0.25 * independent.rmse


@pytest.mark.parametrize("epochs", [1, 4, 10])
def test_few_bands_already_help_at_equal_epsilon(epochs):
    separation = 1000 // epochs
    rmse = [mechanism(1000, epochs, separation, bands).rmse for bands in (1, 2, 4, 8, 16)]
    assert rmse == sorted(rmse, reverse=True)
    assert rmse[1] < 0.6 * rmse[0]
    assert rmse[4] < 0.25 * rmse[0]


# accounting


def test_the_whole_run_is_one_gaussian_mechanism():
    built = mechanism()
    assert built.event(1.3) == GaussianDpEvent(1.3)
    for runs in (1, 2):  # the second is a resumed run
        accountant = PLDAccountant().compose(GaussianDpEvent(1.3), runs)
        epsilon = epsilon_of_phases([built.phase(1.3, runs=runs)], 1e-5)
        assert epsilon == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-3)
        assert epsilon == pytest.approx(epsilon_of_phases([built.phase(1.3)] * runs, 1e-5), rel=1e-5)


@pytest.mark.parametrize("runs", [1, 2])
def test_calibration_meets_the_target(runs):
    sigma = calibrate_noise_multiplier(target_epsilon=3.0, delta=1e-5, sample_rate=1.0, steps=runs)
    epsilon = epsilon_of_phases([mechanism().phase(sigma, runs=runs)], 1e-5)
    assert 3.0 * (1 - 1e-3) <= epsilon <= 3.0


@pytest.fixture
def open_ledger(tmp_path):
    def opened(sample_rate=1.0, **sampling):
        header = LedgerHeader(
            accountant="test",
            noise_multiplier=1.3,
            sample_rate=sample_rate,
            max_grad_norm=1.0,
            delta=1e-5,
            expected_batch_size=8,
            planned_steps=2,
            **{"sampler": "fixed order", **sampling},
        )
        return Ledger(tmp_path / "ledger.jsonl", header)

    return opened


def test_a_run_costs_the_planned_epsilon_from_its_first_step(open_ledger):
    built = mechanism()
    with open_ledger() as ledger:
        charge = WholeRunCharge(ledger, built)
        assert ledger.epsilon() == 0
        for _ in range(6):
            assert charge.charge() == 1
            assert read_ledger(ledger.path).epsilon() == epsilon_of_phases([built.phase(1.3)], 1e-5)
            assert charge.state == ledger.state
        with pytest.raises(
            PrivacyError, match="step 6 was not planned: the run's epsilon covers the 6 steps"
        ):
            charge.charge()


def test_a_resumed_run_pays_for_another_mechanism(open_ledger):
    built = mechanism()
    for _ in range(2):
        with open_ledger() as ledger:
            WholeRunCharge(ledger, built).charge()
    assert read_ledger(ledger.path).epsilon() == epsilon_of_phases([built.phase(1.3, runs=2)], 1e-5)
    with open_ledger() as ledger, pytest.raises(PrivacyError, match="all 2 planned steps are charged"):
        WholeRunCharge(ledger, built).charge()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"sample_rate": 0.1, "sampler": "Poisson"}, r"counts steps of Poisson sampling at sample_rate=0\.1"),
        (
            {
                "sampler": "fixed size",
                "num_records": 8,
                "max_batch_size": 8,
                "neighbouring_relation": "replace one",
            },
            r"counts steps of fixed size sampling at sample_rate=1\.0",
        ),
    ],
)
def test_a_ledger_of_sampled_steps_is_refused(open_ledger, header, message):
    with open_ledger(**header) as ledger, pytest.raises(PrivacyError, match=message):
        WholeRunCharge(ledger, mechanism())


# the noise


@pytest.mark.parametrize(
    ("steps", "often", "separation", "bands"), [(1, 1, 1, 1), (6, 2, 3, 3), (9, 9, 1, 9)]
)
def test_noise_is_the_matrix_times_the_normals_of_the_source(steps, often, separation, bands):
    built = mechanism(steps, often, separation, bands)
    noise = draw_run(CorrelatedNoise(built, KEY), 100, stddev=0.7, stream=2)
    source = NoiseSource(KEY)
    normals = np.stack(
        [
            source.normal(step=0, stream=2 * steps + step, count=100, stddev=1).double().numpy()
            for step in range(steps)
        ]
    )
    expected = 0.7 * built.sensitivity * noising_matrix(steps, bands) @ normals
    np.testing.assert_allclose(noise, expected, rtol=1e-5, atol=1e-6)


def test_covariance_over_steps_and_independence_over_addresses():
    built = mechanism(6, 2, 3, 4)
    count = 200_000
    noise = draw_run(CorrelatedNoise(built, KEY), count, stddev=0.7)
    half = noising_matrix(6, 4) * 0.7 * built.sensitivity
    covariance = half @ half.T
    # standard error of a sample covariance of normals: sqrt((c_ii c_jj + c_ij^2) / count)
    error = np.sqrt((np.outer(np.diag(covariance), np.diag(covariance)) + covariance**2) / count)
    assert (np.abs(noise @ noise.T / count - covariance) < 5 * error).all()
    whitened = np.linalg.solve(half, noise)
    assert stats.kstest(whitened.ravel(), "norm").pvalue > 1e-3
    for shift in (1, 2, 8):
        assert abs(np.mean(whitened[:, shift:] * whitened[:, :-shift])) < 5 / math.sqrt(whitened.size)


@pytest.mark.parametrize(("often", "separation"), [(1, 6), (2, 3), (3, 2), (6, 1)])
def test_neighbours_are_as_far_apart_as_one_gaussian_mechanism(often, separation):
    """Each address is one run: the best test between two neighbours, against the accountant's curve."""
    sigma, clip, count = 0.8, 1.7, 100_000
    built = mechanism(6, often, separation, 3)
    noise = draw_run(CorrelatedNoise(built, KEY), count, stddev=sigma * clip)
    half = noising_matrix(6, 3) * sigma * clip * built.sensitivity
    distances = []
    for chosen in patterns(6, often, separation):
        moved = np.zeros(6)
        moved[list(chosen)] = clip
        distances.append((np.linalg.norm(np.linalg.solve(half, moved)), moved))
    distance, moved = max(distances, key=lambda pair: pair[0])
    assert distance == pytest.approx(1 / sigma, rel=1e-12)  # a Gaussian mechanism of sensitivity 1: exact
    direction = np.linalg.solve(half.T, np.linalg.solve(half, moved))
    without = direction @ noise - distance**2 / 2  # log likelihood ratio of "with" against "without"
    with_unit = direction @ (moved[:, None] + noise) - distance**2 / 2
    for epsilon in (0.0, 0.5, 1.0, 2.0):
        measured = (with_unit > epsilon).mean() - math.exp(epsilon) * (without > epsilon).mean()
        accountant = PLDAccountant().compose(built.event(sigma))
        allowed = accountant.get_delta(epsilon)
        error = math.sqrt((1 + math.exp(2 * epsilon) * max((without > epsilon).mean(), 1e-5)) / count)
        assert measured == pytest.approx(allowed, abs=4 * error)


def test_it_is_called_as_independent_noise_is():
    assert inspect.signature(CorrelatedNoise.normal) == inspect.signature(NoiseSource.normal)


@settings(max_examples=40)
@given(step=st.integers(0, 5), start=st.integers(0, 60), count=st.integers(0, 40), stream=st.integers(0, 5))
def test_any_slice_is_that_slice_of_the_whole(step, start, count, stream):
    whole = CorrelatedNoise(mechanism(), KEY).normal(step=step, stream=stream, count=100, stddev=1.5)
    part = CorrelatedNoise(mechanism(), KEY).normal(
        step=step, stream=stream, start=start, count=count, stddev=1.5
    )
    assert torch.equal(part, whole[start : start + count])
    assert part.dtype == torch.float32


def test_slices_across_chunks(monkeypatch):
    whole = CorrelatedNoise(mechanism(), KEY).normal(step=4, start=5, count=100, stddev=1.5)
    monkeypatch.setattr(matrix_factorization, "_CHUNK", 7)
    assert torch.equal(
        CorrelatedNoise(mechanism(), KEY).normal(step=4, start=5, count=100, stddev=1.5), whole
    )


def test_streams_and_keys_share_no_normals():
    noises = {
        (key, stream): draw_run(CorrelatedNoise(mechanism(), key), 20_000, stream=stream)
        for key in (KEY, bytes(32))
        for stream in (0, 1, 2)
    }
    for first, second in itertools.combinations(noises.values(), 2):
        correlation = np.corrcoef(first, second)[:6, 6:]
        assert np.abs(correlation).max() < 6 / math.sqrt(20_000)


def test_new_runs_draw_new_noise():
    first, second = (CorrelatedNoise(mechanism()) for _ in range(2))
    assert not torch.equal(
        first.normal(step=0, count=8, stddev=1.0), second.normal(step=0, count=8, stddev=1.0)
    )
    assert first.reportable_epsilon
    assert not CorrelatedNoise(mechanism(), KEY).reportable_epsilon


def test_a_step_may_repeat_but_not_go_back():
    noise = CorrelatedNoise(mechanism(), KEY)
    for start in (0, 8):  # two shards
        noise.normal(step=3, start=start, count=8, stddev=1.0)
    with pytest.raises(PrivacyError, match="noise for step 2 was asked for after step 3"):
        noise.normal(step=2, count=8, stddev=1.0)


def test_a_step_that_was_not_planned_gets_no_noise():
    with pytest.raises(PrivacyError, match="step 6 was not planned"):
        CorrelatedNoise(mechanism(), KEY).normal(step=6, count=8, stddev=1.0)


def test_another_standard_deviation_is_refused():
    noise = CorrelatedNoise(mechanism(), KEY)
    noise.normal(step=0, count=8, stddev=1.0)
    noise.normal(step=0, stream=1, count=8, stddev=2.0)  # another use, another mechanism
    with pytest.raises(PrivacyError, match=r"stddev changed from 1\.0 to 0\.9 at step 1"):
        noise.normal(step=1, count=8, stddev=0.9)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"step": -1}, "step must be >= 0, got -1"),
        ({"stream": -1}, "stream must be from 0 to 357913940, got -1"),
        ({"stream": 2**31 // 6}, "stream must be from 0 to 357913940, got 357913941"),
        ({"start": -1}, "start and count must be >= 0, got -1 and 8"),
        ({"count": -1}, "start and count must be >= 0, got 0 and -1"),
        ({"start": 2**48}, "start and count must be >= 0 and end by 281474976710656"),
        ({"stddev": -1.0}, r"stddev must be a finite number >= 0, got -1\.0"),
        ({"stddev": math.nan}, "stddev must be a finite number >= 0, got nan"),
        ({"stddev": math.inf}, "stddev must be a finite number >= 0, got inf"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        CorrelatedNoise(mechanism(), KEY).normal(**{"step": 0, "count": 8, "stddev": 1.0, **values})


@pytest.mark.parametrize("bands", [0, 7])
def test_bands_out_of_range_are_refused(bands):
    with pytest.raises(ValueError, match=f"bands must be from 1 to the 6 planned steps, got {bands}"):
        mechanism(bands=bands)


def test_repr_hides_the_key():
    shown = repr(CorrelatedNoise(mechanism()))
    assert shown.endswith("NoiseSource(key=<secret>))")
    assert "bands=3" in shown


@pytest.mark.parametrize("copy_it", [pickle.dumps, copy.copy, copy.deepcopy])
def test_noise_cannot_be_pickled_or_copied(copy_it):
    with pytest.raises(TypeError, match="CorrelatedNoise cannot be pickled or copied"):
        copy_it(CorrelatedNoise(mechanism()))


def test_running_sums_over_epochs_are_nearer_to_the_truth_than_with_independent_noise():
    """The whole path: sampler, its pattern, mechanism, noise; running sums at equal epsilon."""
    sampler = EpochOrderSampler(200, 25, steps=100, key=KEY)
    values = np.random.default_rng(0).uniform(0, 1, 200)
    sums = np.array([values[sampler.draw(step)].sum() for step in range(100)])
    errors = []
    for bands in (1, 16):
        built = MatrixMechanism(participation=sampler.participation, bands=bands)
        released = sums[:, None] + draw_run(CorrelatedNoise(built, KEY), 2000, stddev=1.0)
        running = released.cumsum(axis=0) - sums.cumsum()[:, None]
        errors.append(math.sqrt((running**2).mean()))
        assert errors[-1] == pytest.approx(built.rmse, rel=0.03)
    assert errors[1] < 0.4 * errors[0]
