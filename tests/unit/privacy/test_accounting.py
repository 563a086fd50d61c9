"""The accountant against closed forms, against dp-accounting, and against published values."""

import math
import time

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from securetune.errors import PrivacyError
from securetune.privacy import accounting, loss_distribution
from securetune.privacy.accounting import (
    EpsilonCurve,
    Phase,
    PrivacySpec,
    Sampling,
    calibrate_noise_multiplier,
    epsilon_curve,
    epsilon_of_phases,
    epsilon_spent,
    gdp_mu,
    plan_privacy,
    rdp_epsilon,
    step_event,
)

QUICKSTART_LIKE = Phase(0.5, 0.032, 15)


@pytest.mark.parametrize(
    ("phase", "delta"), [(QUICKSTART_LIKE, 1e-5), (Phase(1.0, 0.01, 1000), 1e-6), (Phase(2.0, 0.3, 50), 1e-9)]
)
def test_epsilon_agrees_with_dp_accounting(phase, delta):
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, 1e-4)
    accountant.compose(step_event(phase.noise_multiplier, phase.sample_rate), phase.steps)
    assert epsilon_of_phases([phase], delta) == pytest.approx(accountant.get_epsilon(delta), rel=2e-4)


@pytest.mark.parametrize("sample_rate", [0.002, 0.3])
@pytest.mark.parametrize("noise_multiplier", [0.7, 3.0])
@pytest.mark.parametrize("steps", [7, 150])
@pytest.mark.parametrize("delta", [1e-4, 1e-8])
def test_trap_33_grid_equals_dp_accountings_own_accountants(sample_rate, noise_multiplier, steps, delta):
    event = dp_accounting.PoissonSampledDpEvent(sample_rate, dp_accounting.GaussianDpEvent(noise_multiplier))
    interval = loss_distribution.interval_for(steps)
    pld = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, interval)
    rdp = RdpAccountant()
    for accountant in (pld, rdp):
        accountant.compose(event, steps)
    phase = Phase(noise_multiplier, sample_rate, steps)
    assert epsilon_of_phases([phase], delta) == pytest.approx(pld.get_epsilon(delta), rel=1e-6)
    assert rdp_epsilon([phase], delta) == pytest.approx(rdp.get_epsilon(delta), rel=1e-9)


@pytest.mark.parametrize(
    ("phase", "delta", "epsilon"),
    [
        (Phase(math.sqrt(3), 1.0, 3), 0.126936, 1.0),  # test_gaussian_basic
        (Phase(0.5, 0.2, 3), 0.15594, 1.0),  # test_poisson_subsampled_gaussian
    ],
)
def test_trap_33_published_values_of_dp_accounting(phase, delta, epsilon):
    """The values of dp_accounting/pld/pld_privacy_accountant_test.py."""
    assert epsilon_of_phases([phase], delta) == pytest.approx(epsilon, abs=2e-3)


def test_trap_33_published_value_of_truncated_sampling():
    """test_truncated_subsampled_gaussian_basic of the same file, on its grid up to ours."""
    four = Phase(1.0, 0.5, 3, Sampling("truncated Poisson", 4, 2))
    three = Phase(1.0, 0.5, 2, Sampling("truncated Poisson", 3, 2))
    assert epsilon_of_phases([four, three], 1e-6) == pytest.approx(17.904330, abs=2e-3)


@pytest.mark.parametrize(
    ("steps", "theirs"),
    [(2250, 1.34765625), (2000, 1.2915)],  # test_get_noise_multiplier_prv_{epochs,steps}
)
def test_trap_33_published_calibration_of_opacus(steps, theirs):
    """Its bisection stops within 0.01 of epsilon; the noise that it found must cost about its target of 8."""
    assert epsilon_spent(theirs, 0.04, steps, 1e-5) == pytest.approx(8.0, abs=0.02)


@settings(max_examples=8)
@given(
    target_epsilon=st.floats(0.2, 5.0),
    delta=st.sampled_from([1e-4, 1e-6]),
    sample_rate=st.sampled_from([0.005, 0.05, 0.4]),
    steps=st.integers(1, 60),
    kind=st.sampled_from(["Poisson", "truncated Poisson", "fixed size"]),
)
def test_trap_33_calibration_never_overshoots(target_epsilon, delta, sample_rate, steps, kind):
    sampling = Sampling() if kind == "Poisson" else Sampling(kind, 1000, round(1000 * sample_rate))
    try:
        noise_multiplier = calibrate_noise_multiplier(
            target_epsilon=target_epsilon,
            delta=delta,
            sample_rate=sample_rate,
            steps=steps,
            sampling=sampling,
        )
    except PrivacyError as error:  # next to no privacy asked for
        assert "Lower target_epsilon" in str(error)  # noqa: PT017
        return
    epsilon = epsilon_of_phases([Phase(noise_multiplier, sample_rate, steps, sampling)], delta)
    assert target_epsilon * (1 - 1e-2) <= epsilon <= target_epsilon


def test_rdp_cross_checks_fixed_size_sampling_with_the_doubled_change_of_the_sum():
    sampling = Sampling("fixed size", 1000, 50)
    phase = Phase(3.0, 0.05, 40, sampling)
    accountant = RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE)
    accountant.compose(
        dp_accounting.SampledWithoutReplacementDpEvent(1000, 50, dp_accounting.GaussianDpEvent(1.5)), 40
    )
    assert rdp_epsilon([phase], 1e-5) == pytest.approx(accountant.get_epsilon(1e-5))
    assert rdp_epsilon([phase], 1e-5) >= epsilon_of_phases([phase], 1e-5)


def test_rdp_of_truncated_sampling_is_refused():
    with pytest.raises(ValueError, match="cannot count truncated Poisson sampling"):
        rdp_epsilon([Phase(1.0, 0.1, 1, Sampling("truncated Poisson", 100, 20))], 1e-5)


@pytest.mark.parametrize(("sampler", "noise_above"), [("truncated Poisson", 1.0), ("fixed size", 2.0)])
def test_plan_of_other_samplers(sampler, noise_above):
    common = {
        "target_epsilon": 2.0,
        "delta": 1e-5,
        "sample_rate": 0.05,
        "steps": 6,
        "max_grad_norm": 1.0,
        "expected_batch_size": 50,
    }
    plan = plan_privacy(PrivacySpec(**common, sampler=sampler, num_records=1000, max_batch_size=50))
    poisson = plan_privacy(PrivacySpec(**common))
    assert plan.noise_multiplier > noise_above * poisson.noise_multiplier
    assert plan.epsilon == epsilon_of_phases([plan.phase], 1e-5) <= 2.0
    assert plan.curve.epsilons[-1] == plan.epsilon
    assert plan.phase.sampling == Sampling(sampler, 1000, 50)
    assert (plan.rdp_epsilon is None) == (sampler == "truncated Poisson")


def test_published_values_of_opacus():
    # sigma 1.5, q 0.04, 2250 steps, delta 1e-5: the golden values of opacus/tests/accountants_test.py. Its
    # PRV accountant may be off by its error bound of 0.01, its RDP uses other orders.
    phase = Phase(1.5, 0.04, 2250)
    assert rdp_epsilon([phase], 1e-5) == pytest.approx(7.32911117143, abs=1e-3)
    assert epsilon_of_phases([phase], 1e-5) == pytest.approx(6.777395712150674, abs=1e-2)


@pytest.mark.parametrize(
    "phase", [QUICKSTART_LIKE, Phase(1.0, 0.01, 1000), Phase(5.0, 1.0, 100), Phase(0.8, 0.001, 3000)]
)
def test_rdp_is_the_looser_bound(phase):
    assert rdp_epsilon([phase], 1e-5) >= epsilon_of_phases([phase], 1e-5) * (1 - 1e-3)


@pytest.mark.parametrize(
    ("target_epsilon", "delta", "sample_rate", "steps"),
    [
        (8.0, 1e-5, 0.032, 15),
        (1.0, 1e-6, 0.01, 150),
        (0.1, 1e-9, 0.01, 100),
        (3.0, 1e-5, 1.0, 100),
        (50.0, 1e-5, 0.5, 20),
        (0.05, 1e-5, 0.01, 1),
        (2.0, 1e-5, 0.02, 500),
    ],
)
def test_calibration_meets_the_target_without_overshoot(target_epsilon, delta, sample_rate, steps):
    noise_multiplier = calibrate_noise_multiplier(
        target_epsilon=target_epsilon, delta=delta, sample_rate=sample_rate, steps=steps
    )
    epsilon = epsilon_spent(noise_multiplier, sample_rate, steps, delta)
    assert target_epsilon * (1 - 1e-3) <= epsilon <= target_epsilon


def test_calibration_agrees_with_dp_accounting():
    ours = calibrate_noise_multiplier(target_epsilon=4.0, delta=1e-5, sample_rate=0.1, steps=30)
    theirs = dp_accounting.calibrate_dp_mechanism(
        lambda: PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, 1e-3),
        lambda sigma: dp_accounting.SelfComposedDpEvent(step_event(sigma, 0.1), 30),
        4.0,
        1e-5,
        dp_accounting.ExplicitBracketInterval(0.5, 4.0),
    )
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_calibration_of_a_typical_run_is_quick():
    loss_distribution.epsilon_at.cache_clear()
    loss_distribution._one_step.cache_clear()
    started = time.process_time()
    calibrate_noise_multiplier(target_epsilon=8.0, delta=1e-5, sample_rate=0.03, steps=16)
    assert time.process_time() - started < 5


def test_unreachable_target_names_values_and_remedy():
    with pytest.raises(
        PrivacyError, match=r"target_epsilon=0.01.*steps=1000000.*above 10000.*Raise target_eps"
    ):
        calibrate_noise_multiplier(target_epsilon=0.01, delta=1e-9, sample_rate=1.0, steps=1_000_000)


@pytest.mark.parametrize("target_epsilon", [5000.0, 500.0])
def test_target_without_privacy_is_refused(target_epsilon):
    with pytest.raises(PrivacyError, match=r"next to no privacy.*Lower target_epsilon"):
        calibrate_noise_multiplier(target_epsilon=target_epsilon, delta=1e-5, sample_rate=0.1, steps=1)


def test_delta_that_allows_to_publish_a_sampled_record_is_refused():
    # one record in a million, at delta 1e-5, "needs" no noise at all
    with pytest.raises(PrivacyError, match=r"delta is too large.*sample_rate=1e-06.*Lower delta"):
        calibrate_noise_multiplier(target_epsilon=1.0, delta=1e-5, sample_rate=1e-6, steps=5)


def test_fewer_steps_cost_less():
    epsilons = [epsilon_spent(1.0, 0.05, steps, 1e-5) for steps in (0, 1, 5, 20, 21, 200)]
    assert epsilons[0] == 0.0
    assert epsilons == sorted(set(epsilons))


def test_equal_phases_compose_to_their_union():
    whole = epsilon_of_phases([Phase(1.0, 0.05, 30)], 1e-5)
    parts = epsilon_of_phases([Phase(1.0, 0.05, 10), Phase(1.0, 0.05, 0), Phase(1.0, 0.05, 20)], 1e-5)
    assert parts == pytest.approx(whole, rel=1e-6)


def test_mixed_phases_compose_like_dp_accounting_in_any_order():
    phases = [Phase(1.0, 0.05, 10), Phase(0.8, 0.02, 20), Phase(6.0, 1.0, 4)]
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, 1e-3)
    for phase in phases:
        accountant.compose(step_event(phase.noise_multiplier, phase.sample_rate), phase.steps)
    expected = accountant.get_epsilon(1e-5)
    assert epsilon_of_phases(phases, 1e-5) == pytest.approx(expected, rel=1e-3)
    assert epsilon_of_phases(phases[::-1], 1e-5) == pytest.approx(expected, rel=1e-3)
    assert rdp_epsilon(phases, 1e-5) >= expected


def test_no_phase_costs_nothing():
    assert epsilon_of_phases([], 1e-5) == 0.0
    assert epsilon_of_phases([Phase(1.0, 0.1, 0)], 1e-5) == 0.0
    assert rdp_epsilon([Phase(1.0, 0.1, 0)], 1e-5) == 0.0


def test_curve_rises_to_the_exact_end():
    curve = epsilon_curve(Phase(1.0, 0.05, 50), 1e-5, num_points=7)
    assert len(curve.steps) == 7
    assert curve.steps[-1] == 50
    assert list(curve.epsilons) == sorted(curve.epsilons)
    assert curve.epsilons[-1] == epsilon_spent(1.0, 0.05, 50, 1e-5)


def test_curve_of_a_short_run_has_every_step():
    assert epsilon_curve(Phase(1.0, 0.05, 5), 1e-5).steps == (1, 2, 3, 4, 5)


def test_curve_between_points_is_an_upper_bound():
    curve = epsilon_curve(Phase(1.0, 0.05, 30), 1e-5, num_points=3)
    for step in (0, 1, 9, 10, 11, 29, 30):
        assert curve.at(step) >= epsilon_spent(1.0, 0.05, step, 1e-5)
    assert curve.at(0) == 0.0


@pytest.mark.parametrize("step", [-1, 4])
def test_curve_refuses_a_step_outside(step):
    with pytest.raises(ValueError, match=f"from 0 to 3, the end of the curve, got {step}"):
        EpsilonCurve((1, 3), (0.1, 0.2)).at(step)


def test_plan_holds_what_a_plan_prints():
    spec = PrivacySpec(
        target_epsilon=8.0, delta=1e-5, sample_rate=0.03, steps=16, max_grad_norm=1.0, expected_batch_size=240
    )
    plan = plan_privacy(spec)
    assert plan.epsilon == epsilon_spent(plan.noise_multiplier, 0.03, 16, 1e-5) <= 8.0
    assert plan.rdp_epsilon >= plan.epsilon
    assert plan.curve.epsilons[-1] == plan.epsilon
    assert plan.max_tpr_at_1pct_fpr_pld <= plan.max_tpr_at_1pct_fpr
    assert plan.gdp_mu == gdp_mu([plan.phase], 1e-5) > 0
    assert plan.phase == Phase(plan.noise_multiplier, 0.03, 16)
    assert plan.accountant.startswith("dp-accounting ")


def test_plan_of_a_tiny_epsilon_is_not_refused_for_the_grid_of_the_pld():
    spec = PrivacySpec(
        target_epsilon=0.005, delta=1e-5, sample_rate=0.01, steps=30, max_grad_norm=1.0, expected_batch_size=8
    )
    plan = plan_privacy(spec)
    assert plan.rdp_epsilon is not None
    assert plan.rdp_epsilon < plan.epsilon <= 0.005


def test_plan_refuses_contradicting_accountants(monkeypatch):
    monkeypatch.setattr(accounting, "rdp_epsilon", lambda phases, delta: 1.0)
    spec = PrivacySpec(
        target_epsilon=8.0, delta=1e-5, sample_rate=0.03, steps=16, max_grad_norm=1.0, expected_batch_size=240
    )
    with pytest.raises(PrivacyError, match=r"PLD epsilon 7.9\d+ is above RDP epsilon 1,"):
        plan_privacy(spec)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_epsilon": 0.0}, "target_epsilon must be a finite number > 0, got 0.0"),
        ({"target_epsilon": math.nan}, "target_epsilon must be a finite number > 0, got nan"),
        ({"delta": 0.0}, r"delta must be in \(0, 1\), got 0.0"),
        ({"delta": 1.0}, r"delta must be in \(0, 1\), got 1.0"),
        ({"sample_rate": 0.0}, r"sample_rate must be in \(0, 1\], got 0.0"),
        ({"sample_rate": 1.5}, r"sample_rate must be in \(0, 1\], got 1.5"),
        ({"steps": 0}, "steps must be a whole number from 1 to 1000000, got 0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be a finite number > 0, got -1.0"),
        ({"expected_batch_size": 0}, "expected_batch_size must be a whole number >= 1, got 0"),
    ],
)
def test_spec_refuses_values_out_of_range(change, message):
    valid = {
        "target_epsilon": 8.0,
        "delta": 1e-5,
        "sample_rate": 0.1,
        "steps": 5,
        "max_grad_norm": 1.0,
        "expected_batch_size": 8,
    }
    with pytest.raises(ValueError, match=message):
        PrivacySpec(**{**valid, **change})


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        (Phase(0.0, 0.1, 1), "noise_multiplier must be a finite number >= 0.1, got 0.0"),
        (Phase(math.nan, 0.1, 1), "noise_multiplier must be a finite number >= 0.1, got nan"),
        (Phase(1.0, 2.0, 1), "sample_rate must be in"),
        (Phase(1.0, 0.1, -1), "steps must be a whole number from 0"),
    ],
)
def test_epsilon_refuses_values_out_of_range(phase, message):
    with pytest.raises(ValueError, match=message):
        epsilon_of_phases([phase], 1e-5)
