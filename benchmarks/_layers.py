"""Dense layers of real models, for the benchmarks of the ops on their inputs and output gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ._harness import (
    Agreement,
    Context,
    Quantiles,
    Result,
    compare_memory,
    compare_times,
    peak_memory_bytes,
    plain_result,
    time_paired,
)


class LayerShape(NamedTuple):
    """A batch that one dense layer saw."""

    num_samples: int
    tokens: int
    inputs: int
    outputs: int
    dtype: torch.dtype
    model: str

    @property
    def label(self) -> str:
        """Shape and origin, for the table."""
        return f"B={self.num_samples} T={self.tokens} d={self.inputs} p={self.outputs} ({self.model})"

    def factors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return random ``a [B, T, d]`` and ``g [B, T, p]``."""
        generator = torch.Generator(device).manual_seed(0)
        return tuple(
            torch.randn(
                self.num_samples, self.tokens, width, generator=generator, device=device, dtype=self.dtype
            )
            for width in (self.inputs, self.outputs)
        )  # pyright: ignore[reportReturnType]


def layer_shapes(context: Context) -> tuple[LayerShape, ...]:
    """Choose the layers that suit the device."""
    if context.quick:
        return (LayerShape(2, 32, 64, 64, torch.float32, "no model"),)
    if context.device.type != "cuda":
        return (
            LayerShape(8, 128, 576, 576, torch.float32, "SmolLM2-135M, q_proj"),
            LayerShape(8, 128, 576, 1536, torch.float32, "SmolLM2-135M, up_proj"),
        )
    return (
        LayerShape(8, 512, 4096, 4096, torch.bfloat16, "Llama-3-8B, q_proj"),
        LayerShape(8, 512, 4096, 14_336, torch.bfloat16, "Llama-3-8B, up_proj"),
        LayerShape(4, 4096, 4096, 1024, torch.bfloat16, "Llama-3-8B, k_proj"),
        LayerShape(32, 512, 576, 1536, torch.float32, "SmolLM2-135M, up_proj"),
    )


def compare_layer(
    benchmark: str,
    shape: LayerShape,
    ours: Callable[[], object],
    baselines: Mapping[str, Callable[[], object]],
    agreements: Mapping[str, Agreement],
    context: Context,
    *,
    flops: int,
    note: str,
) -> Iterator[Result]:
    """Time an op against its baselines, compare peak memory, and state TFLOP/s.

    Args:
        benchmark: Name of the benchmark.
        shape: The layer.
        ours: Runs the op.
        baselines: Name to callable.
        agreements: For each baseline, proof that it computes the same.
        context: Where to measure.
        flops: What the op computes in one call.
        note: How ``flops`` were counted.

    Yields:
        One result per comparison, and the rate.
    """
    timings = time_paired({"ours": ours, **baselines}, context)
    dtype = str(shape.dtype).removeprefix("torch.")
    ours_bytes = peak_memory_bytes(ours, context.device)
    for name, baseline in baselines.items():
        yield compare_times(
            benchmark, timings["ours"], timings[name], agreements[name], context,
            baseline_name=name, shape=shape.label, dtype=dtype,
        )  # fmt: skip
        baseline_bytes = peak_memory_bytes(baseline, context.device)
        if ours_bytes is not None and baseline_bytes is not None:
            yield compare_memory(
                benchmark, ours_bytes, baseline_bytes, agreements[name], context,
                baseline_name=name, shape=shape.label, dtype=dtype, note="above what is live before the call",
            )  # fmt: skip
    rates = Quantiles(*(flops / seconds / 1e12 for seconds in reversed(timings["ours"].quantiles)))
    yield plain_result(
        benchmark, "rate", "TFLOP/s", rates, context, shape=shape.label, dtype=dtype, note=note
    )
