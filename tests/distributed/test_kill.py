"""A process killed with SIGKILL in a step: the ledger misses none, no process hangs, and the run goes on.

``SECURETUNE_KILLS=20 pytest tests/distributed/test_kill.py`` kills twenty times.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from securetune.privacy.ledger import read_ledger
from tests.distributed.launching import ROOT, environment
from tests.sample_run import make_workshop, write_recipe

STEPS = 60
TRIALS = int(os.environ.get("SECURETUNE_KILLS", "2"))
HARDEN = str(ROOT / "recipes" / "harden.py")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return make_workshop(tmp_path_factory.mktemp("workshop"))


def worker(launcher: int, rank: int) -> int:
    """Find the process of a rank below torchrun."""
    for folder in Path("/proc").iterdir():
        try:
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
            values = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if int(stat[1]) == launcher and f"RANK={rank}".encode() in values:
            return int(folder.name)
    raise LookupError(f"no rank {rank} below {launcher}")


def charged(ledger: Path) -> int:
    """Count what is on disk, without the ledger's own code: a header, then a line for each step."""
    return max(0, ledger.read_bytes().count(b'"step":')) if ledger.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(TRIALS))
def test_a_killed_run_is_whole_and_goes_on(workshop, trial):
    chance = random.Random(trial)
    folder = workshop / f"killed-{trial}"
    recipe = write_recipe(
        workshop, folder.name, privacy__steps=STEPS, training__save_every=3, evaluation__num_attacked=5
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    variables = {} if trial % 2 else {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    with subprocess.Popen(
        [*command, HARDEN, str(recipe)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(**variables),
    ) as process:
        deadline, wanted = time.monotonic() + 150, chance.randint(4, STEPS // 2)
        while charged(folder / "ledger.jsonl") < wanted:
            assert process.poll() is None, process.communicate()[0][-4000:]
            assert time.monotonic() < deadline, "training did not begin"
            time.sleep(0.002)
        os.kill(worker(process.pid, chance.randrange(2)), signal.SIGKILL)
        output, _ = process.communicate(timeout=60)  # no hang
    assert process.returncode != 0, output[-4000:]
    at_kill = charged(folder / "ledger.jsonl")
    done = sum('"hardened"' in line for line in (folder / "metrics.jsonl").read_text().splitlines())
    assert wanted <= at_kill
    assert done <= at_kill  # no step that was finished is missing
    assert not (folder / "checkpoint").exists()

    resumed = subprocess.run(
        [sys.executable, HARDEN, str(recipe), "--resume"],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
        timeout=300,
    )
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    state = read_ledger(folder / "ledger.jsonl")
    assert at_kill <= state.steps_charged == STEPS
    assert len(state.writers) == 2
    assert (folder / "published" / "model.sig").is_file()
