"""``noisy_adamw_step`` against torch's fused AdamW plus zeroing, without noise and with ``torch.randn``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from securetune_kernels import ParameterTable, noisy_adamw_step

from ._harness import (
    Context,
    DoesNotFit,
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

NAME = "noisy_step"
LEARNING_RATE = 1e-4
TOLERANCE = 1e-5
# read and written for each entry in float32: sum, two moments and parameter
BYTES_PER_ENTRY = 32


def run(context: Context) -> Iterable[Result]:
    """Measure the end of a step for the size of an adapter, and of a model."""
    if context.device.type != "cuda":
        raise DoesNotFit("on a CPU this op is only its reference; dp_full_step measures the update there.")
    for count in (1 << 20,) if context.quick else (1 << 22, 1 << 28):
        yield from _run_one(count, context)


def _run_one(count: int, context: Context) -> Iterator[Result]:
    device = context.device
    key = torch.arange(8, dtype=torch.int32, device=device)
    step = torch.zeros(1, dtype=torch.int64, device=device)
    updates = torch.zeros(1, device=device)
    param, summed = torch.zeros(count, device=device), torch.zeros(count, device=device)
    first, second = torch.zeros_like(param), torch.zeros_like(param)
    table = ParameterTable([param])

    def ours(stddev: float = 1.0) -> Tensor:
        updates.add_(1)
        noisy_adamw_step(
            table, summed, first, second, count=updates, key=key, step=step, stddev=stddev, divisor=1.0,
            learning_rate=LEARNING_RATE,
        )  # fmt: skip
        return param

    plain_param = nn.Parameter(torch.zeros(count, device=device))
    plain_param.grad = torch.zeros_like(plain_param)
    grad = plain_param.grad
    optimizer = torch.optim.AdamW([plain_param], lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def plain() -> Tensor:
        optimizer.step()
        grad.zero_()
        return plain_param.detach()

    def with_randn() -> Tensor:
        grad.add_(torch.randn(count, device=device))
        return plain()

    summed.copy_(torch.linspace(-1, 1, count, device=device))
    grad.copy_(summed)
    agreement = check_agreement("parameters without noise", ours(0.0), plain(), tolerance=TOLERANCE)
    timings = time_paired({"ours": ours, "plain": plain, "randn": with_randn}, context)
    version = package_versions(("torch",))["torch"]
    shape = f"chacha20 P={count}"
    for name, baseline in (
        ("plain", f"torch {version}: fused AdamW and zeroing, no noise"),
        ("randn", f"torch {version}: randn, fused AdamW and zeroing"),
    ):
        yield compare_times(
            NAME, timings["ours"], timings[name], agreement, context, baseline_name=baseline, shape=shape,
            dtype="float32",
        )  # fmt: skip
    ours_bytes, randn_bytes = peak_memory_bytes(ours, device), peak_memory_bytes(with_randn, device)
    if ours_bytes is not None and randn_bytes:
        yield compare_memory(
            NAME, ours_bytes, randn_bytes, agreement, context,
            baseline_name=f"torch {version}: randn, fused AdamW and zeroing", shape=shape, dtype="float32",
        )  # fmt: skip
    moved = BYTES_PER_ENTRY * count
    rates = Quantiles(*(moved / seconds / 1e9 for seconds in reversed(timings["ours"].quantiles)))
    yield plain_result(
        NAME, "bandwidth", "GB/s", rates, context, shape=shape, dtype="float32", note="each vector once"
    )
