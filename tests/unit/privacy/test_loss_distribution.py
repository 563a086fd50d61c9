"""The distributions against closed forms: every other number of the accountant follows from them."""

import math
import subprocess
import sys
from itertools import product

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from scipy.optimize import brentq
from scipy.stats import norm

from securetune.errors import PrivacyError
from securetune.privacy.accounting import epsilon_of_phases, epsilon_spent, max_true_positive_rate_of_run
from securetune.privacy.loss_distribution import (
    Phase,
    Sampling,
    accountant_relation,
    check_phases,
    closed_form_bound,
    compose,
    step_event,
)
from tests.sampling_truth import batch_probabilities, exact_delta


def gaussian_delta(epsilon, mu):
    """Balle and Wang 2018, https://arxiv.org/abs/1805.06530, theorem 8: one Gaussian of sensitivity mu."""
    return norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)


def sampled_gaussian_delta(epsilon, noise_multiplier, sample_rate):
    """One Poisson-sampled Gaussian: the exact hockey-stick divergence, in the worse direction."""

    def likelihood_ratio_threshold(ratio):  # where (1 - q) + q exp((2x - 1) / (2 sigma^2)) = ratio
        inner = (ratio - (1 - sample_rate)) / sample_rate
        return -math.inf if inner <= 0 else noise_multiplier**2 * math.log(inner) + 0.5

    def mixture_above(x):
        return (1 - sample_rate) * norm.sf(x / noise_multiplier) + sample_rate * norm.sf(
            (x - 1) / noise_multiplier
        )

    above = likelihood_ratio_threshold(math.exp(epsilon))
    removed = mixture_above(above) - math.exp(epsilon) * norm.sf(above / noise_multiplier)
    below = likelihood_ratio_threshold(math.exp(-epsilon))
    added = norm.cdf(below / noise_multiplier) - math.exp(epsilon) * (1 - mixture_above(below))
    return max(removed, added)


@pytest.mark.parametrize(("noise_multiplier", "steps"), [(0.7, 1), (5.0, 100), (20.0, 1000)])
def test_full_batch_equals_the_analytic_gaussian(noise_multiplier, steps):
    mu = math.sqrt(steps) / noise_multiplier
    exact = brentq(lambda epsilon: gaussian_delta(epsilon, mu) - 1e-5, 0.0, 100.0)
    epsilon = epsilon_spent(noise_multiplier, 1.0, steps, 1e-5)
    assert exact - 1e-9 <= epsilon <= exact + 2e-3


@pytest.mark.parametrize(("noise_multiplier", "sample_rate"), [(0.5, 0.05), (1.0, 0.3), (2.0, 0.9)])
def test_one_sampled_step_equals_the_closed_form(noise_multiplier, sample_rate):
    exact = brentq(
        lambda epsilon: sampled_gaussian_delta(epsilon, noise_multiplier, sample_rate) - 1e-5, 0.0, 60.0
    )
    epsilon = epsilon_spent(noise_multiplier, sample_rate, 1, 1e-5)
    assert exact - 1e-9 <= epsilon <= exact + 2e-3


def test_hopeless_settings_give_a_bound_without_filling_the_memory():
    epsilon = epsilon_spent(0.1, 0.5, 100_000, 1e-5)
    assert 200 < epsilon < math.inf
    assert max_true_positive_rate_of_run([Phase(0.1, 0.5, 100_000)], 0.01) == 1.0


TRUNCATED = Phase(1.0, 0.1, 30, Sampling("truncated Poisson", 200, 25))
FIXED = Phase(2.0, 0.1, 30, Sampling("fixed size", 200, 20))


@pytest.mark.parametrize(
    "phase",
    [
        Phase(0.5, 0.03, 15),
        Phase(2.0, 0.3, 50),
        Phase(1.0, 1.0, 3),
        TRUNCATED,
        FIXED,
        Phase(0.7, 0.9, 4, Sampling("truncated Poisson", 10, 3)),
        Phase(0.7, 0.5, 4, Sampling("fixed size", 10, 5)),
        Phase(3.0, 1.0, 4, Sampling("fixed size", 10, 10)),
    ],
)
def test_closed_form_is_an_upper_bound(phase):
    assert closed_form_bound((phase,), 1e-5) >= epsilon_of_phases([phase], 1e-5)


def test_a_coarser_grid_never_claims_less_epsilon():
    phases = (Phase(1.0, 0.05, 30),)
    coarse, fine = (compose(phases, interval).get_epsilon_for_delta(1e-5) for interval in (1e-2, 1e-3))
    assert coarse >= fine


def test_importing_the_privacy_room_does_not_import_dp_accounting():
    code = "import sys, securetune.privacy.ledger; sys.exit('dp_accounting' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ".:kernels"}).returncode == 0


@pytest.mark.parametrize(
    ("num_records", "sample_rate", "cap", "noise_multiplier"),
    [(5, 0.4, 2, 1.0), (4, 0.7, 1, 0.6), (5, 0.2, 3, 2.0), (4, 0.5, 4, 1.0)],
)
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
def test_one_truncated_step_covers_every_zeroed_out_record(
    num_records, sample_rate, cap, noise_multiplier, epsilon
):
    """Truth: the density of the noised sum over all batches, for all records in {-1, 0, 1}."""
    phase = Phase(noise_multiplier, sample_rate, 1, Sampling("truncated Poisson", num_records, cap))
    bound = compose((phase,), 1e-3).get_delta_for_epsilon(epsilon)
    batches = batch_probabilities(num_records, sample_rate, cap)
    others = product((-1.0, 0.0, 1.0), repeat=num_records - 1)
    worst = max(exact_delta(batches, (1.0, *o), (0.0, *o), noise_multiplier, epsilon) for o in others)
    assert worst <= bound + 1e-6
    # without truncation the two are the same; truncation is counted pessimistically
    tolerance = 1e-3 if cap == num_records else 1.0
    assert bound <= worst + tolerance


@pytest.mark.parametrize(
    ("num_records", "batch_size", "noise_multiplier"), [(4, 2, 1.0), (5, 1, 0.6), (3, 3, 1.5), (5, 4, 2.0)]
)
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
def test_one_fixed_size_step_covers_every_replaced_record(num_records, batch_size, noise_multiplier, epsilon):
    sampling = Sampling("fixed size", num_records, batch_size)
    phase = Phase(noise_multiplier, batch_size / num_records, 1, sampling)
    bound = compose((phase,), 1e-3).get_delta_for_epsilon(epsilon)
    batches = batch_probabilities(num_records, 1.0, batch_size)
    others = product((-1.0, 0.0, 1.0), repeat=num_records - 1)
    worst = max(exact_delta(batches, (1.0, *o), (-1.0, *o), noise_multiplier, epsilon) for o in others)
    assert worst <= bound + 1e-6
    tolerance = 1e-3 if batch_size == num_records else 1.0
    assert bound <= worst + tolerance


def test_poisson_numbers_would_be_wrong_for_a_fixed_size():
    """The Poisson accountant's delta is passed by one step on a fixed-size batch."""
    batches = batch_probabilities(4, 1.0, 2)
    worst = exact_delta(batches, (1.0, -1.0, -1.0, -1.0), (-1.0, -1.0, -1.0, -1.0), 1.0, 0.5)
    assert worst > compose((Phase(1.0, 0.5, 1),), 1e-3).get_delta_for_epsilon(0.5) + 1e-3


@pytest.mark.parametrize("phase", [TRUNCATED, FIXED, Phase(1.0, 0.05, 30)])
def test_every_kind_equals_dp_accountings_own_accountant(phase):
    accountant = PLDAccountant(accountant_relation(phase.sampling), 1e-3)
    accountant.compose(step_event(phase.noise_multiplier, phase.sample_rate, phase.sampling), phase.steps)
    assert epsilon_of_phases([phase], 1e-5) == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-6)


def test_relations_are_those_of_dp_accounting():
    relation = dp_accounting.NeighboringRelation
    assert accountant_relation(Sampling()) == relation.ADD_OR_REMOVE_ONE
    assert accountant_relation(TRUNCATED.sampling) == relation.REPLACE_SPECIAL
    assert accountant_relation(FIXED.sampling) == relation.REPLACE_ONE


def test_rare_truncation_costs_next_to_nothing_and_frequent_truncation_a_lot():
    poisson = epsilon_spent(1.0, 0.1, 30, 1e-5)
    rare = TRUNCATED._replace(sampling=Sampling("truncated Poisson", 200, 70))
    assert epsilon_of_phases([rare], 1e-5) == pytest.approx(poisson, rel=1e-3)
    assert epsilon_of_phases([TRUNCATED], 1e-5) > 1.5 * poisson


def test_fixed_size_costs_more_than_poisson_at_the_same_rate_and_noise():
    assert epsilon_of_phases([FIXED], 1e-5) > 2 * epsilon_spent(2.0, 0.1, 30, 1e-5)


def test_truncated_and_poisson_phases_compose_fixed_size_ones_do_not_mix():
    poisson = Phase(1.0, 0.1, 10)
    both = epsilon_of_phases([poisson, TRUNCATED], 1e-5)
    assert both > epsilon_of_phases([TRUNCATED], 1e-5)
    with pytest.raises(PrivacyError, match=r"fixed size, truncated Poisson sampling.*Use one kind"):
        check_phases([TRUNCATED, FIXED])
    with pytest.raises(PrivacyError, match=r"Poisson, fixed size sampling"):
        epsilon_of_phases([poisson, FIXED], 1e-5)


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        (Phase(1.0, 0.1, 1, Sampling("Poisson", 100, None)), "private under it"),
        (Phase(1.0, 0.1, 1, Sampling("Poisson", None, 10)), "got None and 10"),
        (Phase(1.0, 0.1, 1, Sampling("truncated Poisson", None, 10)), "got 10 and None"),
        (Phase(1.0, 0.1, 1, Sampling("truncated Poisson", 100, 101)), "got 101 and 100"),
        (Phase(1.0, 0.11, 1, Sampling("fixed size", 100, 10)), "= 0.1, got sample_rate=0.11"),
    ],
)
def test_sampling_without_its_public_constants_is_refused(phase, message):
    with pytest.raises(ValueError, match=message):
        epsilon_of_phases([phase], 1e-5)
