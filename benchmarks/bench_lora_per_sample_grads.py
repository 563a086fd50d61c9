"""``lora_per_sample_grads`` against batched products and torch.compile (on a GPU), and Opacus' einsum."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from securetune_kernels import Adapter, lora_per_sample_grads

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

NAME = "lora_per_sample_grads"
SCALING = 2.0
TOLERANCE = 1e-5
# Opacus' gradients have the inputs' dtype.
TOLERANCE_IN_HALF_PRECISION = 1e-2


class Shape(NamedTuple):
    """Adapters of one shape in a batch."""

    num_adapters: int
    num_samples: int
    tokens: int
    inputs: int
    rank: int
    outputs: int
    dtype: torch.dtype
    model: str

    @property
    def label(self) -> str:
        """Shape and origin, for the table."""
        return (
            f"{self.num_adapters} of B={self.num_samples} T={self.tokens} d={self.inputs} r={self.rank} "
            f"p={self.outputs} ({self.model})"
        )

    @property
    def num_entries(self) -> int:
        """Entries of one sample's gradients."""
        return self.num_adapters * self.rank * (self.inputs + self.outputs)

    def adapters(self, buffer: Tensor) -> list[Adapter]:
        """Return random adapters whose gradients are columns of ``buffer [B, P]``."""
        generator = torch.Generator(buffer.device).manual_seed(0)
        made: list[Adapter] = []
        columns = iter(
            buffer.split([self.rank * self.inputs, self.outputs * self.rank] * self.num_adapters, 1)
        )
        for grad_a, grad_b in zip(columns, columns, strict=True):
            x, h, g, g_low = (
                torch.randn(
                    self.num_samples, self.tokens, width,
                    generator=generator, device=buffer.device, dtype=self.dtype,
                )
                for width in (self.inputs, self.rank, self.outputs, self.rank)
            )  # fmt: skip
            places = grad_a.unflatten(1, (self.rank, -1)), grad_b.unflatten(1, (self.outputs, -1))
            made.append(Adapter(x, h, g, g_low, *places))
        return made


QUICK_SHAPES = (Shape(2, 2, 32, 64, 4, 64, torch.float32, "no model"),)
CPU_SHAPES = (Shape(2, 16, 128, 576, 4, 576, torch.float32, "SmolLM2-135M, q_proj"),)
GPU_SHAPES = (
    Shape(1, 8, 1024, 4096, 16, 4096, torch.bfloat16, "Llama-3-8B, one q_proj"),
    Shape(8, 8, 1024, 4096, 16, 4096, torch.bfloat16, "Llama-3-8B, q_proj of eight layers"),
    Shape(1, 8, 1024, 4096, 16, 14_336, torch.bfloat16, "Llama-3-8B, one up_proj"),
    Shape(8, 32, 512, 576, 4, 576, torch.float32, "SmolLM2-135M, q_proj of eight layers"),
)


def run(context: Context) -> Iterable[Result]:
    """Measure time and peak memory of each shape that suits the device."""
    shapes = QUICK_SHAPES if context.quick else GPU_SHAPES if context.device.type == "cuda" else CPU_SHAPES
    for shape in shapes:
        yield from _run_shape(shape, context)


def _run_shape(shape: Shape, context: Context) -> Iterator[Result]:
    buffer = torch.zeros(shape.num_samples, shape.num_entries, device=context.device)
    adapters = shape.adapters(buffer)
    norms = torch.zeros(shape.num_samples, shape.num_adapters, 2, device=context.device)

    def ours() -> Tensor:
        lora_per_sample_grads(adapters, scaling=SCALING, squared_norms=norms)
        return buffer

    baselines = _baselines(adapters, buffer, context)
    agreements = {}
    for name, baseline in baselines.items():
        expected = baseline().clone()
        buffer.zero_()
        is_rounded = name.startswith("Opacus") and shape.dtype != torch.float32
        tolerance = TOLERANCE_IN_HALF_PRECISION if is_rounded else TOLERANCE
        agreements[name] = check_agreement(f"rows, {name}", ours(), expected, tolerance=tolerance)
    timings = time_paired({"ours": ours, **baselines}, context)
    dtype = str(shape.dtype).removeprefix("torch.")
    ours_bytes = peak_memory_bytes(ours, context.device)
    for name, baseline in baselines.items():
        yield compare_times(
            NAME, timings["ours"], timings[name], agreements[name], context,
            baseline_name=name, shape=shape.label, dtype=dtype, note="gradients and their squared norms",
        )  # fmt: skip
        baseline_bytes = peak_memory_bytes(baseline, context.device)
        if ours_bytes is not None and baseline_bytes is not None:
            yield compare_memory(
                NAME, ours_bytes, baseline_bytes, agreements[name], context,
                baseline_name=name, shape=shape.label, dtype=dtype, note="above what is live before the call",
            )  # fmt: skip
    read = sum(part.numel() * part.element_size() for adapter in adapters for part in adapter[:4])
    moved = read + buffer.numel() * buffer.element_size()
    rates = Quantiles(*(moved / seconds / 1e9 for seconds in reversed(timings["ours"].quantiles)))
    yield plain_result(
        NAME, "bandwidth", "GB/s", rates, context, shape=shape.label, dtype=dtype,
        note="each input read once, each gradient written once",
    )  # fmt: skip


def _baselines(adapters: list[Adapter], buffer: Tensor, context: Context) -> dict[str, Callable[[], Tensor]]:
    def in_torch() -> Tensor:
        for one in adapters:
            one.grad_a.copy_(torch.bmm(one.g_low.float().mT, one.x.float()))
            one.grad_b.copy_(torch.bmm(one.g.float().mT, one.h.float()).mul_(SCALING))
        torch.linalg.vector_norm(buffer, dim=1)
        return buffer

    def opacus_way() -> Tensor:
        for one in adapters:
            one.grad_a.copy_(torch.einsum("n...i,n...j->nij", one.g_low, one.x))
            one.grad_b.copy_(torch.einsum("n...i,n...j->nij", SCALING * one.g, one.h))
        torch.linalg.vector_norm(buffer, dim=1)
        return buffer

    version = package_versions(("torch",))["torch"]
    opacus = package_versions(("opacus",)).get("opacus")
    baselines: dict[str, Callable[[], Tensor]] = {
        f"torch {version} (eager)": in_torch,
        "Opacus' einsum per layer" + (f", as in opacus {opacus}" if opacus else ""): opacus_way,
    }
    if context.device.type == "cuda":
        baselines[f"torch {version} (compile)"] = torch.compile(in_torch, dynamic=False)
    return baselines
