"""Processes that a benchmark starts on this machine, and a count of what they say to each other."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch._C._distributed_c10d import FileStore
from torch.utils._python_dispatch import TorchDispatchMode

from ._harness import OutputsDiffer

# which of an operation's arguments holds what this process gives
_GIVEN = {
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "_allgather_base_": ("all_gather", 1),
    "allreduce_": ("all_reduce", 0),
    "reduce_": ("reduce", 0),
    "broadcast_": ("broadcast", 0),
    "monitored_barrier_": ("barrier", 0),
}


class CountCollectives(TorchDispatchMode):
    """Count every collective of ``torch.distributed`` inside a ``with``, whoever calls it.

    Attributes:
        calls: How many, by kind.
        given: Bytes that this process gave to them, padding included, by kind.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.given: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, then run."""
        if func.namespace == "c10d":
            kind, place = _GIVEN[func._schema.name.partition("::")[2]]
            given = [args[place]] if isinstance(args[place], Tensor) else args[place]
            self.calls[kind] += 1
            self.given[kind] += sum(tensor.numel() * tensor.element_size() for tensor in given)
        return func(*args, **(kwargs or {}))

    def sent(self, size: int) -> float:
        """Return the bytes that a process sends for all of it where collectives run over a ring."""
        return sum(given * ring_share(kind, size) for kind, given in self.given.items())


def ring_share(kind: str, size: int) -> float:
    """Say how many bytes a process of a ring sends for each byte that it gives to a collective."""
    return {
        "reduce_scatter": (size - 1) / size,
        "all_gather": size - 1,
        "all_reduce": 2 * (size - 1) / size,
        "reduce": (size - 1) / size,
        "broadcast": (size - 1) / size,
        "barrier": 0.0,
    }[kind]


def run_workers(worker: Callable[..., Any], size: int, device: torch.device, *arguments: Any) -> list[Any]:
    """Run a function in several new processes that form one group: gloo on the CPU, nccl on GPUs.

    Args:
        worker: A function of a module, called with ``arguments``; returns something JSON-able.
        size: How many processes. Each has one thread, and on GPUs a GPU of its own.
        device: Kind of the devices.
        *arguments: What every process gets; must be picklable.

    Returns:
        What each process returned, by rank.

    Raises:
        OutputsDiffer: If a worker did.
    """
    from torch.multiprocessing.spawn import spawn

    with tempfile.TemporaryDirectory() as folder:
        joined = (worker, size, device.type, Path(folder), arguments)
        spawn(_enter, args=joined, nprocs=size)
        outcomes = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(size)]
    for outcome in outcomes:
        if "differs" in outcome:
            raise OutputsDiffer(outcome["differs"])
    return [outcome["returned"] for outcome in outcomes]


def _enter(
    rank: int, worker: Callable[..., Any], size: int, kind: str, folder: Path, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank)}  # DeepSpeed wants it
    if kind == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if kind == "cuda":
        torch.cuda.set_device(rank)
    store = FileStore(str(folder / "store"), size)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", store=store, rank=rank, world_size=size)
    try:
        outcome = {"returned": worker(*arguments)}
    except OutputsDiffer as difference:
        outcome = {"differs": str(difference)}
    (folder / f"{rank}.json").write_text(json.dumps(outcome))
    dist.barrier()
    dist.destroy_process_group()
