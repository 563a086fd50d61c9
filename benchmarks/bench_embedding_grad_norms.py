"""``embedding_grad_norms`` and ``tied_cross_products`` against plain torch, and a table for each sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from securetune_kernels import embedding_grad_norms, tied_cross_products

from ._harness import (
    Agreement,
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

NAME = "embedding_grad_norms"
TOLERANCE = 1e-5
# Where positive and negative products nearly cancel, the sum's rounding is relative to far larger parts.
CROSS_TOLERANCE = 1e-3


class Shape(NamedTuple):
    """A batch that an embedding table saw."""

    num_samples: int
    tokens: int
    features: int
    rows: int
    dtype: torch.dtype
    model: str

    @property
    def label(self) -> str:
        """Shape and origin, for the table."""
        return f"B={self.num_samples} T={self.tokens} d={self.features} V={self.rows} ({self.model})"


QUICK_SHAPES = (Shape(2, 16, 32, 50, torch.float32, "no model"),)
CPU_SHAPES = (Shape(8, 128, 576, 49_152, torch.float32, "SmolLM2-135M"),)
GPU_SHAPES = (
    Shape(8, 512, 576, 49_152, torch.bfloat16, "SmolLM2-135M"),
    Shape(8, 1024, 4096, 128_256, torch.bfloat16, "Llama-3-8B"),
)


def run(context: Context) -> Iterable[Result]:
    """Measure time and peak memory of each shape that suits the device."""
    shapes = QUICK_SHAPES if context.quick else GPU_SHAPES if context.device.type == "cuda" else CPU_SHAPES
    for shape in shapes:
        yield from _run_norms(shape, context)
        yield from _run_cross(shape, context)


def _lookups(shape: Shape, context: Context) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(context.device).manual_seed(0)
    size = (shape.num_samples, shape.tokens)
    # word frequencies fall with rank: some ids occur often
    uniform = torch.rand(size, generator=generator, device=context.device)
    ids = (shape.rows**uniform).long().clamp(max=shape.rows - 1)
    options = {"generator": generator, "device": context.device, "dtype": shape.dtype}
    return ids, torch.randn(*size, shape.features, **options)


def _run_norms(shape: Shape, context: Context) -> Iterator[Result]:
    ids, g = _lookups(shape, context)

    def in_torch() -> Tensor:
        row = torch.arange(len(ids), device=ids.device)[:, None].expand(ids.shape)
        keys, places = torch.unique(row * shape.rows + ids, return_inverse=True)
        summed = torch.zeros(len(keys), shape.features, device=g.device)
        summed.index_add_(0, places.flatten(), g.flatten(0, 1).float())
        squares = summed.square().sum(1)
        return torch.zeros(len(ids), device=g.device).index_add_(0, keys // shape.rows, squares)

    def opacus_way() -> Tensor:
        norms = [
            torch.zeros(shape.rows, shape.features, device=g.device).index_add_(0, own, part.float()).norm()
            for own, part in zip(ids, g, strict=True)
        ]
        return torch.stack(norms).square()

    version = package_versions(("torch",))["torch"]
    baselines = {f"torch {version} (unique, index_add)": in_torch, "a table for each sample": opacus_way}
    tolerances = dict.fromkeys(baselines, TOLERANCE)
    yield from _compare(
        "norms", lambda: embedding_grad_norms(ids, g), baselines, tolerances, shape, context,
        moved=g.numel() * g.element_size(),
    )  # fmt: skip


def _run_cross(shape: Shape, context: Context) -> Iterator[Result]:
    ids, lookup_g = _lookups(shape, context)
    generator = torch.Generator(context.device).manual_seed(1)
    options = {"generator": generator, "device": context.device, "dtype": shape.dtype}
    a = torch.randn(shape.num_samples, shape.tokens, shape.features, **options)
    g = torch.randn(shape.num_samples, shape.tokens, shape.rows, **options)

    def in_torch() -> Tensor:
        at_ids = g.gather(2, ids[:, None, :].expand(-1, shape.tokens, -1)).float()
        return (at_ids * torch.bmm(a.float(), lookup_g.float().mT)).sum(dim=(1, 2))

    version = package_versions(("torch",))["torch"]
    name = f"torch {version} (gather, bmm)"
    yield from _compare(
        "cross products", lambda: tied_cross_products(a, g, ids, lookup_g), {name: in_torch},
        {name: CROSS_TOLERANCE}, shape, context, moved=2 * a.numel() * a.element_size(),
    )  # fmt: skip


def _compare(
    what: str,
    ours: Callable[[], Tensor],
    baselines: Mapping[str, Callable[[], Tensor]],
    tolerances: Mapping[str, float],
    shape: Shape,
    context: Context,
    *,
    moved: int,
) -> Iterator[Result]:
    agreements: dict[str, Agreement] = {
        name: check_agreement(f"{what}, {name}", ours(), baseline(), tolerance=tolerances[name])
        for name, baseline in baselines.items()
    }
    timings = time_paired({"ours": ours, **baselines}, context)
    dtype = str(shape.dtype).removeprefix("torch.")
    ours_bytes = peak_memory_bytes(ours, context.device)
    for name, baseline in baselines.items():
        yield compare_times(
            NAME, timings["ours"], timings[name], agreements[name], context,
            baseline_name=name, shape=shape.label, dtype=dtype, metric=f"time of {what}",
        )  # fmt: skip
        baseline_bytes = peak_memory_bytes(baseline, context.device)
        if ours_bytes is not None and baseline_bytes is not None:
            yield compare_memory(
                NAME, ours_bytes, baseline_bytes, agreements[name], context,
                baseline_name=name, shape=shape.label, dtype=dtype, metric=f"peak_memory of {what}",
            )  # fmt: skip
    rates = Quantiles(*(moved / seconds / 1e9 for seconds in reversed(timings["ours"].quantiles)))
    yield plain_result(
        NAME, f"bandwidth of {what}", "GB/s", rates, context, shape=shape.label, dtype=dtype,
        note="each token's gradient or input read once",
    )  # fmt: skip
