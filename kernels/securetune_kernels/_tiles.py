"""How much of a product one program computes: counted by hand, or swept on a chip."""

import functools
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """Shape of one program's part of a product, and how it is run."""

    rows: int
    cols: int
    depth: int  # how much of the summed dimension one step loads
    num_warps: int
    num_stages: int


# What `python -m benchmarks.sweep` found best on a chip, by architecture and kernel, in the place of the
# tile that is counted beside the kernel. Every entry is compiled by tests/kernels/test_resources.py.
SWEPT: dict[str, dict[str, Tile]] = {}


def tile_of(kernel: str, dtype: torch.dtype, architecture: str, counted: Tile) -> Tile:
    """Return a kernel's tile.

    Args:
        kernel: Name of the kernel.
        dtype: Of its inputs; bfloat16 and float16 share a tile.
        architecture: Of the chip, see :func:`architecture_of`.
        counted: For chips without a sweep.

    Returns:
        The swept tile, or the counted one.
    """
    return SWEPT.get(architecture, {}).get(key_of(kernel, dtype), counted)


def key_of(kernel: str, dtype: torch.dtype) -> str:
    """Name an entry of ``SWEPT``."""
    return f"{kernel} {'float' if dtype == torch.float32 else 'half'}"


@functools.cache
def architecture_of(device: torch.device) -> str:
    """Name a chip as compilers do: ``"sm_90"``, ``"gfx942"``; ``"cpu"`` for the interpreter."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
