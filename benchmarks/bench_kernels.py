"""Every op in one table: the measured time, and the least time that the chip allows.

Predictions are marked so: the bytes and operations of each call over the ceilings of the chip's data sheet,
an H100's where no GPU is. No kernel reaches them, so a prediction is a bound, not a promise.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from . import (
    bench_clip_and_accumulate,
    bench_embedding_grad_norms,
    bench_lora_per_sample_grads,
    bench_per_sample_sums,
    bench_pgd_step,
)
from ._harness import Context, DoesNotFit, Quantiles, Result, device_name, plain_result
from ._layers import layer_shapes
from ._roofline import H100, Chip, Work, chip_named, least_seconds, limit_of

NAME = "kernels"
# by importance; each is a benchmark of its own
OPS = (
    "noisy_step",
    "gaussian_noise",
    "lora_per_sample_grads",
    "linear_grad_norms",
    "clipped_linear_grad",
    "clip_and_accumulate",
    "embedding_grad_norms",
    "per_sample_sums",
    "pgd_step",
)
GPU = torch.device("cuda")
# Ten double rounds of eight quarter rounds, each four additions, exclusive-ors and rotations, and sixteen
# additions at the end; a block gives eight normals. Philox: ten rounds of two products (two instructions
# each) and six other instructions; a counter gives two. Box-Muller is left out: it runs on other units.
INTEGER_PER_NORMAL = {"chacha20": (10 * 8 * 12 + 16) / 8, "philox": 10 * 10 / 2}


def run(context: Context) -> Iterable[Result]:
    """Predict every op from its bytes and operations, then measure all that this machine runs."""
    is_gpu = context.device.type == "cuda"
    chip = chip_named(device_name(context.device)) if is_gpu else H100
    predicted = [] if chip is None else [(work, least_seconds(work, chip)) for work in works()]
    for work, seconds in predicted:
        assert chip is not None
        yield _predicted(work, seconds, chip, context)
    least = {(work.op, work.shape, work.dtype): seconds for work, seconds in predicted} if is_gpu else {}
    yield from _measured(context, least)


def works() -> Iterator[Work]:
    """Count the calls that the benchmarks of the ops make on a GPU."""
    for count in (1 << 22, 1 << 28):
        integer = INTEGER_PER_NORMAL["chacha20"] * count
        yield Work(
            "noisy_step", f"chacha20 P={count}", "float32", 32 * count, integer, "integer",
            "sum, two moments and parameter once each way",
        )  # fmt: skip
        for generator, each in INTEGER_PER_NORMAL.items():
            yield Work(
                "gaussian_noise", f"{generator} N={count}", "float32", 8 * count, each * count, "integer",
                "one read, one write",
            )  # fmt: skip
    for layer in layer_shapes(Context(device=GPU)):
        size, dtype = layer.dtype.itemsize, str(layer.dtype).removeprefix("torch.")
        read = layer.num_samples * layer.tokens * (layer.inputs + layer.outputs) * size
        whole = 2 * layer.num_samples * layer.tokens * layer.inputs * layer.outputs
        triangle = layer.num_samples * layer.tokens**2 * (layer.inputs + layer.outputs)
        unit = "float32" if layer.dtype == torch.float32 else "tensor"
        yield Work(
            "linear_grad_norms", layer.label, dtype, read, min(whole, triangle), unit,
            "the cheaper of one triangle of the Gram matrices and the gradients themselves",
        )  # fmt: skip
        written = 8 * layer.inputs * layer.outputs
        yield Work("clipped_linear_grad", layer.label, dtype, read + written, whole, unit, "2 T d p each")
    yield from _works_on_rows()


def _works_on_rows() -> Iterator[Work]:
    for lora in bench_lora_per_sample_grads.GPU_SHAPES:
        tokens = lora.num_adapters * lora.num_samples * lora.tokens
        read = tokens * (lora.inputs + lora.outputs + 2 * lora.rank) * lora.dtype.itemsize
        yield Work(
            "lora_per_sample_grads", lora.label, str(lora.dtype).removeprefix("torch."),
            read + 4 * lora.num_samples * lora.num_entries,
            2 * tokens * lora.rank * (lora.inputs + lora.outputs),
            "float32" if lora.dtype == torch.float32 else "tensor",
            "inputs read once, gradients written once",
        )  # fmt: skip
    for table in bench_embedding_grad_norms.GPU_SHAPES:
        entries = table.num_samples * table.tokens * table.features
        yield Work(
            "embedding_grad_norms", table.label, str(table.dtype).removeprefix("torch."),
            entries * table.dtype.itemsize, 3 * entries, "float32", "one read",
        )  # fmt: skip
    for samples, tokens, features, dtype, model in bench_per_sample_sums.GPU_SHAPES:
        entries = samples * tokens * features
        yield Work(
            "per_sample_sums", f"B={samples} T={tokens} d={features} ({model})",
            str(dtype).removeprefix("torch."),
            2 * entries * dtype.itemsize + 4 * samples * (tokens + features), 3 * entries, "float32",
            "one read",
        )  # fmt: skip
    for batch in bench_clip_and_accumulate.GPU_SHAPES:
        entries = batch.num_samples * sum(batch.sizes)
        yield Work(
            "clip_and_accumulate", f"B={batch.num_samples} P={sum(batch.sizes)} ({batch.model})",
            str(batch.dtype).removeprefix("torch."), 2 * entries * batch.dtype.itemsize, 4 * entries,
            "float32", "two reads",
        )  # fmt: skip
    for shape in bench_pgd_step.GPU_SHAPES:
        entries = shape.num_samples * shape.num_tokens * shape.num_embed
        dtype = str(shape.dtype).removeprefix("torch.")
        for norm in bench_pgd_step.NORMS:
            sweeps = 5 if norm == "l2_sample" else 3
            label = bench_pgd_step.label_of(shape, norm)
            moved = sweeps * entries * shape.dtype.itemsize
            yield Work("pgd_step", label, dtype, moved, 8 * entries, "float32", f"{sweeps} vectors")


def _predicted(work: Work, seconds: float, chip: Chip, context: Context) -> Result:
    result = plain_result(
        NAME, f"{work.op}: least time (predicted)", "s", Quantiles(seconds, seconds, seconds), context,
        shape=work.shape, dtype=work.dtype,
        note=f"not measured: {work.counted}; limited by {limit_of(work, chip)}",
    )  # fmt: skip
    return replace(result, device=f"{chip.name} (data sheet)")


def _measured(context: Context, least: dict[tuple[str, str, str], float]) -> Iterator[Result]:
    for op in OPS:
        module = importlib.import_module(f"{__package__}.bench_{op}")
        results: Iterator[Result] = iter(module.run(context))
        with contextlib.suppress(DoesNotFit):  # a CPU has references only
            yield from _with_shares(op, results, context, least)


def _with_shares(
    op: str, results: Iterator[Result], context: Context, least: dict[tuple[str, str, str], float]
) -> Iterator[Result]:
    for result in results:
        yield result
        bound = least.pop((op, result.shape, result.dtype), None) if result.unit == "s" else None
        if bound is not None:
            named = ("q80", "q50", "q20")
            shares = Quantiles(*(100 * bound / result.quantiles[name] for name in named))
            yield plain_result(
                    NAME, f"{op}: share of the roofline", "%", shares, context, shape=result.shape,
                    dtype=result.dtype, note="least time over measured time",
                )  # fmt: skip
