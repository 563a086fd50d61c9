"""``linear_grad_norms`` against plain torch, torch.compile (on a GPU) and Opacus' Gram matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from securetune_kernels import linear_grad_norms

from ._harness import Context, Result, check_agreement, package_versions
from ._layers import LayerShape, compare_layer, layer_shapes

NAME = "linear_grad_norms"
TOLERANCE = 1e-5
# Opacus rounds the Gram matrices to the inputs' dtype.
TOLERANCE_IN_HALF_PRECISION = 2e-2


def run(context: Context) -> Iterable[Result]:
    """Measure time and peak memory of each layer that suits the device."""
    for shape in layer_shapes(context):
        yield from _run_shape(shape, context)


def _run_shape(shape: LayerShape, context: Context) -> Iterator[Result]:
    a, g = shape.factors(context.device)

    def ours() -> Tensor:
        return linear_grad_norms(a, g).squared

    baselines = _baselines(a, g, context)
    agreements = {}
    for name, baseline in baselines.items():
        is_rounded = name.startswith("Opacus") and shape.dtype != torch.float32
        tolerance = TOLERANCE_IN_HALF_PRECISION if is_rounded else TOLERANCE
        agreements[name] = check_agreement(f"norms, {name}", ours(), baseline(), tolerance=tolerance)
    tokens, d, p = shape.tokens, shape.inputs, shape.outputs
    flops = shape.num_samples * min(tokens**2 * (d + p), 2 * tokens * d * p)
    yield from compare_layer(
        NAME, shape, ours, baselines, agreements, context,
        flops=flops, note="the cheaper of one triangle of the Gram matrices and the gradients themselves",
    )  # fmt: skip


def _baselines(a: Tensor, g: Tensor, context: Context) -> dict[str, Callable[[], Tensor]]:
    def in_torch(a: Tensor, g: Tensor) -> Tensor:
        wide_a, wide_g = a.float(), g.float()
        grams = torch.bmm(wide_a, wide_a.mT), torch.bmm(wide_g, wide_g.mT)
        return (grams[0] * grams[1]).sum(dim=(1, 2))

    def opacus_way() -> Tensor:
        grams = torch.einsum("nik,njk->nij", g, g), torch.einsum("nik,njk->nij", a, a)
        return torch.einsum("n...i,n...i->n", *grams).clamp(min=0)

    version = package_versions(("torch",))["torch"]
    opacus = package_versions(("opacus",)).get("opacus")
    baselines: dict[str, Callable[[], Tensor]] = {
        f"torch {version} (eager, Gram)": lambda: in_torch(a, g),
        "Opacus' ghost norms" + (f", as in opacus {opacus}" if opacus else ""): opacus_way,
    }
    if context.device.type == "cuda":
        compiled = torch.compile(in_torch, dynamic=False)
        baselines[f"torch {version} (compile, Gram)"] = lambda: compiled(a, g)
    return baselines
