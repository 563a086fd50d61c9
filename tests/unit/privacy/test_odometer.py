"""The budget odometer: never past the target, exact about what fits, composed over changes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securetune.errors import PrivacyError
from securetune.privacy import odometer as odometer_module
from securetune.privacy.accounting import PrivacySpec, epsilon_of_phases, plan_privacy
from securetune.privacy.ledger import Ledger, LedgerHeader, read_ledger
from securetune.privacy.loss_distribution import Phase, Sampling
from securetune.privacy.odometer import BudgetOdometer
from securetune.privacy.sampling import PoissonSampler

DELTA = 1e-5
STEP = Phase(1.0, 0.05, 1)


def make(target=2.0, **options):
    return BudgetOdometer(target, DELTA, reportable_epsilon=True, **options)


def test_stops_before_the_target_and_not_a_step_too_early():
    odometer = make()
    steps = 0
    while odometer.can_afford(STEP):
        odometer.charge(STEP)
        steps += 1
    assert epsilon_of_phases([STEP._replace(steps=steps)], DELTA) == odometer.epsilon() <= 2.0
    assert epsilon_of_phases([STEP._replace(steps=steps + 1)], DELTA) > 2.0


def test_a_refused_charge_counts_nothing_and_says_what_fits():
    odometer = make()
    room = odometer.remaining_steps(STEP)
    odometer.charge(STEP._replace(steps=room - 2))
    before = odometer.epsilon()
    with pytest.raises(
        PrivacyError, match=r"3 more steps with noise_multiplier=1 .*epsilon 2 .*; 2 of them fit"
    ):
        odometer.charge(STEP._replace(steps=3))
    assert odometer.epsilon() == before
    odometer.charge(STEP._replace(steps=2))
    assert odometer.remaining_steps(STEP) == 0


def test_trap_34_noise_and_rate_changed_in_mid_run_are_composed():
    odometer = make(4.0)
    phases = [Phase(1.0, 0.05, 10), Phase(2.0, 0.05, 5), Phase(1.0, 0.02, 20)]
    for phase in phases:
        for _ in range(phase.steps):
            odometer.charge(phase._replace(steps=1))
    assert odometer.phases == tuple(phases)
    assert odometer.epsilon() == epsilon_of_phases(phases, DELTA)
    odometer.charge(Phase(1.0, 0.05, 3))  # back to the first: one phase of 13 steps
    assert odometer.phases[0] == Phase(1.0, 0.05, 13)


def test_room_for_one_mechanism_shrinks_when_another_is_charged():
    odometer, other = make(), Phase(1.0, 0.1, 1)
    room = odometer.remaining_steps(other)
    assert odometer.can_afford(other._replace(steps=room))
    odometer.charge(STEP._replace(steps=odometer.remaining_steps(STEP)))
    assert not odometer.can_afford(other._replace(steps=room))


@settings(max_examples=6)
@given(
    charges=st.lists(
        st.tuples(st.sampled_from([1.0, 3.0]), st.sampled_from([0.02, 0.1]), st.integers(0, 40)),
        max_size=6,
    )
)
def test_no_order_of_charges_passes_the_target(charges):
    odometer = make(1.5)
    accepted = []
    for noise_multiplier, sample_rate, steps in charges:
        phase = Phase(noise_multiplier, sample_rate, steps)
        affordable = odometer.can_afford(phase)
        try:
            odometer.charge(phase)
        except PrivacyError:
            assert not affordable
            assert epsilon_of_phases([*accepted, phase], DELTA) > 1.5
        else:
            assert affordable
            accepted.append(phase)
    assert epsilon_of_phases(accepted, DELTA) == pytest.approx(odometer.epsilon(), rel=1e-6)
    assert odometer.epsilon() <= 1.5


def test_every_step_stays_in_budget_where_the_accountants_grid_changes():
    odometer = make(1.0)
    step = Phase(1.0, 0.01, 1)
    room = odometer.remaining_steps(step)
    assert room > 200
    for steps in (199, 200, 201, room):
        assert epsilon_of_phases([step._replace(steps=steps)], DELTA) <= 1.0
    assert epsilon_of_phases([step._replace(steps=room + 1)], DELTA) > 1.0


def test_room_does_not_jump_over_steps_that_the_coarser_grid_reports_above_the_target():
    step, target = Phase(3.0, 0.002, 1), 0.0315
    assert epsilon_of_phases([step._replace(steps=255)], DELTA) < target  # on the finer grid
    room = make(target).remaining_steps(step)
    assert room < 200
    assert epsilon_of_phases([step._replace(steps=room)], DELTA) <= target
    assert epsilon_of_phases([step._replace(steps=room + 1)], DELTA) > target


def test_charging_step_by_step_does_not_recompute_epsilon(monkeypatch):
    odometer = make(6.0)
    calls = []
    compute = odometer_module.epsilon_of_phases
    monkeypatch.setattr(odometer_module, "epsilon_of_phases", lambda *a: (calls.append(1), compute(*a))[1])
    odometer.charge(STEP)
    after_first = len(calls)
    for _ in range(100):
        odometer.charge(STEP)
    assert len(calls) == after_first


def test_a_plan_fits_its_own_budget_exactly():
    spec = PrivacySpec(
        target_epsilon=3.0, delta=DELTA, sample_rate=0.1, steps=12, max_grad_norm=1.0, expected_batch_size=64
    )
    plan = plan_privacy(spec)
    odometer = make(3.0)
    odometer.charge(plan.phase)
    assert odometer.epsilon() == plan.epsilon
    assert not odometer.can_afford(plan.phase._replace(steps=1))


def test_trap_34_a_resumed_run_goes_on_from_its_ledger(tmp_path):
    header = LedgerHeader(
        noise_multiplier=1.0,
        sample_rate=0.05,
        max_grad_norm=1.0,
        delta=DELTA,
        expected_batch_size=64,
        planned_steps=10,
    )
    with Ledger(tmp_path / "ledger.jsonl", header) as ledger:
        for _ in range(7):
            ledger.charge()
    odometer = make(spent=[read_ledger(tmp_path / "ledger.jsonl").phase])
    sampler = PoissonSampler(1000, 0.02)
    odometer.charge(sampler.phase(0.9, 5))
    assert odometer.epsilon() == epsilon_of_phases([Phase(1.0, 0.05, 7), Phase(0.9, 0.02, 5)], DELTA)


def test_a_budget_that_is_already_passed_is_refused():
    with pytest.raises(PrivacyError, match=r"spent before costs epsilon .* above the target of 0.1"):
        make(0.1, spent=[Phase(1.0, 0.05, 50)])


def test_fixed_test_key_reports_no_epsilon_but_stops_all_the_same():
    odometer = BudgetOdometer(2.0, DELTA, reportable_epsilon=False)
    odometer.charge(STEP._replace(steps=odometer.remaining_steps(STEP)))
    assert odometer.epsilon() is None
    with pytest.raises(PrivacyError, match="0 of them fit"):
        odometer.charge(STEP)


def test_other_samplers_are_charged_and_do_not_mix():
    odometer = make(6.0)
    fixed = Phase(3.0, 0.1, 2, Sampling("fixed size", 100, 10))
    odometer.charge(fixed)
    assert odometer.epsilon() == epsilon_of_phases([fixed], DELTA)
    with pytest.raises(PrivacyError, match="Use one kind"):
        odometer.charge(STEP)
    assert odometer.phases == (fixed,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make(0.0), "target_epsilon must be > 0, got 0.0"),
        (lambda: make(float("nan")), "target_epsilon must be > 0, got nan"),
        (lambda: BudgetOdometer(1.0, 1.0, reportable_epsilon=True), r"delta must be in \(0, 1\), got 1.0"),
        (lambda: make().charge(Phase(1.0, 0.1, -1)), "steps must be a whole number from 0"),
        (lambda: make().charge(Phase(0.0, 0.1, 1)), "noise_multiplier must be"),
        (lambda: make().can_afford(Phase(1.0, 1.5, 1)), "sample_rate must be"),
    ],
)
def test_values_out_of_range_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
