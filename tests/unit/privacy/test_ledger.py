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
    epsilon_spent,
    max_true_positive_rate,
    max_true_positive_rate_of_run,
    plan_privacy,
)
from securetune.privacy.ledger import Ledger, LedgerHeader, read_ledger


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


@settings(max_examples=30, deadline=None)
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
        message = queue.get(timeout=60)
        process.join()
    assert "another run is writing to the ledger" in message


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
