"""Training states between processes: any number and strategy restores what any other has saved; kills."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from securetune.checkpoints import generate_recipient_key, generate_signing_key
from tests.distributed import state_worker

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("states")
    generate_signing_key(made / "owner")
    generate_recipient_key(made / "recipient")
    return made


def run_module(*arguments: object) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


def launch(count: int, folder: Path, *commands: str) -> None:
    launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node", count)
    run_module(*launcher, "-m", "tests.distributed.state_worker", folder, *commands)


@pytest.fixture(scope="module")
def saved(folder):
    """States of one and of two processes, of which two processes have read all."""
    state_worker.save(folder, "one", "single", None, 7)
    launch(
        2,
        folder,
        *("save-ddp-two", "load-fsdp2-two", "load-ddp-two"),
        *("save-fsdp2-rows", "load-each-rows", "load-fsdp2-rows"),
        *("load-fsdp2-one", "load-ddp-one", "save-each-each"),
    )
    return folder


@pytest.mark.parametrize("name", ["one", "two", "rows", "each"])
@pytest.mark.parametrize("strategy", ["single", "each"])
def test_one_process_restores_what_any_has_saved(saved, name, strategy):
    state_worker.load(saved, name, strategy, None)


def test_each_process_wrote_its_part(saved):
    for name, count in (("one", 1), ("two", 2), ("rows", 2)):
        parts = sorted(path.name for path in (saved / name / "shards").iterdir())
        assert parts == [
            f"{compartment}.part-{rank:05d}.safetensors.c256"
            for compartment in ("adapter", "optimizer")
            for rank in range(count)
        ]


@pytest.mark.slow
def test_four_processes_restore_and_save(saved):
    launch(
        4, saved, "load-fsdp2-two", "load-fsdp2-rows", "load-ddp-rows", "load-fsdp2-one", "save-fsdp2-four"
    )
    state_worker.load(saved, "four", "single", None)


def check_kills(folder: Path, first: int, last: int) -> None:
    lines = run_module("tests.distributed.state_worker", folder, "kills", first, last).splitlines()
    trials = [json.loads(line) for line in lines]
    assert len(trials) == last - first
    for trial in trials:
        done, begun, found = trial["whole"]
        assert found in (done, begun), trial  # and all of it: the worker has compared every number
        assert trial["codes"][trial["victim"]] == -9, trial
        assert trial["codes"][1 - trial["victim"]] == 3, trial
        kind, message = trial["message"]
        assert kind == "MachineError", trial
        assert message.startswith(f"process {1 - trial['victim']} of 2 "), trial
        assert "start again with --resume" in message, trial
        assert trial["seconds"] < state_worker.TIMEOUT.total_seconds(), trial
    assert {trial["victim"] for trial in trials} == {0, 1}


def test_a_process_killed_in_mid_save_leaves_a_whole_state(folder):
    check_kills(folder, 0, 4)


@pytest.mark.slow
def test_twenty_kills_in_mid_save_leave_a_whole_state(folder):
    check_kills(folder, 4, 24)
