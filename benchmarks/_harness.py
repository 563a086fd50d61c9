"""What every benchmark shares: the context, paired timing, peak memory, the correctness gate, results.

A benchmark is a file ``benchmarks/bench_<name>.py`` with one function::

    def run(context: Context) -> Iterable[Result]:   # a list, or a generator that yields as it goes

``python -m benchmarks NAME`` finds it by its file name and runs it. Each result is written as soon as it is
yielded, so a benchmark that is stopped half way keeps what it measured. Inside ``run``::

    if context.device.type != "cuda":
        raise DoesNotFit("needs a GPU")                     # the reason is printed, the run goes on
    agreement = check_agreement("gradients", ours(), theirs(), tolerance=1e-5)   # raises OutputsDiffer
    timings = time_paired({"ours": ours, "theirs": theirs}, context)
    yield compare_times("dp_lora_step", timings["ours"], timings["theirs"], agreement, context, ...)
    yield compare_memory("dp_lora_step", ours_bytes, theirs_bytes, agreement, context, ...)

A comparison cannot be built without an ``Agreement``, and an ``Agreement`` only comes from a check that
passed: no speed-up is ever printed for outputs that differ.
"""

from __future__ import annotations

import ctypes
import datetime
import gc
import json
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
# Written between timed calls on a GPU: larger than any L2 cache (50 MB on H100), and it takes long enough
# (a few hundred microseconds) that the launches of the timed call are queued before the GPU gets to them.
FLUSH_BYTES = 1 << 29
COMPARED_AT_ONCE = 1 << 26  # entries of two outputs, widened to float64


class DoesNotFit(Exception):
    """This machine cannot run the benchmark; the message says why."""


class OutputsDiffer(Exception):
    """The candidates compute different things, so their times must not be compared."""


@dataclass(frozen=True)
class Context:
    """Where and how thoroughly to measure."""

    device: torch.device
    quick: bool = False  # few rounds and small shapes: shows that a benchmark runs, not how fast

    @property
    def min_rounds(self) -> int:
        """How often each candidate is timed at least."""
        return 5 if self.quick else 15

    @property
    def min_time_s(self) -> float:
        """How long each candidate is timed in total at least."""
        return 0.02 if self.quick else 0.2


class Quantiles(NamedTuple):
    """The 20 %, 50 % and 80 % quantiles of repeated measurements."""

    q20: float
    q50: float
    q80: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Quantiles:
        """Take the quantiles of ``samples``, at least one number."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        cuts = statistics.quantiles(samples, n=5, method="inclusive")
        return cls(cuts[0], statistics.median(samples), cuts[3])


@dataclass(frozen=True)
class Timing:
    """Seconds of each round of one candidate; rounds of candidates timed together belong together."""

    seconds: tuple[float, ...]

    @property
    def quantiles(self) -> Quantiles:
        """Quantiles of the seconds."""
        return Quantiles.of(self.seconds)

    def ratio_to(self, other: Timing) -> Quantiles:
        """Quantiles of the ratio round by round, which drift of the machine's speed hardly touches."""
        return Quantiles.of([a / b for a, b in zip(self.seconds, other.seconds, strict=True)])


class Agreement(NamedTuple):
    """A correctness check that passed: the largest error seen and what was allowed."""

    what: str
    error: float
    tolerance: float


@dataclass(frozen=True)
class Result:
    """One line of a results file."""

    benchmark: str
    metric: str
    unit: str
    value: float
    baseline: str | None  # name and version, as in "opacus 1.6.0 (hooks)"
    baseline_value: float | None
    ratio: float | None  # value / baseline_value
    quantiles: dict[str, float]  # q20, q50, q80 of the value; ratio_q20 ... of the ratios of paired rounds
    shape: str
    dtype: str
    device: str
    versions: dict[str, str]
    commit: str
    date: str
    note: str = ""
    agreement: dict[str, float | str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the result as one JSON line."""
        return json.dumps(asdict(self), sort_keys=False, allow_nan=False)


def check_agreement(what: str, actual: Tensor, expected: Tensor, *, tolerance: float) -> Agreement:
    """Compare two outputs by their relative L2 distance.

    Args:
        what: Name of the compared quantity, for messages.
        actual: The candidate's output.
        expected: The baseline's output, or the truth; same shape.
        tolerance: Largest allowed ``||actual - expected|| / ||expected||``.

    Returns:
        The error and the tolerance, as proof for ``compare_times`` and ``compare_memory``.

    Raises:
        OutputsDiffer: If the distance is larger than ``tolerance`` or not a number.
    """
    if actual.shape != expected.shape:
        raise OutputsDiffer(f"{what}: shape {tuple(actual.shape)} against {tuple(expected.shape)}.")
    distance = size = torch.zeros((), dtype=torch.float64, device=expected.device)
    parts = (tensor.detach().flatten().split(COMPARED_AT_ONCE) for tensor in (actual, expected))
    for ours, truth in zip(*parts, strict=True):  # where they are: a model's gradient takes long to move
        distance = distance + (ours.to(distance) - truth.double()).square().sum()
        size = size + truth.double().square().sum()
    error = math.sqrt(float(distance)) / max(math.sqrt(float(size)), 1e-300) if distance else 0.0
    if not error <= tolerance:
        raise OutputsDiffer(f"{what}: relative error {error:.3g}, allowed {tolerance:.3g}.")
    return Agreement(what, error, tolerance)


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has done everything it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_paired(
    candidates: Mapping[str, Callable[[], object]],
    context: Context,
    *,
    rounds: int | None = None,
    warmup: int = 3,
    reset: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Time several callables in turn, round after round, so that they meet the same machine.

    The order rotates from round to round. On a GPU each call is bracketed by events, after a write that
    empties the L2 cache; on a CPU by ``time.perf_counter``. Garbage collection is off while timing.

    Args:
        candidates: Name to callable. Each call does the same work as the one before.
        context: Device and thoroughness.
        rounds: Number of rounds; by default enough for ``context.min_rounds`` and ``context.min_time_s``.
        warmup: Untimed calls of each candidate first (compilation, caches).
        reset: Called untimed before each timed call.

    Returns:
        Name to ``Timing``; the i-th seconds of all candidates come from the same round.
    """
    device = context.device
    for function in candidates.values():
        for _ in range(max(1, warmup)):
            if reset is not None:
                reset()
            function()
    synchronize(device)
    if rounds is None:
        started = time.perf_counter()
        for function in candidates.values():
            if reset is not None:
                reset()
            function()
        synchronize(device)
        mean_s = (time.perf_counter() - started) / len(candidates)
        rounds = min(1000, max(context.min_rounds, math.ceil(context.min_time_s / max(mean_s, 1e-6))))
    time_one = _CudaTimer(device) if device.type == "cuda" else _time_on_cpu
    names = list(candidates)
    samples: dict[str, list[Callable[[], float]]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for index in range(rounds):
            shift = index % len(names)
            for name in names[shift:] + names[:shift]:
                if reset is not None:
                    reset()
                samples[name].append(time_one(candidates[name]))
        synchronize(device)
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(read() for read in reads)) for name, reads in samples.items()}


def _time_on_cpu(function: Callable[[], object]) -> Callable[[], float]:
    started = time.perf_counter()
    function()
    elapsed = time.perf_counter() - started
    return lambda: elapsed


class _CudaTimer:
    """Times one call with events and hands back a function that reads the result after a synchronisation."""

    def __init__(self, device: torch.device) -> None:
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def __call__(self, function: Callable[[], object]) -> Callable[[], float]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.zero_()
        start.record()
        function()
        end.record()
        return lambda: start.elapsed_time(end) / 1000.0


def peak_memory_bytes(function: Callable[[], object], device: torch.device) -> int | None:
    """Measure how far memory rises during one call, above what was in use before it.

    On a GPU: torch's allocator. On a CPU: the peak of the resident set (``VmHWM``, reset through
    ``/proc/self/clear_refs`` after free heap memory was handed back to the system), so every library counts.
    Call the function once beforehand to leave out what is allocated once for good.

    Args:
        function: What to measure.
        device: Whose memory.

    Returns:
        Bytes, or ``None`` where the system cannot reset its peak (anything but Linux).
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not _reset_peak_rss():
        return None
    before = _status_bytes("VmRSS")
    function()
    return max(0, _status_bytes("VmHWM") - before)


def _reset_peak_rss() -> bool:
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name} line on this system.")


def compare_times(
    benchmark: str,
    candidate: Timing,
    baseline: Timing,
    agreement: Agreement,
    context: Context,
    *,
    baseline_name: str,
    shape: str,
    dtype: str,
    metric: str = "time",
    packages: Iterable[str] = (),
    note: str = "",
) -> Result:
    """Build the result for a candidate's time against a baseline's, both from one ``time_paired`` call.

    Args:
        benchmark: Name of the benchmark.
        candidate: Seconds of ours.
        baseline: Seconds of the baseline.
        agreement: Proof that both compute the same thing.
        context: Where it was measured.
        baseline_name: Name and version of the baseline.
        shape: As in ``"B=256 P=230400"``.
        dtype: As in ``"float32"``.
        metric: What was timed.
        packages: Distributions whose versions matter, besides torch and triton.
        note: One sentence for the reader.

    Returns:
        The result, whose ``ratio`` is median over median; the quantiles of the paired ratios stand beside it.
    """
    ratios = candidate.ratio_to(baseline)
    return _result(
        benchmark, metric, "s", candidate.quantiles, context,
        baseline_name=baseline_name, baseline_value=baseline.quantiles.q50, ratios=ratios,
        shape=shape, dtype=dtype, packages=packages, note=note, agreement=agreement,
    )  # fmt: skip


def compare_memory(
    benchmark: str,
    candidate_bytes: int,
    baseline_bytes: int,
    agreement: Agreement,
    context: Context,
    *,
    baseline_name: str,
    shape: str,
    dtype: str,
    metric: str = "peak_memory",
    packages: Iterable[str] = (),
    note: str = "",
) -> Result:
    """Build the result for a candidate's peak memory; arguments as in ``compare_times``."""
    value = float(candidate_bytes)
    return _result(
        benchmark, metric, "B", Quantiles(value, value, value), context,
        baseline_name=baseline_name, baseline_value=float(baseline_bytes), ratios=None,
        shape=shape, dtype=dtype, packages=packages, note=note, agreement=agreement,
    )  # fmt: skip


def plain_result(
    benchmark: str,
    metric: str,
    unit: str,
    quantiles: Quantiles,
    context: Context,
    *,
    shape: str,
    dtype: str,
    packages: Iterable[str] = (),
    note: str = "",
) -> Result:
    """Build a result without a baseline, such as bytes per second."""
    return _result(
        benchmark, metric, unit, quantiles, context,
        baseline_name=None, baseline_value=None, ratios=None,
        shape=shape, dtype=dtype, packages=packages, note=note, agreement=None,
    )  # fmt: skip


def _result(
    benchmark: str,
    metric: str,
    unit: str,
    quantiles: Quantiles,
    context: Context,
    *,
    baseline_name: str | None,
    baseline_value: float | None,
    ratios: Quantiles | None,
    shape: str,
    dtype: str,
    packages: Iterable[str],
    note: str,
    agreement: Agreement | None,
) -> Result:
    named = {f"ratio_{name}": value for name, value in ratios._asdict().items()} if ratios else {}
    return Result(
        benchmark=benchmark,
        metric=metric,
        unit=unit,
        value=quantiles.q50,
        baseline=baseline_name,
        baseline_value=baseline_value,
        ratio=quantiles.q50 / baseline_value if baseline_value else None,
        quantiles={**quantiles._asdict(), **named},
        shape=shape,
        dtype=dtype,
        device=device_name(context.device),
        versions=package_versions(("torch", "triton", *packages)),
        commit=current_commit(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        note=note,
        agreement=dict(agreement._asdict()) if agreement else {},
    )


def device_name(device: torch.device) -> str:
    """Name the device as a reader would: the GPU's product name, or the processor and its thread count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        names = [line for line in cpu_info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return f"CPU {model}, {torch.get_num_threads()} thread(s)"


def package_versions(distributions: Iterable[str]) -> dict[str, str]:
    """Return the versions of Python and of those ``distributions`` that are installed."""
    versions = {"python": platform.python_version()}
    for name in distributions:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return versions


def current_commit() -> str:
    """Return the commit of the working tree, with ``-dirty`` if it has changes, or ``"unknown"``."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        described = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return described.stdout.strip() or "unknown"
