"""The distributions against closed forms: every other number of the accountant follows from them."""

import math
import subprocess
import sys

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from securetune.privacy.accounting import epsilon_spent, max_true_positive_rate_of_run
from securetune.privacy.loss_distribution import Phase, closed_form_bound, compose


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


@pytest.mark.parametrize("phase", [Phase(0.5, 0.03, 15), Phase(2.0, 0.3, 50), Phase(1.0, 1.0, 3)])
def test_closed_form_is_an_upper_bound(phase):
    assert closed_form_bound((phase,), 1e-5) >= epsilon_spent(*phase, 1e-5)


def test_a_coarser_grid_never_claims_less_epsilon():
    phases = (Phase(1.0, 0.05, 30),)
    coarse, fine = (compose(phases, interval).get_epsilon_for_delta(1e-5) for interval in (1e-2, 1e-3))
    assert coarse >= fine


def test_importing_the_privacy_room_does_not_import_dp_accounting():
    code = "import sys, securetune.privacy.ledger; sys.exit('dp_accounting' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ".:kernels"}).returncode == 0
