"""The ledger: what a crash, a second writer or changed settings can and cannot do to the account."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securetune.errors import PrivacyError
from securetune.privacy import ledger as ledger_module
from securetune.privacy.accounting import (
    Phase,
    PrivacySpec,
    Sampling,
    epsilon_of_phases,
    epsilon_spent,
    max_true_positive_rate,
    max_true_positive_rate_of_run,
    plan_privacy,
)
from securetune.privacy.ledger import Ledger, LedgerHeader, read_ledger
from securetune.privacy.sampling import FixedSizeSampler, PoissonSampler, TruncatedPoissonSampler
from securetune.privacy.units import UserSampler


def make_header(**change):
    values = {
        "noise_multiplier": 1.0,
        "sample_rate": 0.05,
        "max_grad_norm": 1.0,
        "delta": 1e-5,
        "expected_batch_size": 64,
        "planned_steps": 10,
    }
    return LedgerHeader(**{**values, **change})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


def charge(path, steps):
    with Ledger(path, make_header()) as ledger:
        for _ in range(steps):
            ledger.charge()


def test_charged_steps_are_on_disk_when_charge_returns(path):
    with Ledger(path, make_header()) as ledger:
        for step in range(3):
            assert ledger.charge(step) == step + 1
            assert read_ledger(path).steps_charged == step + 1  # another reader, while the writer is open


def test_a_charge_survives_a_kill_right_after_it(path):
    code = (
        "import os, signal, sys\n"
        "from securetune.privacy.ledger import Ledger, LedgerHeader\n"
        "ledger = Ledger(sys.argv[1], LedgerHeader.model_validate_json(sys.argv[2]))\n"
        "ledger.charge(); ledger.charge(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    killed = subprocess.run(
        [sys.executable, "-c", code, str(path), make_header().model_dump_json()], env=environment
    )
    assert killed.returncode == -signal.SIGKILL
    with Ledger(path, make_header()) as ledger:  # the lock died with its process
        assert ledger.steps_charged == 2
        assert ledger.remaining_steps == 8


def test_charge_is_fsynced_before_it_returns(path, monkeypatch):
    synced = []
    fsync = os.fsync
    with Ledger(path, make_header()) as ledger:
        monkeypatch.setattr(os, "fsync", lambda file: (synced.append(path.read_bytes()), fsync(file)))
        ledger.charge()
        assert synced[-1] == path.read_bytes()


def test_a_failed_write_charges_nothing_and_raises(path, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    with Ledger(path, make_header()) as ledger:
        monkeypatch.setattr(ledger_module, "append_durable", full_disk)
        with pytest.raises(OSError, match="No space left"):
            ledger.charge()
        assert ledger.steps_charged == 0


def test_resumed_run_goes_on_counting(path):
    charge(path, 4)
    charge(path, 3)
    assert read_ledger(path).steps_charged == 7
    assert read_ledger(path).remaining_steps == 3


def test_a_repeated_step_counts_twice(path):
    with Ledger(path, make_header()) as ledger:
        for step in (0, 1, 1):
            ledger.charge(step)
    assert read_ledger(path).steps_charged == 3


def test_no_step_past_the_plan(path):
    charge(path, 10)
    with Ledger(path, make_header()) as ledger:
        assert ledger.remaining_steps == 0
        with pytest.raises(PrivacyError, match=r"all 10 planned steps are charged.*pass the planned epsilon"):
            ledger.charge()
    assert read_ledger(path).steps_charged == 10


@settings(max_examples=30)
@given(crashes=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 60)), max_size=6))
def test_torn_lines_never_lose_a_released_step(tmp_path_factory, crashes):
    """Charge some steps, then tear the next one's line at any byte, again and again."""
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    released = torn = 0
    for steps, kept_bytes in crashes:
        with Ledger(path, make_header(planned_steps=100)) as ledger:
            for _ in range(steps):
                ledger.charge()
            released += steps
            line = json.dumps({"step": ledger.steps_charged}).encode() + b"\n"
        if not path.read_bytes().endswith(b"\n"):  # an append ends a torn line first
            line = b"\n" + line
        with open(path, "ab") as file:
            file.write(line[:kept_bytes])
        torn += bool(line[:kept_bytes].strip())
        assert read_ledger(path).steps_charged == released + torn


@pytest.mark.parametrize(
    "garbage", [b"\0\0\0\0", b"\xff\xfe", b"[1]", b'{"release_epsilon": -1}', b'{"step":']
)
def test_a_line_that_cannot_be_read_counts_as_a_step(path, garbage):
    charge(path, 2)
    with open(path, "ab") as file:
        file.write(garbage)
    assert read_ledger(path).steps_charged == 3


@pytest.mark.parametrize("kept_bytes", [0, 1, 50])
def test_a_header_torn_at_birth_is_written_again(path, kept_bytes):
    charge(path, 0)
    path.write_bytes(path.read_bytes()[:kept_bytes])
    charge(path, 2)
    assert read_ledger(path).steps_charged == 2


def test_a_file_that_is_no_ledger_is_refused_and_left_alone(path):
    path.write_text("my diary")
    with pytest.raises(PrivacyError, match=r"is not a ledger of format securetune.ledger/1"):
        Ledger(path, make_header())
    assert path.read_text() == "my diary"


def test_unknown_version_is_refused(path):
    charge(path, 1)
    path.write_text(path.read_text().replace("securetune.ledger/1", "securetune.ledger/2"))
    with pytest.raises(PrivacyError, match=r"securetune.ledger/2.*upgrade securetune"):
        read_ledger(path)


@pytest.mark.parametrize("field", ["noise_multiplier", "sample_rate", "delta", "planned_steps"])
def test_header_with_an_impossible_value_is_refused(path, field):
    charge(path, 1)
    first, rest = path.read_text().split("\n", 1)
    path.write_text(json.dumps({**json.loads(first), field: 0}) + "\n" + rest)
    with pytest.raises(PrivacyError, match=field):
        read_ledger(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise_multiplier": 0.9}, "noise_multiplier: 1.0 in the ledger, 0.9 now"),
        ({"sample_rate": 0.1}, "sample_rate: 0.05 in the ledger, 0.1 now"),
        ({"planned_steps": 20}, "planned_steps: 10 in the ledger, 20 now"),
        ({"max_grad_norm": 2.0}, "max_grad_norm: 1.0 in the ledger, 2.0 now"),
        ({"expected_batch_size": 65}, "expected_batch_size: 64 in the ledger, 65 now"),
        ({"unit": "user"}, "unit: 'record' in the ledger, 'user' now"),
        ({"accountant": "other 1"}, "in the ledger, 'other 1' now"),
        ({"reportable_epsilon": False}, "reportable_epsilon: True in the ledger, False now"),
    ],
)
def test_other_settings_are_refused_with_both_values(path, change, message):
    charge(path, 1)
    with pytest.raises(PrivacyError, match=message):
        Ledger(path, make_header(**change))
    assert read_ledger(path).steps_charged == 1


def test_missing_ledger_is_refused(path):
    with pytest.raises(PrivacyError, match=r"there is no ledger .*ledger\.jsonl"):
        read_ledger(path)


def test_second_writer_is_refused_until_the_first_closes(path):
    first = Ledger(path, make_header())
    with pytest.raises(PrivacyError, match="another run is writing to the ledger"):
        Ledger(path, make_header())
    first.close()
    Ledger(path, make_header()).close()


def _try_to_open(path, queue):
    try:
        Ledger(path, make_header())
    except PrivacyError as error:
        queue.put(str(error))


def test_second_process_is_refused(path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with Ledger(path, make_header()):
        process = context.Process(target=_try_to_open, args=(path, queue))
        process.start()
        message = queue.get(timeout=300)
        process.join()
    assert "another run is writing to the ledger" in message


@pytest.mark.parametrize("how", ["shortened", "removed", "replaced", "written to"])
def test_file_that_changed_while_it_was_open_is_refused(path, how):
    with Ledger(path, make_header()) as ledger:
        ledger.charge()
        ledger.charge()
        first, *steps = path.read_bytes().splitlines(keepends=True)
        if how in ("removed", "replaced"):
            path.unlink()
        if how in ("shortened", "replaced"):  # an older copy put back, which knows of one step
            path.write_bytes(first + steps[0])
        if how == "written to":  # by a writer whose file system knows no locks
            path.write_bytes(first + b"".join(steps) + steps[0])
        for charge in (ledger.charge, lambda: ledger.charge_release(0.1)):
            with pytest.raises(PrivacyError, match="2 steps are charged"):
                charge()
        assert ledger.steps_charged == 2
        assert path.exists() == (how != "removed")


def test_closed_ledger_charges_nothing(path):
    ledger = Ledger(path, make_header())
    ledger.close()
    with pytest.raises(PrivacyError, match="is closed"):
        ledger.charge()
    with pytest.raises(PrivacyError, match="is closed"):
        ledger.charge_release(1.0)


def test_epsilon_is_that_of_the_charged_steps(path):
    charge(path, 4)
    assert read_ledger(path).epsilon() == epsilon_spent(1.0, 0.05, 4, 1e-5)
    with Ledger(path, make_header()) as ledger:
        ledger.charge()
        assert ledger.epsilon() == epsilon_spent(1.0, 0.05, 5, 1e-5)


def test_epsilon_of_all_planned_steps_is_the_plans(path):
    spec = PrivacySpec(
        target_epsilon=6.0, delta=1e-5, sample_rate=0.1, steps=3, max_grad_norm=1.0, expected_batch_size=64
    )
    plan = plan_privacy(spec)
    with Ledger(path, LedgerHeader.from_plan(plan, reportable_epsilon=True)) as ledger:
        while ledger.remaining_steps:
            ledger.charge()
        assert ledger.steps_charged == 3
        assert ledger.epsilon() == plan.epsilon <= 6.0


def test_releases_add_up_beside_training(path):
    charge(path, 10)
    with Ledger(path, make_header()) as ledger:
        assert ledger.charge_release(0.25) == 0.25
        assert ledger.charge_release(0.5) == 0.75
    state = read_ledger(path)
    assert state.release_epsilons == (0.25, 0.5)
    assert state.steps_charged == 10
    assert state.total_epsilon() == state.epsilon() > 0.75  # a record is trained on or held out, never both
    with Ledger(path, make_header()) as ledger:
        ledger.charge_release(100.0)
    assert read_ledger(path).total_epsilon() == 100.75


@pytest.mark.parametrize("epsilon", [0.0, -1.0, float("inf"), float("nan")])
def test_release_of_no_positive_epsilon_is_refused(path, epsilon):
    with (
        Ledger(path, make_header()) as ledger,
        pytest.raises(ValueError, match="epsilon must be a finite number > 0"),
    ):
        ledger.charge_release(epsilon)


def test_fixed_test_key_reports_no_epsilon(path):
    with Ledger(path, make_header(reportable_epsilon=False)) as ledger:
        ledger.charge()
        assert ledger.epsilon() is None
        summary = ledger.summary()
    assert summary["epsilon"] is None
    assert summary["total_epsilon"] is None
    assert summary["max_tpr_at_1pct_fpr"] is None
    assert summary["max_tpr_at_1pct_fpr_pld"] is None
    assert summary["steps_charged"] == 1


def test_summary_is_the_whole_statement_and_json(path):
    charge(path, 3)
    summary = json.loads(json.dumps(read_ledger(path).summary()))
    epsilon = epsilon_spent(1.0, 0.05, 3, 1e-5)
    assert summary == {
        **make_header().model_dump(),
        "steps_charged": 3,
        "remaining_steps": 7,
        "epsilon": epsilon,
        "release_epsilon": 0.0,
        "total_epsilon": epsilon,
        "max_tpr_at_1pct_fpr": max_true_positive_rate(epsilon, 1e-5, 0.01),
        "max_tpr_at_1pct_fpr_pld": max_true_positive_rate_of_run([Phase(1.0, 0.05, 3)], 0.01),
    }
    assert summary["unit"] == "record"
    assert summary["neighbouring_relation"] == "add or remove one"


def test_file_is_private_to_its_owner(path):
    charge(path, 1)
    assert path.stat().st_mode & 0o777 == 0o600


OTHER_SAMPLERS = [
    (TruncatedPoissonSampler(1000, 0.05, 60), "zero out one"),
    (FixedSizeSampler(1000, 50), "replace one"),
    (PoissonSampler(1000, 0.05), "add or remove one"),
]


def header_of(sampler, **change):
    statement = sampler.describe()
    return make_header(
        sampler=statement.sampler,
        neighbouring_relation=statement.neighbouring_relation,
        num_records=statement.num_units,
        max_batch_size=statement.max_batch_size,
        **change,
    )


@pytest.mark.parametrize(("sampler", "relation"), OTHER_SAMPLERS)
def test_epsilon_follows_from_the_file_alone_for_every_sampler(path, sampler, relation):
    with Ledger(path, header_of(sampler)) as ledger:
        for _ in range(4):
            ledger.charge()
    state = read_ledger(path)
    assert state.phase == sampler.phase(1.0, 4)
    assert state.epsilon() == epsilon_of_phases([sampler.phase(1.0, 4)], 1e-5)
    assert state.summary()["neighbouring_relation"] == relation
    assert state.summary()["max_tpr_at_1pct_fpr_pld"] == max_true_positive_rate_of_run([state.phase], 0.01)


def test_a_ledger_from_before_other_samplers_still_reads(path):
    path.write_text(
        '{"accountant":"dp-accounting 0.6.0, PLD","delta":1e-05,"expected_batch_size":64,'
        '"format":"securetune.ledger/1","max_grad_norm":1.0,"neighbouring_relation":"add or remove one",'
        '"noise_multiplier":1.0,"planned_steps":10,"reportable_epsilon":true,"sample_rate":0.05,'
        '"sampler":"Poisson","unit":"record"}\n{"step":0}\n{"step":1}\n'
    )
    assert read_ledger(path).epsilon() == epsilon_spent(1.0, 0.05, 2, 1e-5)
    with Ledger(path, make_header(accountant="dp-accounting 0.6.0, PLD")) as ledger:  # and goes on
        assert ledger.charge() == 3


def test_trap_22_the_private_number_of_records_is_not_in_a_poisson_ledger(path):
    with Ledger(path, header_of(PoissonSampler(987_123, 0.05))) as ledger:
        ledger.charge()
    assert "987123" not in path.read_text()
    with pytest.raises(ValueError, match="private under it"):
        make_header(num_records=987_123)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": "shuffled"}, "sampler"),
        ({"sampler": "truncated Poisson"}, "1 <= max_batch_size <= num_records"),
        ({"neighbouring_relation": "replace one"}, "must be 'add or remove one' under Poisson"),
        (
            {"sampler": "fixed size", "num_records": 1000, "max_batch_size": 50},
            "must be 'replace one' under fixed size sampling, got 'add or remove one'",
        ),
        (
            {"sampler": "fixed size", "num_records": 1000, "max_batch_size": 51},
            "got sample_rate=0.05",
        ),
    ],
)
def test_header_that_contradicts_itself_is_refused(path, change, message):
    with pytest.raises(ValueError, match=message):
        make_header(**change)
    charge(path, 1)
    first, rest = path.read_text().split("\n", 1)
    path.write_text(json.dumps({**json.loads(first), **change}) + "\n" + rest)
    with pytest.raises(PrivacyError, match=message):
        read_ledger(path)


def test_another_sampler_is_refused_with_both_values(path):
    charge(path, 1)
    with pytest.raises(PrivacyError, match=r"sampler: 'Poisson' in the ledger, 'truncated Poisson' now"):
        Ledger(path, header_of(TruncatedPoissonSampler(1000, 0.05, 60)))


SPEC = {
    "target_epsilon": 2.0,
    "delta": 1e-5,
    "sample_rate": 0.1,
    "steps": 3,
    "max_grad_norm": 1.0,
    "expected_batch_size": 64,
}


def test_header_of_a_plan_with_another_sampler():
    sampler = TruncatedPoissonSampler(640, 0.1, 90)
    plan = plan_privacy(PrivacySpec(**SPEC, sampler="truncated Poisson", num_records=640, max_batch_size=90))
    header = LedgerHeader.from_plan(plan, reportable_epsilon=True, sampler=sampler)
    assert header.sampling == Sampling("truncated Poisson", 640, 90) == sampler.sampling
    assert header.neighbouring_relation == "zero out one"


def test_header_refuses_a_sampler_that_draws_otherwise_than_planned():
    plan = plan_privacy(PrivacySpec(**SPEC))
    LedgerHeader.from_plan(plan, reportable_epsilon=True, sampler=PoissonSampler(640, 0.1))
    users = UserSampler(["a", "b"], PoissonSampler(2, 0.1), max_records_per_user=3)
    LedgerHeader.from_plan(plan, reportable_epsilon=True, unit="user", sampler=users)
    for other, unit in [
        (PoissonSampler(640, 0.2), "record"),
        (TruncatedPoissonSampler(640, 0.1, 90), "record"),
        (FixedSizeSampler(640, 64), "record"),
        (users, "record"),
        (PoissonSampler(640, 0.1), "user"),
    ]:
        with pytest.raises(PrivacyError, match="draws otherwise than planned"):
            LedgerHeader.from_plan(plan, reportable_epsilon=True, unit=unit, sampler=other)


def test_header_refuses_to_report_an_epsilon_for_a_fixed_key():
    plan = plan_privacy(PrivacySpec(**SPEC))
    fixed = PoissonSampler(640, 0.1, bytes(32))
    with pytest.raises(PrivacyError, match="fixed key, for tests"):
        LedgerHeader.from_plan(plan, reportable_epsilon=True, sampler=fixed)
    assert not LedgerHeader.from_plan(plan, reportable_epsilon=False, sampler=fixed).reportable_epsilon


def test_trap_19_steps_are_counted_as_taken_never_derived_from_the_rate(path):
    """``int(1 / q)`` is 92 for 93 batches; the ledger and the accountant see what was drawn."""
    rate = 1 / 93
    assert int(1 / rate) == 92
    sampler, steps = PoissonSampler(930, rate), 93
    header = make_header(sample_rate=sampler.sample_rate, planned_steps=steps)
    with Ledger(path, header) as ledger:
        for step in range(steps):
            sampler.draw(step)
            ledger.charge(step)
        with pytest.raises(PrivacyError, match="all 93 planned steps"):
            ledger.charge()
    assert read_ledger(path).phase == sampler.phase(1.0, 93)
