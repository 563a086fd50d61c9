"""``clip_and_accumulate`` against plain torch, torch.compile (on a GPU) and Opacus' way of clipping."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from securetune_kernels import clip_and_accumulate

from ._harness import (
    Context,
    Quantiles,
    Result,
    check_agreement,
    compare_memory,
    compare_times,
    package_versions,
    peak_memory_bytes,
    plain_result,
    time_paired,
)

NAME = "clip_and_accumulate"
MAX_GRAD_NORM = 1.0
TOLERANCE = 1e-5


class Shape(NamedTuple):
    """A batch of per-sample adapter gradients of a real model."""

    num_samples: int
    # rank and width of every adapter matrix, times how often it occurs
    matrices: tuple[tuple[int, int, int], ...]
    dtype: torch.dtype
    model: str

    @property
    def sizes(self) -> list[int]:
        """Number of entries of each parameter."""
        return [rank * width for rank, width, count in self.matrices for _ in range(count)]


# 30 layers: A and B of q_proj (576 -> 576) and of v_proj (576 -> 192)
SMOLLM2 = ((4, 576, 90), (4, 192, 30))
# 32 layers, all seven linear maps of Llama-3-8B at rank 16
LLAMA_8B = ((16, 4096, 32 * 9), (16, 1024, 32 * 2), (16, 14_336, 32 * 3))
CPU_SHAPES = (Shape(256, SMOLLM2, torch.float32, "SmolLM2-135M, LoRA r=4 on q and v"),)
QUICK_SHAPES = (Shape(16, SMOLLM2, torch.float32, "SmolLM2-135M, LoRA r=4 on q and v"),)
GPU_SHAPES = (
    Shape(1024, SMOLLM2, torch.float32, "SmolLM2-135M, LoRA r=4 on q and v"),
    Shape(32, LLAMA_8B, torch.bfloat16, "Llama-3-8B, LoRA r=16 on all linear maps"),
    Shape(32, LLAMA_8B, torch.float32, "Llama-3-8B, LoRA r=16 on all linear maps"),
)


def run(context: Context) -> Iterable[Result]:
    """Measure time and peak memory of each shape that suits the device."""
    shapes = QUICK_SHAPES if context.quick else GPU_SHAPES if context.device.type == "cuda" else CPU_SHAPES
    for shape in shapes:
        yield from _run_shape(shape, context)


def _run_shape(shape: Shape, context: Context) -> Iterator[Result]:
    sizes = shape.sizes
    generator = torch.Generator(context.device).manual_seed(0)
    size = (shape.num_samples, sum(sizes))
    # some samples are clipped, some are not
    grads = torch.randn(size, generator=generator, device=context.device, dtype=shape.dtype)
    lengths = torch.rand(shape.num_samples, 1, generator=generator, device=context.device) * 2
    grads.mul_((lengths * MAX_GRAD_NORM / sum(sizes) ** 0.5).to(shape.dtype))
    accumulator = torch.zeros(sum(sizes), device=context.device)

    def ours() -> Tensor:
        clip_and_accumulate(grads, accumulator, MAX_GRAD_NORM)
        return accumulator

    baselines = _baselines(shape, grads, accumulator, context)
    agreements = {}
    for name, baseline in baselines.items():
        accumulator.zero_()
        expected = baseline().clone()
        accumulator.zero_()
        agreements[name] = check_agreement(f"clipped sum, {name}", ours(), expected, tolerance=TOLERANCE)
    timings = time_paired({"ours": ours, **baselines}, context)
    ours_bytes = peak_memory_bytes(ours, context.device)
    label = f"B={size[0]} P={size[1]} ({shape.model})"
    dtype = str(shape.dtype).removeprefix("torch.")
    for name, baseline in baselines.items():
        yield compare_times(
            NAME, timings["ours"], timings[name], agreements[name], context,
            baseline_name=name, shape=label, dtype=dtype,
        )  # fmt: skip
        baseline_bytes = peak_memory_bytes(baseline, context.device)
        if ours_bytes is not None and baseline_bytes is not None:
            yield compare_memory(
                NAME, ours_bytes, baseline_bytes, agreements[name], context,
                baseline_name=name, shape=label, dtype=dtype, note="above what is live before the call",
            )  # fmt: skip
    read_bytes = 2 * grads.numel() * grads.element_size()
    rates = Quantiles(*(read_bytes / seconds / 1e9 for seconds in reversed(timings["ours"].quantiles)))
    yield plain_result(NAME, "bandwidth", "GB/s", rates, context, shape=label, dtype=dtype, note="two reads")


def _baselines(
    shape: Shape, grads: Tensor, accumulator: Tensor, context: Context
) -> dict[str, Callable[[], Tensor]]:
    def in_torch(grads: Tensor, accumulator: Tensor) -> Tensor:
        wide = grads.float()
        factors = (MAX_GRAD_NORM / torch.linalg.vector_norm(wide, dim=1)).clamp(max=1.0)
        accumulator += (factors[:, None] * wide).sum(dim=0)
        return accumulator

    version = package_versions(("torch",))["torch"]
    baselines: dict[str, Callable[[], Tensor]] = {
        f"torch {version} (eager)": lambda: in_torch(grads, accumulator)
    }
    if context.device.type == "cuda":
        compiled = torch.compile(in_torch, dynamic=False)
        baselines[f"torch {version} (compile)"] = lambda: compiled(grads, accumulator)
    if shape.dtype == torch.float32:
        # in half precision Opacus sums in that precision, which is another result
        opacus = package_versions(("opacus",)).get("opacus")
        name = "Opacus' clipping (einsum per parameter)" + (f", as in opacus {opacus}" if opacus else "")
        baselines[name] = _opacus_way(shape, grads, accumulator)
    return baselines


def _opacus_way(shape: Shape, grads: Tensor, accumulator: Tensor) -> Callable[[], Tensor]:
    """Clip one tensor per parameter: a norm of each, the norm of the norms, and an einsum for each."""
    per_parameter = [part.contiguous() for part in grads.split(shape.sizes, dim=1)]
    summed = accumulator.split(shape.sizes)

    def clip_and_add() -> Tensor:
        norms = torch.stack([part.norm(2, dim=1) for part in per_parameter], dim=1).norm(2, dim=1)
        factors = (MAX_GRAD_NORM / (norms + 1e-6)).clamp(max=1.0)
        for part, total in zip(per_parameter, summed, strict=True):
            total += torch.einsum("i,i...->...", factors, part)
        return accumulator

    return clip_and_add
