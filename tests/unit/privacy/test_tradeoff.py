"""Bounds from the whole privacy curve: membership attacks, and one Gaussian above the run."""

import math

import numpy as np
import pytest
from dp_accounting.pld.common import DifferentialPrivacyParameters
from dp_accounting.pld.privacy_loss_distribution import from_privacy_parameters
from scipy.optimize import brentq
from scipy.stats import norm

from securetune.privacy import tradeoff
from securetune.privacy.accounting import epsilon_of_phases
from securetune.privacy.loss_distribution import Phase, Sampling, compose
from securetune.privacy.tradeoff import gdp_mu, max_true_positive_rate, max_true_positive_rate_of_run

QUICKSTART_LIKE = Phase(0.5, 0.032, 15)
RUNS = [
    QUICKSTART_LIKE,
    Phase(1.0, 0.01, 150),
    Phase(1.0, 0.1, 30, Sampling("truncated Poisson", 200, 25)),
    Phase(3.0, 0.1, 30, Sampling("fixed size", 200, 20)),
]


def gaussian_delta(epsilon, mu):
    return norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)


def test_true_positive_rate_bound_known_answers():
    assert max_true_positive_rate(0.0, 0.0, 0.01) == pytest.approx(0.01)  # nothing to learn: chance
    assert max_true_positive_rate(math.log(10), 0.0, 0.01) == pytest.approx(0.1)
    assert max_true_positive_rate(8.0, 1e-5, 0.01) == pytest.approx(1 - math.exp(-8) * (1 - 1e-5 - 0.01))
    assert max_true_positive_rate(1e6, 0.0, 0.01) == 1.0


def test_true_positive_rate_of_a_gaussian_is_its_trade_off_curve():
    # Dong, Roth and Su 2022, https://arxiv.org/abs/1905.02383, definition 2.6: the exact answer for one
    # Gaussian
    exact = norm.cdf(norm.ppf(0.01) + 1 / 2.0)
    bound = max_true_positive_rate_of_run([Phase(2.0, 1.0, 1)], 0.01)
    assert exact - 1e-9 <= bound <= exact * 1.01


def test_true_positive_rate_of_a_run_is_tighter_than_of_its_epsilon():
    one_pair = max_true_positive_rate(epsilon_of_phases([QUICKSTART_LIKE], 1e-5), 1e-5, 0.01)
    assert 0.01 < max_true_positive_rate_of_run([QUICKSTART_LIKE], 0.01) < one_pair


def test_no_phase_tells_nothing():
    assert max_true_positive_rate_of_run([], 0.01) == pytest.approx(0.01)
    assert gdp_mu([], 1e-5) == gdp_mu([Phase(1.0, 0.1, 0)], 1e-5) == 0.0


@pytest.mark.parametrize(("noise_multiplier", "steps"), [(2.0, 1), (5.0, 100)])
def test_mu_of_a_full_batch_run_is_exact(noise_multiplier, steps):
    mu = gdp_mu([Phase(noise_multiplier, 1.0, steps)], 1e-5)
    assert mu == pytest.approx(math.sqrt(steps) / noise_multiplier, rel=2e-3)
    assert mu <= math.sqrt(steps) / noise_multiplier


@pytest.mark.parametrize("run", RUNS)
def test_the_gaussian_lies_above_the_run_at_every_delta_and_touches_it(run):
    mu = gdp_mu([run], 1e-6)
    pld = compose((run,), 1e-3)
    deltas = np.geomspace(1e-6, pld.get_delta_for_epsilon(0.0) * 0.999, 25)
    slack = []
    for delta in deltas:
        epsilon = pld.get_epsilon_for_delta(delta)
        assert gaussian_delta(epsilon, mu) >= delta * (1 - 1e-6)
        exact = brentq(lambda m, e=epsilon, d=delta: gaussian_delta(e, m) - d, 1e-4, 50.0)
        slack.append(exact / mu)
    assert max(slack) > 0.99  # no smaller mu would do, up to the grid


def test_the_gaussian_lies_above_the_run_between_the_points_of_a_coarse_grid(monkeypatch):
    """Randomised response needs the largest ``mu`` at epsilon 0, between the first two points."""
    response = from_privacy_parameters(DifferentialPrivacyParameters(2.0, 0.0))
    monkeypatch.setattr(tradeoff, "compose", lambda phases, interval: response)
    monkeypatch.setattr(tradeoff, "_GRID_POINTS", 6)
    mu = gdp_mu([QUICKSTART_LIKE], 1e-5)
    for epsilon in np.linspace(0.0, response.get_epsilon_for_delta(1e-5), 40):
        assert gaussian_delta(epsilon, mu) >= response.get_delta_for_epsilon(epsilon)


@pytest.mark.parametrize("run", RUNS[:2])
def test_mu_is_not_the_central_limit_value_which_lies_below_the_truth(run):
    """Bu, Dong, Long and Su 2020, https://arxiv.org/abs/1911.11607, section 3: the approximation."""
    central_limit = run.sample_rate * math.sqrt(run.steps * math.expm1(run.noise_multiplier**-2))
    mu = gdp_mu([run], 1e-5)
    assert mu > 1.05 * central_limit
    # taken at its word, the approximation promises less epsilon than the run costs
    epsilon = epsilon_of_phases([run], 1e-5)
    assert gaussian_delta(epsilon, central_limit) < 1e-5 <= gaussian_delta(epsilon, mu)


def test_mu_rises_as_the_comparison_reaches_further_but_never_above_no_sampling():
    mus = [gdp_mu([QUICKSTART_LIKE], delta) for delta in (1e-2, 1e-5, 1e-9)]
    assert mus == sorted(set(mus))
    assert mus[-1] < math.sqrt(15) / 0.5
    # hopeless settings: the value without sampling, and no memory filled
    assert gdp_mu([Phase(0.1, 0.5, 100_000)], 1e-5) == pytest.approx(math.sqrt(100_000) / 0.1)
    fixed = Phase(0.1, 0.5, 10_000, Sampling("fixed size", 10, 5))
    assert gdp_mu([fixed], 1e-5) == pytest.approx(2 * math.sqrt(10_000) / 0.1)


def test_mu_of_several_phases_composes():
    one, two = Phase(2.0, 1.0, 4), Phase(4.0, 1.0, 9)
    assert gdp_mu([one, two], 1e-5) == pytest.approx(math.hypot(1.0, 0.75), rel=2e-3)


def test_mu_refuses_a_delta_out_of_range():
    with pytest.raises(ValueError, match=r"delta must be in \(0, 1\), got 0.0"):
        gdp_mu([QUICKSTART_LIKE], 0.0)
