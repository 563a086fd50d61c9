"""A process killed with SIGKILL in a step: the ledger misses none, the other says so, and the run goes on.

``SECURETUNE_KILLS=20 pytest tests/distributed/test_kill.py`` kills twenty times. The processes are started
without a launcher, which would end the survivor before it can say anything.
"""

import contextlib
import os
import random
import signal
import socket
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
LAUNCHES: tuple[dict[str, str], ...] = (
    {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    {},
    {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
        "ACCELERATE_GRADIENT_CLIPPING": "0",
        "DS_ACCELERATOR": "cpu",
    },
)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return make_workshop(tmp_path_factory.mktemp("workshop"))


def start_both(recipe: Path, **variables: str) -> list[subprocess.Popen[str]]:
    """Start two processes that know of each other as launchers tell it."""
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    places |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return [
        subprocess.Popen(
            [sys.executable, HARDEN, str(recipe)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(**variables, **places, RANK=str(rank), LOCAL_RANK=str(rank)),
        )
        for rank in range(2)
    ]


def free_port() -> int:
    """Find a port that nobody listens on, and that no connection made meanwhile can get: those are higher."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for port in random.Random(os.getpid()).sample(range(lowest // 2, lowest), 100):
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


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
    processes = start_both(recipe, **LAUNCHES[trial % len(LAUNCHES)])
    try:
        deadline, wanted = time.monotonic() + 300, chance.randint(4, STEPS // 2)
        while charged(folder / "ledger.jsonl") < wanted:
            assert all(process.poll() is None for process in processes), processes[0].communicate()[0][-4000:]
            assert time.monotonic() < deadline, "training did not begin"
            time.sleep(0.002)
        victim, survivor = chance.sample(processes, 2)
        victim.send_signal(signal.SIGKILL)
        output, _ = survivor.communicate(timeout=120)  # no hang
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert survivor.returncode == 2, output[-4000:]
    assert f"process {processes.index(survivor)} of 2 " in output, output[-4000:]
    assert "--resume" in output
    assert "Traceback" not in output
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
