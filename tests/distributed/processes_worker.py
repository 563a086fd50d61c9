"""What :class:`Processes` and :class:`SharedLedger` do in a group, one scenario after another.

torchrun --nproc_per_node N -m tests.distributed.processes_worker OUT SCENARIO...
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist

from securetune.errors import MachineError, PrivacyError
from securetune.privacy.distributed import Processes, SharedLedger
from securetune.privacy.ledger import LedgerHeader
from securetune.privacy.noise import NoiseSource

SHORT = timedelta(seconds=5)
HEADER = LedgerHeader(
    noise_multiplier=1.0,
    sample_rate=0.05,
    max_grad_norm=1.0,
    delta=1e-5,
    expected_batch_size=64,
    planned_steps=3,
)


def agree(out: Path, processes: Processes) -> dict[str, object]:
    """Everything small that processes share."""
    key = processes.new_key()
    other = processes.new_key()
    noise = NoiseSource(key)
    uneven = [3, 0, 2, 4][: processes.size]
    whole = torch.arange(sum(uneven), dtype=torch.float32) + processes.rank
    shard = processes.sum_shards(whole.clone(), uneven)
    counts = torch.tensor([processes.rank, 1])
    processes.add(counts)
    return {
        "key": hashlib.sha256(key._secret).hexdigest(),
        "other_key": hashlib.sha256(other._secret).hexdigest(),
        "reportable": noise.reportable_epsilon,
        "repr": repr(key) + repr(noise),
        "most": processes.most(10 * processes.rank),
        "shared": processes.share({"from": processes.rank, "text": "ü"}),
        "gathered": processes.gather_shards(shard, uneven).tolist(),
        "counts": counts.tolist(),
        "first": processes.on_first(lambda: [processes.rank]),
    }


def fail(out: Path, processes: Processes) -> dict[str, object]:
    """A failure on the first process reaches all."""

    def refuse() -> None:
        raise PrivacyError("the budget is spent.")

    try:
        processes.on_first(refuse)
    except PrivacyError as error:
        return {"error": str(error)}
    return {"error": None}


def ledger(out: Path, processes: Processes) -> dict[str, object]:
    """All planned steps are charged once for all processes, and one more is refused everywhere."""
    refused = None
    counts = []
    with SharedLedger(out / "ledger.jsonl", HEADER, processes) as shared:
        try:
            while True:
                counts.append(shared.charge())
                on_disk = processes.on_first(lambda: len((out / "ledger.jsonl").read_text().splitlines()) - 1)
                assert on_disk == shared.steps_charged
        except PrivacyError as error:
            refused = str(error)
        shared.charge_release(0.5)
        state = shared.state
    return {
        "counts": counts,
        "refused": refused,
        "releases": state.release_epsilons,
        "left": state.remaining_steps,
    }


def late(out: Path, processes: Processes) -> dict[str, object]:
    """The last process does not come."""
    processes = Processes(timeout=SHORT)
    if processes.rank == processes.size - 1:
        time.sleep(2 * SHORT.total_seconds())
        return {}
    return lost(lambda: processes.keep_pace("a step is charged"))


def slow(out: Path, processes: Processes) -> dict[str, object]:
    """The first process works for much longer than the longest wait."""

    def work() -> list[int]:
        time.sleep(2 * SHORT.total_seconds())
        return [processes.rank]

    processes = Processes(timeout=SHORT)
    return {"first": processes.on_first(work), "after": processes.most(processes.rank)}


def stopped(out: Path, processes: Processes) -> dict[str, object]:
    """The first process hangs in its work, with all its threads, and comes back too late."""

    def work() -> None:
        awake = f"sleep {2 * SHORT.total_seconds()}; kill -CONT {os.getpid()}"
        subprocess.Popen(["sh", "-c", awake])
        os.kill(os.getpid(), signal.SIGSTOP)

    processes = Processes(timeout=SHORT)
    return lost(lambda: processes.on_first(work))


def gone(out: Path, processes: Processes) -> dict[str, object]:
    """The first process ends in the middle of its work."""

    def work() -> None:
        time.sleep(1.0)
        os._exit(0)

    processes = Processes()
    return lost(lambda: processes.on_first(work))


def lost(wait: Callable[[], object]) -> dict[str, object]:
    """Return what a process says that waits for nothing, and after how many seconds."""
    started = time.monotonic()
    try:
        wait()
    except MachineError as error:
        return {"error": str(error), "seconds": time.monotonic() - started}
    return {"error": None}


SCENARIOS = (agree, fail, ledger, slow, late, stopped, gone)


def main() -> None:
    """Run the scenarios, and write what each process found."""
    out, names = Path(sys.argv[1]), sys.argv[2:]
    dist.init_process_group("gloo")
    processes = Processes()
    for scenario in SCENARIOS:
        if scenario.__name__ in names:
            dist.barrier()  # new groups wait briefly for each other
            found = scenario(out, processes)
            (out / f"{scenario.__name__}-{processes.rank}.json").write_text(json.dumps(found))
    os._exit(0)  # lost groups cannot be parted from


if __name__ == "__main__":
    main()
