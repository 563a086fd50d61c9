"""``clipped_linear_grad`` against plain torch, torch.compile (on a GPU) and the einsum of Opacus."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from securetune_kernels import clipped_linear_grad

from ._harness import Context, Result, check_agreement, package_versions
from ._layers import LayerShape, compare_layer, layer_shapes

NAME = "clipped_linear_grad"
TOLERANCE = 1e-5
# Scaled output gradients are rounded to their dtype before the product, and so is the product.
TOLERANCE_IN_HALF_PRECISION = 1e-2


def run(context: Context) -> Iterable[Result]:
    """Measure time and peak memory of each layer that suits the device."""
    for shape in layer_shapes(context):
        yield from _run_shape(shape, context)


def _run_shape(shape: LayerShape, context: Context) -> Iterator[Result]:
    a, g = shape.factors(context.device)
    generator = torch.Generator(context.device).manual_seed(1)
    factors = torch.rand(shape.num_samples, generator=generator, device=context.device)
    out = torch.zeros(shape.outputs, shape.inputs, device=context.device)

    def ours() -> Tensor:
        clipped_linear_grad(a, g, factors, out)
        return out

    baselines = _baselines(a, g, factors, out, context)
    agreements = {}
    for name, baseline in baselines.items():
        out.zero_()
        expected = baseline().clone()
        out.zero_()
        is_rounded = "in the inputs' dtype" in name and shape.dtype != torch.float32
        tolerance = TOLERANCE_IN_HALF_PRECISION if is_rounded else TOLERANCE
        agreements[name] = check_agreement(f"weighted sum, {name}", ours(), expected, tolerance=tolerance)
    flops = 2 * shape.num_samples * shape.tokens * shape.inputs * shape.outputs
    yield from compare_layer(
        NAME, shape, ours, baselines, agreements, context, flops=flops, note="2 T d p for each sample"
    )


def _baselines(
    a: Tensor, g: Tensor, factors: Tensor, out: Tensor, context: Context
) -> dict[str, Callable[[], Tensor]]:
    def in_torch(a: Tensor, g: Tensor, factors: Tensor, out: Tensor) -> Tensor:
        scaled = g.float() * factors[:, None, None]
        out += scaled.flatten(0, 1).t() @ a.float().flatten(0, 1)
        return out

    def in_inputs_dtype() -> Tensor:
        scaled = g * factors[:, None, None].to(g.dtype)
        return out.add_(torch.einsum("n...i,n...j->ij", scaled, a))

    version = package_versions(("torch",))["torch"]
    baselines: dict[str, Callable[[], Tensor]] = {
        f"torch {version} (eager)": lambda: in_torch(a, g, factors, out),
        f"torch {version} (einsum in the inputs' dtype)": in_inputs_dtype,
    }
    if context.device.type == "cuda":
        compiled = torch.compile(in_torch, dynamic=False)
        baselines[f"torch {version} (compile)"] = lambda: compiled(a, g, factors, out)
    return baselines
