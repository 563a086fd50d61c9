"""Saves and restores training states in this process group, with numbers that are known in advance.

    torchrun --nproc_per_node N -m tests.distributed.state_worker FOLDER COMMAND...
    python -m tests.distributed.state_worker FOLDER kills FIRST LAST

A command is ``save-STRATEGY-NAME`` or ``load-STRATEGY-NAME``. ``kills`` forks two processes that save again
and again, and kills one of them with SIGKILL at a random moment; it prints a JSON line for each trial.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from securetune.checkpoints import load_identity, load_signing_key, open_vault
from securetune.checkpoints.sealing import Sealer
from securetune.errors import SecuretuneError
from securetune.privacy.distributed import DataParallel, FullySharded, Processes
from securetune.privacy.per_sample import PerSampleGradients
from securetune.privacy.reduction import Address
from securetune.training.access import Access
from securetune.training.shard_files import ShardFiles
from securetune.training.state import load_state, save_state
from securetune.training.state_shards import MOMENTS, PARAMS, state_shards

OWNER = {"subject": "hardened"}
PASSPHRASE = bytearray(b"correct horse")
TIMEOUT = timedelta(seconds=20)
LARGE = 600  # rows and columns of the model that is killed: a save then takes a while


def make_model(width: int = 5) -> nn.Module:
    """Build layers whose rows divide by no number of processes, some with fewer rows than processes."""
    return nn.Sequential(nn.Linear(width, width + 2), nn.LayerNorm(width + 2), nn.Linear(width + 2, 1))


def truth(name: str, count: int, number: int) -> Tensor:
    """Return the whole vector that a save with this number holds."""
    scale = {PARAMS: 1.0, "exp_avg": -0.5, "exp_avg_sq": 0.25, "best_params": 2.0}[name]
    return (torch.arange(count, dtype=torch.float32) * 1e-3 + number) * scale


class Setup:
    """A model, its optimizer and its shards under a strategy: ``single``, ``ddp``, ``each`` or ``fsdp2``."""

    def __init__(self, strategy: str, processes: Processes | None, *, width: int = 5) -> None:
        model = make_model(width)
        if strategy == "fsdp2":
            fully_shard(model[0])
            fully_shard(model)
        self.grads = PerSampleGradients(model)
        places = self.grads.parameters
        reduction = None
        if processes is not None:
            sharded = strategy == "fsdp2"
            reduction = FullySharded(processes, places) if sharded else DataParallel(processes)
        is_flat = strategy in ("single", "ddp")
        owned = [self.grads.flat_params] if is_flat else [place.parameter for place in places]
        starts = [0] if is_flat else [place.start for place in places]
        self.optimizer = torch.optim.AdamW(owned)
        self.places = list(zip(owned, starts, strict=True))
        shards = state_shards(self.grads, self.optimizer, reduction)
        assert shards is not None
        self.shards = shards

    def set(self, number: int) -> None:
        """Give parameters and moments the numbers of a save, without the code under test."""
        for parameter, start in self.places:
            values = {}
            for name in (PARAMS, *MOMENTS):
                part = truth(name, self.grads.num_params, number)[start : start + parameter.numel()]
                values[name] = part.view(parameter.shape)
                if isinstance(parameter, DTensor):
                    mesh, placements = parameter.device_mesh, parameter.placements
                    values[name] = distribute_tensor(values[name], mesh, placements)
            with torch.no_grad():
                parameter.copy_(values[PARAMS])
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(number)),
                **{name: values[name].clone() for name in MOMENTS},
            }

    def check(self, number: int) -> None:
        """Compare everything with the numbers of a save, bit for bit."""
        for parameter, start in self.places:
            state = self.optimizer.state[parameter]
            assert state["step"] == number
            for name, value in ((PARAMS, parameter.detach()), *((name, state[name]) for name in MOMENTS)):
                whole = value.full_tensor() if isinstance(value, DTensor) else value
                part = truth(name, self.grads.num_params, number)[start : start + whole.numel()]
                assert torch.equal(whole.flatten(), part), (name, start)


def make_access(folder: Path) -> Access:
    """Load the run's keys."""
    key = load_signing_key(folder / "owner")
    return Access((), PASSPHRASE, key, key.public_key(), None)


def save(folder: Path, name: str, strategy: str, processes: Processes | None, number: int) -> None:
    """Save a state under a strategy."""
    setup = Setup(strategy, processes)
    setup.set(number)
    is_first = processes is None or processes.rank == 0
    sealer = make_access(folder).sealer() if is_first else None
    save_state(folder / name, sealer, setup.shards, owner=OWNER, steps_done=number, steps_charged=number + 1)


def load(folder: Path, name: str, strategy: str, processes: Processes | None) -> None:
    """Restore a state under a strategy, and compare it."""
    setup = Setup(strategy, processes)
    saved = load_state(folder / name, make_access(folder), setup.shards, owner=OWNER)
    assert saved.steps_charged == saved.steps_done + 1
    setup.check(saved.steps_done)


def save_until_killed(folder: Path, rank: int, store: Path, report: int, number: int) -> None:
    """Save again and again as one of two processes; tell each save that is done."""
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
        processes = Processes(timeout=TIMEOUT)
        setup = Setup("ddp", processes, width=LARGE)
        sealer = None
        if rank == 0:
            recipient = load_identity(folder / "recipient").public_key()
            sealer = Sealer(signing_key=load_signing_key(folder / "owner"), recipients=[recipient])
        while True:
            number += 1
            setup.set(number)
            if os.write(report, f"{json.dumps(['begins', number])}\n".encode()):
                state = {"owner": OWNER, "steps_done": number, "steps_charged": number}
                save_state(folder / "state", sealer, setup.shards, **state)
            os.write(report, f"{json.dumps(['saved', number])}\n".encode())
    except SecuretuneError as error:
        os.write(report, f"{json.dumps([type(error).__name__, str(error)])}\n".encode())
        os._exit(3)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(4)


def read_number(folder: Path) -> int:
    """Open the state, compare all of it, and return which save it is; -1 where there is none yet."""
    if not (folder / "state").exists():
        return -1
    public_key = load_signing_key(folder / "owner").public_key()
    with open_vault(
        folder / "state", public_key=public_key, identity=load_identity(folder / "recipient")
    ) as vault:
        files, number = ShardFiles(vault), int(vault.metadata["steps_done"])
        assert files.names == ("exp_avg", "exp_avg_sq", "params")
        for name in files.names:
            found = files.read(name, Address(0, (files.num_params,), (1,)))
            assert torch.equal(found, truth(name, files.num_params, number)), name
    return number


def kill_one(folder: Path, trial: int) -> dict[str, object]:
    """Let two processes save, kill one of them at a random moment, and see what is left."""
    victim, delay = trial % 2, random.Random(trial).uniform(0.0, 0.4)
    before = read_number(folder)
    store, children, pipes = folder / f"store-{trial}", [], []
    for rank in range(2):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            save_until_killed(folder, rank, store, writer, before)
        os.close(writer)
        children.append(child)
        pipes.append(os.fdopen(reader))
    heard = [[json.loads(pipe.readline())] for pipe in pipes]  # both have begun
    time.sleep(delay)
    os.kill(children[victim], signal.SIGKILL)
    killed = time.monotonic()
    for pipe, lines in zip(pipes, heard, strict=True):
        lines += [json.loads(line) for line in pipe]
        pipe.close()
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    done = max([number for lines in heard for word, number in lines if word == "saved"], default=before)
    begun = max(number for lines in heard for word, number in lines if word == "begins")
    return {
        "victim": victim,
        "codes": codes,
        "seconds": time.monotonic() - killed,
        "message": heard[1 - victim][-1],
        "whole": [done, begun, read_number(folder)],
    }


def main() -> None:
    """Run the commands."""
    folder, commands = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    if commands[0] == "kills":
        for trial in range(int(commands[1]), int(commands[2])):
            print(json.dumps(kill_one(folder, trial)), flush=True)
        return
    dist.init_process_group("gloo")
    processes = Processes(timeout=timedelta(minutes=2))
    for number, command in enumerate(commands, 100):
        what, strategy, name = command.split("-")
        if what == "save":
            save(folder, name, strategy, processes, number)
        else:
            load(folder, name, strategy, processes)
    processes.keep_pace("the end")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
