"""``per_sample_sums`` for the scale of an RMSNorm against plain torch, torch.compile (GPU) and an einsum."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from securetune_kernels import Normalized, per_sample_sums

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

NAME = "per_sample_sums"
TOLERANCE = 1e-5
# Opacus' sum has the inputs' dtype.
TOLERANCE_IN_HALF_PRECISION = 2e-2
# samples, tokens, features
QUICK_SHAPES = ((2, 16, 32, torch.float32, "no model"),)
CPU_SHAPES = ((16, 128, 576, torch.float32, "SmolLM2-135M"),)
GPU_SHAPES = (
    (8, 1024, 4096, torch.bfloat16, "Llama-3-8B"),
    (32, 512, 576, torch.float32, "SmolLM2-135M"),
)


def run(context: Context) -> Iterable[Result]:
    """Measure the time of each shape that suits the device."""
    shapes = QUICK_SHAPES if context.quick else GPU_SHAPES if context.device.type == "cuda" else CPU_SHAPES
    for samples, tokens, features, dtype, model in shapes:
        generator = torch.Generator(context.device).manual_seed(0)
        g, x = (
            torch.randn(samples, tokens, features, generator=generator, device=context.device, dtype=dtype)
            for _ in range(2)
        )
        label = f"B={samples} T={tokens} d={features} ({model})"
        yield from _run_shape(g, x, label, context)


def _run_shape(g: Tensor, x: Tensor, label: str, context: Context) -> Iterator[Result]:
    inverse = x.float().square().mean(-1).add(1e-6).rsqrt()
    out = torch.zeros(len(g), g.shape[2], device=g.device)

    def ours() -> Tensor:
        per_sample_sums(g, out, normalized=Normalized(x, inverse))
        return out

    baselines = _baselines(g, x, inverse, context)
    agreements = {}
    for name, baseline in baselines.items():
        is_rounded = name.startswith("Opacus") and g.dtype != torch.float32
        tolerance = TOLERANCE_IN_HALF_PRECISION if is_rounded else TOLERANCE
        agreements[name] = check_agreement(f"sums, {name}", ours(), baseline(), tolerance=tolerance)
    timings = time_paired({"ours": ours, **baselines}, context)
    dtype = str(g.dtype).removeprefix("torch.")
    for name in baselines:
        yield compare_times(
            NAME, timings["ours"], timings[name], agreements[name], context,
            baseline_name=name, shape=label, dtype=dtype,
        )  # fmt: skip
    moved = 2 * g.numel() * g.element_size() + out.numel() * out.element_size()
    rates = Quantiles(*(moved / seconds / 1e9 for seconds in reversed(timings["ours"].quantiles)))
    yield plain_result(NAME, "bandwidth", "GB/s", rates, context, shape=label, dtype=dtype, note="one read")


def _baselines(g: Tensor, x: Tensor, inverse: Tensor, context: Context) -> dict[str, Callable[[], Tensor]]:
    def in_torch(g: Tensor, x: Tensor, inverse: Tensor) -> Tensor:
        return (g.float() * x.float() * inverse[..., None]).sum(dim=1)

    def opacus_way() -> Tensor:
        return torch.einsum("ntd,ntd->nd", (x.float() * inverse[..., None]).to(g.dtype), g)

    version = package_versions(("torch",))["torch"]
    opacus = package_versions(("opacus",)).get("opacus")
    baselines: dict[str, Callable[[], Tensor]] = {
        f"torch {version} (eager)": lambda: in_torch(g, x, inverse),
        "Opacus' einsum" + (f", as in opacus {opacus}" if opacus else ""): opacus_way,
    }
    if context.device.type == "cuda":
        compiled = torch.compile(in_torch, dynamic=False)
        baselines[f"torch {version} (compile)"] = lambda: compiled(g, x, inverse)
    return baselines
