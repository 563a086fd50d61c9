"""``pgd_step`` against the same step in plain torch, eager and (on a GPU) compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from securetune_kernels import pgd_step
from securetune_kernels.pgd_step import Norm

from ._harness import (
    Context,
    Quantiles,
    Result,
    check_agreement,
    compare_times,
    package_versions,
    plain_result,
    time_paired,
)

NAME = "pgd_step"
STEP_SIZE = 0.1
RADIUS = 0.3
# In bfloat16 a unit on the sphere is rounded toward zero, by at most one bit, so that the budget holds; the
# baselines round to nearest and may leave the ball.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
NORMS: tuple[Norm, ...] = ("l2_token", "linf", "l2_sample")


class Shape(NamedTuple):
    """Embeddings of one micro-batch of a real model."""

    num_samples: int
    num_tokens: int
    num_embed: int
    dtype: torch.dtype
    model: str


CPU_SHAPES = (Shape(16, 64, 576, torch.float32, "SmolLM2-135M"),)
QUICK_SHAPES = (Shape(2, 16, 576, torch.float32, "SmolLM2-135M"),)
GPU_SHAPES = (
    Shape(64, 128, 576, torch.float32, "SmolLM2-135M"),
    Shape(32, 512, 4096, torch.bfloat16, "Llama-3-8B"),
)


def label_of(shape: Shape, norm: Norm) -> str:
    """Name a case, as in the table."""
    return f"{norm} B={shape.num_samples} T={shape.num_tokens} D={shape.num_embed} ({shape.model})"


def run(context: Context) -> Iterable[Result]:
    """Measure each norm on each shape that suits the device, with the direction its attack uses."""
    shapes = QUICK_SHAPES if context.quick else GPU_SHAPES if context.device.type == "cuda" else CPU_SHAPES
    for shape in shapes:
        for norm in NORMS:
            yield from _run_norm(shape, norm, context)


def _run_norm(shape: Shape, norm: Norm, context: Context) -> Iterator[Result]:
    generator = torch.Generator(context.device).manual_seed(0)
    size = (shape.num_samples, shape.num_tokens, shape.num_embed)
    delta = torch.randn(size, generator=generator, device=context.device)
    delta *= 0.5 * RADIUS / delta.norm(dim=2, keepdim=True)
    delta = delta.to(shape.dtype)
    grad = (1e-4 * torch.randn(size, generator=generator, device=context.device)).to(shape.dtype)
    mask = torch.rand(size[:2], generator=generator, device=context.device) > 0.3

    def ours() -> Tensor:
        return pgd_step(
            delta, grad, mask, step_size=STEP_SIZE, radius=RADIUS, norm=norm,
            direction="sign" if norm == "linf" else "normalised",
        )  # fmt: skip

    version = package_versions(("torch",))["torch"]
    in_torch = _plain_step(norm)
    baselines: dict[str, Callable[[], Tensor]] = {
        f"torch {version} (eager)": lambda: in_torch(delta, grad, mask)
    }
    if context.device.type == "cuda":
        compiled = torch.compile(in_torch, dynamic=False)
        baselines[f"torch {version} (compile)"] = lambda: compiled(delta, grad, mask)
    label = label_of(shape, norm)
    dtype = str(shape.dtype).removeprefix("torch.")
    agreements = {
        name: check_agreement(f"{label}, {name}", ours(), baseline(), tolerance=TOLERANCES[shape.dtype])
        for name, baseline in baselines.items()
    }
    timings = time_paired({"ours": ours, **baselines}, context)
    for name in baselines:
        yield compare_times(
            NAME, timings["ours"], timings[name], agreements[name], context,
            baseline_name=name, shape=label, dtype=dtype,
            note="the baseline has no guard against non-finite gradients and may leave the ball by rounding",
        )  # fmt: skip
    reads = 4 if norm == "l2_sample" else 2
    moved_bytes = (reads + 1) * delta.numel() * delta.element_size()
    rates = Quantiles(*(moved_bytes / seconds / 1e9 for seconds in reversed(timings["ours"].quantiles)))
    note = f"{reads} reads and one write of each element, masked tokens included"
    yield plain_result(NAME, "bandwidth", "GB/s", rates, context, shape=label, dtype=dtype, note=note)


def _plain_step(norm: Norm) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the step as one would write it down."""
    dims = (1, 2) if norm == "l2_sample" else (2,)

    def step(delta: Tensor, grad: Tensor, mask: Tensor) -> Tensor:
        attacked = mask[:, :, None]
        slope = grad.float() * attacked
        if norm == "linf":
            moved = (delta.float() + STEP_SIZE * slope.sign()).clamp(-RADIUS, RADIUS)
            return (moved * attacked).to(delta.dtype)
        slope = slope / torch.linalg.vector_norm(slope, dim=dims, keepdim=True).clamp(min=1e-30)
        moved = (delta.float() + STEP_SIZE * slope) * attacked
        length = torch.linalg.vector_norm(moved, dim=dims, keepdim=True).clamp(min=1e-30)
        return (moved * (RADIUS / length).clamp(max=1.0)).to(delta.dtype)

    return step
