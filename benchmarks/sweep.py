"""Find the best tiles of the kernels on this chip: ``python -m benchmarks.sweep [KERNEL ...] [--quick]``.

Each candidate runs on the layers that the benchmarks measure, after its result was compared with that of the
tile in use. What is printed at the end belongs into ``SWEPT`` of ``kernels/securetune_kernels/_tiles.py``;
``tests/kernels/resources.py`` then compiles it for the chip and shows what it needs.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from securetune_kernels import (
    clipped_linear_grad,
    linear_grad_norms,
    lora_per_sample_grads,
    tied_cross_products,
)
from securetune_kernels._tiles import SWEPT, Tile, architecture_of, key_of

from . import bench_lora_per_sample_grads
from ._harness import Context, OutputsDiffer, check_agreement, time_paired
from ._layers import LayerShape

TOLERANCE = 1e-5
ROWS, COLS, DEPTHS, WARPS, STAGES = (64, 128, 256), (64, 128, 256), (32, 64), (4, 8), (2, 3, 4)
QUICK = (Tile(32, 32, 32, 4, 2), Tile(64, 64, 32, 4, 2))
# what a thread can keep of a tile's float32 sums, and a chip of its steps in flight, without spilling
MOST_SUMS_PER_THREAD, MOST_SHARED_BYTES = 128, 220 * 1024


class Case(NamedTuple):
    """One kernel on one input."""

    kernel: str
    dtype: torch.dtype
    run: Callable[[], Tensor]


def cases(context: Context) -> Iterator[Case]:
    """Yield each kernel with the input it is swept on."""
    half, single = torch.bfloat16, torch.float32
    if context.quick:
        few, many = LayerShape(1, 8, 40, 40, single, ""), LayerShape(1, 40, 8, 8, single, "")
        adapters = (bench_lora_per_sample_grads.Shape(1, 1, 8, 40, 4, 40, single, ""),)
    else:
        few, many = LayerShape(8, 512, 4096, 4096, half, ""), LayerShape(4, 4096, 4096, 1024, half, "")
        adapters = bench_lora_per_sample_grads.GPU_SHAPES[:1]
    for dtype in dict.fromkeys((few.dtype, single)):
        yield from _layer_cases(few._replace(dtype=dtype), many._replace(dtype=dtype), context.device)
    for shape in adapters:
        yield _adapter_case(shape, context.device)


def _layer_cases(few: LayerShape, many: LayerShape, device: torch.device) -> Iterator[Case]:
    a, g = few.factors(device)
    yield Case("gram", few.dtype, lambda: linear_grad_norms(a, g, backend="triton").squared)
    wide_a, wide_g = many.factors(device)
    yield Case("direct", many.dtype, lambda: linear_grad_norms(wide_a, wide_g, backend="triton").squared)

    def weighted_sum() -> Tensor:
        out = torch.zeros(few.outputs, few.inputs, device=device)
        clipped_linear_grad(a, g, torch.ones(len(a), device=device), out, backend="triton")
        return out

    yield Case("sum", few.dtype, weighted_sum)
    ids = torch.arange(few.tokens, device=device).expand(len(a), -1) % few.outputs
    yield Case("cross", few.dtype, lambda: tied_cross_products(a, g, ids, a, backend="triton"))


def _adapter_case(shape: bench_lora_per_sample_grads.Shape, device: torch.device) -> Case:
    buffer = torch.zeros(shape.num_samples, shape.num_entries, device=device)
    adapters = shape.adapters(buffer)

    def gradients() -> Tensor:
        lora_per_sample_grads(adapters, scaling=1.0, backend="triton")
        return buffer.clone()

    return Case("adapter", shape.dtype, gradients)


def candidates(dtype: torch.dtype) -> Iterator[Tile]:
    """Yield the tiles whose sums fit into registers and whose steps fit into shared memory."""
    for tile in itertools.starmap(Tile, itertools.product(ROWS, COLS, DEPTHS, WARPS, STAGES)):
        sums = tile.rows * tile.cols / (32 * tile.num_warps)
        shared = (tile.rows + tile.cols) * tile.depth * dtype.itemsize * tile.num_stages
        if 8 <= sums <= MOST_SUMS_PER_THREAD and shared <= MOST_SHARED_BYTES:
            yield tile


def best_tile(case: Case, context: Context) -> Tile | None:
    """Time every candidate against the tile in use.

    Args:
        case: The kernel and its input.
        context: Where and how thoroughly.

    Returns:
        The fastest tile that is faster than the one in use, None where there is none.
    """
    from triton.runtime.errors import OutOfResources

    chip = SWEPT.setdefault(architecture_of(context.device), {})
    key = key_of(case.kernel, case.dtype)
    before, expected = chip.get(key), case.run()
    best, best_ratio = None, 1.0
    for tile in QUICK if context.quick else candidates(case.dtype):

        def with_tile(tile: Tile = tile) -> Tensor:
            return _run_with(chip, key, tile, before, case.run)

        try:
            check_agreement(key, with_tile(), expected, tolerance=TOLERANCE)
        except OutOfResources as reason:
            print(f"{key}: {tuple(tile)}: {reason}")
            continue
        except OutputsDiffer as difference:
            print(f"{key}: {tuple(tile)}: wrong, {difference}")
            continue
        timings = time_paired({"tile": with_tile, "before": case.run}, context, rounds=5)
        ratio = timings["tile"].ratio_to(timings["before"]).q50
        print(f"{key}: {tuple(tile)}: {ratio:.3f} of the time of the tile in use", flush=True)
        if ratio < best_ratio:
            best, best_ratio = tile, ratio
    return best


def _run_with(
    chip: dict[str, Tile], key: str, tile: Tile, before: Tile | None, run: Callable[[], Tensor]
) -> Tensor:
    chip[key] = tile
    try:
        return run()
    finally:
        del chip[key]
        if before is not None:
            chip[key] = before


def main(arguments: list[str] | None = None) -> None:
    """Sweep the kernels named, or all, and print the lines for ``SWEPT``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help="gram, direct, sum, cross or adapter")
    parser.add_argument("--quick", action="store_true", help="two tiles, small shapes: checks that it runs")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    context = Context(device=device, quick=options.quick)
    lines = []
    for case in cases(context):
        if not options.kernels or case.kernel in options.kernels:
            tile = best_tile(case, context)
            if tile is not None:
                lines.append(f'    "{key_of(case.kernel, case.dtype)}": {tile},')
    print(f'"{architecture_of(device)}": {{', *lines, "},", sep="\n")


if __name__ == "__main__":
    main()
