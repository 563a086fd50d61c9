"""What a chip allows at best, and the least time that an op's bytes and operations take on it."""

from __future__ import annotations

from typing import Literal, NamedTuple

Unit = Literal["tensor", "float32", "integer"]


class Chip(NamedTuple):
    """Ceilings of a chip, from its maker's data sheet; what a kernel can reach is a little below.

    Attributes:
        name: As a reader knows it.
        match: Part of the name that the driver gives it.
        memory: Bytes per second.
        tensor: Operations per second of the tensor cores in bfloat16 and float16, without sparsity.
        float32: Floating-point operations per second outside of the tensor cores.
        integer: 32-bit integer instructions per second; the data sheet counts two operations in each.
    """

    name: str
    match: str
    memory: float
    tensor: float
    float32: float
    integer: float


H100 = Chip("NVIDIA H100 SXM", "H100", 3.35e12, 989.4e12, 66.9e12, 33.5e12 / 2)
CHIPS = (H100, Chip("NVIDIA A100 SXM 80 GB", "A100", 2.039e12, 312e12, 19.5e12, 19.5e12 / 2))


class Work(NamedTuple):
    """One call of an op, counted.

    Attributes:
        op: The op.
        shape: As in the benchmark's table.
        dtype: Of what is read.
        moved_bytes: Read and written at least, each vector once for each sweep.
        operations: Counted on ``unit``.
        unit: What executes them.
        counted: How.
    """

    op: str
    shape: str
    dtype: str
    moved_bytes: float
    operations: float
    unit: Unit
    counted: str


def chip_named(device: str) -> Chip | None:
    """Find a chip by the name that the driver gives the device."""
    return next((chip for chip in CHIPS if chip.match in device), None)


def least_seconds(work: Work, chip: Chip) -> float:
    """Return the longer of the times for bytes and operations, as if each ran at its ceiling."""
    ceiling = {"tensor": chip.tensor, "float32": chip.float32, "integer": chip.integer}[work.unit]
    return max(work.moved_bytes / chip.memory, work.operations / ceiling)


def limit_of(work: Work, chip: Chip) -> str:
    """Say whether memory or which unit decides the least time."""
    is_memory = work.moved_bytes / chip.memory >= least_seconds(work, chip)
    return "memory" if is_memory else {"tensor": "tensor cores"}.get(work.unit, work.unit)
