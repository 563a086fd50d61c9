"""``gaussian_noise`` (ChaCha20 and Philox) against ``torch.randn``, which is not a secure generator."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from securetune_kernels import gaussian_noise
from securetune_kernels.gaussian_noise import Generator, gaussian_noise_reference

from ._harness import (
    Context,
    DoesNotFit,
    Quantiles,
    Result,
    check_agreement,
    compare_times,
    package_versions,
    plain_result,
    time_paired,
)

NAME = "gaussian_noise"
GENERATORS: tuple[Generator, ...] = ("chacha20", "philox")
CHECKED = 1 << 16  # entries compared with the reference, which is slow
TOLERANCE = 1e-6


def run(context: Context) -> Iterable[Result]:
    """Measure adding noise to a vector of the size of an adapter, or of a model."""
    if context.device.type != "cuda":
        raise DoesNotFit("on a CPU this op is only its reference; dp_full_step measures the noise there.")
    for count in (1 << 20,) if context.quick else (1 << 22, 1 << 28):
        for generator in GENERATORS:
            yield from _run_one(count, generator, context)


def _run_one(count: int, generator: Generator, context: Context) -> Iterator[Result]:
    device = context.device
    key = torch.arange(8, dtype=torch.int32, device=device)
    step = torch.zeros(1, dtype=torch.int64, device=device)
    out = torch.zeros(count, device=device)

    def ours() -> Tensor:
        return gaussian_noise(out, key=key, step=step, stddev=1.0, generator=generator)

    def randn() -> Tensor:
        out.add_(torch.randn(count, device=device))
        return out

    ours()
    truth = torch.zeros(CHECKED, dtype=torch.float64, device=device)
    gaussian_noise_reference(truth, key=key, step=step, stddev=1.0, generator=generator)
    agreement = check_agreement("noise against float64", out[:CHECKED], truth, tolerance=TOLERANCE)
    timings = time_paired({"ours": ours, "randn": randn}, context)
    shape = f"{generator} N={count}"
    version = package_versions(("torch",))["torch"]
    yield compare_times(
        NAME, timings["ours"], timings["randn"], agreement, context,
        baseline_name=f"torch {version}: randn (not a secure generator), then add", shape=shape,
        dtype="float32",
    )  # fmt: skip
    rates = Quantiles(*(8 * count / seconds / 1e9 for seconds in reversed(timings["ours"].quantiles)))
    yield plain_result(
        NAME, "bandwidth", "GB/s", rates, context, shape=shape, dtype="float32", note="one read, one write"
    )
