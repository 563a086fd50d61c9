"""Tables of results, and that of the kernels: what was measured beside what a data sheet predicts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple, TextIO

from ._harness import Result
from ._roofline import H100, Chip, Work, chip_named, least_seconds

HEADER = (
    "op", "shape", "dtype", "time q20 / q50 / q80", "rate", "predicted", "share", "peak memory", "baseline",
    "ratio [q20, q80]",
)  # fmt: skip


class _Case(NamedTuple):
    """What a row is about."""

    op: str
    shape: str
    dtype: str
    device: str


def print_kernels(
    results: Sequence[Result], works: Sequence[Work], *, with_rest: bool = False, out: TextIO | None = None
) -> None:
    """Print one row for each case and baseline.

    Args:
        results: Of the benchmarks of the ops.
        works: What the data sheet of a result's device predicts stands beside it.
        with_rest: Also what nothing measured stands beside, as predicted for an H100.
        out: Where to; standard output when None.
    """
    by_case: dict[_Case, list[Result]] = {}
    for result in results:
        by_case.setdefault(_case_of(result), []).append(result)
    rows: list[tuple[str, ...]] = [HEADER]
    left = {(work.op, work.shape, work.dtype): work for work in works}
    for case, own in by_case.items():
        chip = chip_named(case.device)
        work = None if chip is None else left.pop((case.op, case.shape, case.dtype), None)
        rows += _measured_rows(case, own, work, chip)
    for work in left.values() if with_rest else ():
        predicted = f"{with_unit(least_seconds(work, H100), 's')} ({H100.name})"
        rows.append((work.op, work.shape, work.dtype, "not measured", "", predicted, *[""] * 4))
    align(rows, out or sys.stdout)


def _case_of(result: Result) -> _Case:
    part = result.metric.partition(" of ")[2]  # of an op that is two
    return _Case(
        f"{result.benchmark}, {part}" if part not in ("", "norms") else result.benchmark, result.shape,
        result.dtype, result.device,
    )  # fmt: skip


def _measured_rows(
    case: _Case, results: Sequence[Result], work: Work | None, chip: Chip | None
) -> list[tuple[str, ...]]:
    timed = [result for result in results if result.unit == "s"]
    memory = {result.baseline: with_unit(result.value, "B") for result in results if result.unit == "B"}
    rate = next((with_unit(r.value, r.unit) for r in results if r.baseline is None), "")
    predicted = share = ""
    if work is not None and chip is not None and timed:
        least = least_seconds(work, chip)
        predicted, share = with_unit(least, "s"), f"{100 * least / timed[0].value:.0f} %"
    rows: list[tuple[str, ...]] = []
    for result in timed:
        quantiles = " / ".join(with_unit(result.quantiles[name], "s") for name in ("q20", "q50", "q80"))
        ratio = f"{result.ratio:.3f}" if result.ratio is not None else ""
        if "ratio_q20" in result.quantiles:
            ratio += f" [{result.quantiles['ratio_q20']:.3f}, {result.quantiles['ratio_q80']:.3f}]"
        peak = memory.get(result.baseline, next(iter(memory.values()), ""))
        rows.append((*case[:3], quantiles, rate, predicted, share, peak, result.baseline or "", ratio))
    return rows


def print_table(results: Sequence[Result], out: TextIO | None = None) -> None:
    """Print one row per result."""
    header = (
        "benchmark",
        "metric",
        "shape",
        "dtype",
        "value",
        "baseline",
        "baseline value",
        "ratio [q20, q80]",
    )
    rows: list[tuple[str, ...]] = [header]
    for result in results:
        ratio = "" if result.ratio is None else f"{result.ratio:.3f}"
        if "ratio_q20" in result.quantiles:
            ratio += f" [{result.quantiles['ratio_q20']:.3f}, {result.quantiles['ratio_q80']:.3f}]"
        baseline_value = (
            "" if result.baseline_value is None else with_unit(result.baseline_value, result.unit)
        )
        rows.append(
            (
                result.benchmark,
                result.metric,
                result.shape,
                result.dtype,
                with_unit(result.value, result.unit),
                result.baseline or "",
                baseline_value,
                ratio,
            )
        )
    align(rows, out or sys.stdout)


def align(rows: Sequence[Sequence[str]], out: TextIO) -> None:
    """Print rows of cells in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(line.rstrip(), file=out)


def with_unit(value: float, unit: str) -> str:
    """Write a value as a reader would."""
    if unit == "s":
        for scale, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
            if value >= scale or name == "us":
                return f"{value / scale:.3g} {name}"
    if unit == "B":
        return f"{value / 2**20:.1f} MiB"
    return f"{value:.4g} {unit}"
