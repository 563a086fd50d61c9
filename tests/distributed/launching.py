"""Starts worker modules in several processes, as torchrun does."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch import distributed as dist

ROOT = Path(__file__).resolve().parents[2]


def environment(**variables: str) -> dict[str, str]:
    """Return the environment of a worker: this source tree, one thread, no GPU, no network."""
    return {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        **variables,
    }


def torchrun(processes: int, *arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run ``torchrun --nproc_per_node processes arguments`` on this machine, on a port of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*command, "--nproc_per_node", str(processes), *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment(),
        timeout=timeout,
    )


@contextlib.contextmanager
def group_of_one() -> Iterator[None]:
    """Make this process a group over gloo, which takes no launch."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def load_result(path: Path) -> dict[str, Tensor]:
    """Load the tensors that a worker of these tests saved, in their order."""
    # torch's format keeps the order of names; weights_only unpickles tensors alone, from a file made here
    return torch.load(path, weights_only=True)
