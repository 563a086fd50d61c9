"""The plots of ``kernels``: a roofline and the time of each op, for each chip; predictions are marked so."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ._harness import Result
from ._roofline import H100, Chip, Work, chip_named, least_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INCH_PER_BAR = 0.28


class Call(NamedTuple):
    """One call of an op on a chip: its counts, and its time where it was measured."""

    work: Work
    predicted_s: float
    measured_s: float | None


def draw(works: Sequence[Work], results: Sequence[Result], folder: Path) -> list[Path]:
    """Draw both plots for every chip that the results come from, for an H100 where none is among them.

    Args:
        works: The calls with their bytes and operations.
        results: Lines of a results file; what belongs to no call is left out.
        folder: Where the files go; made if it is not there.

    Returns:
        The files, SVG.
    """
    folder.mkdir(parents=True, exist_ok=True)
    measured: dict[Chip, dict[tuple[str, str, str], float]] = {}
    for result in results:
        chip = chip_named(result.device)
        if chip is not None and result.unit == "s" and "predicted" not in result.metric:
            # the first line of a call is ours against its first baseline
            measured.setdefault(chip, {}).setdefault(
                (result.benchmark, result.shape, result.dtype), result.value
            )
    files: list[Path] = []
    for chip, times in (measured or {H100: {}}).items():
        calls = [
            Call(work, least_seconds(work, chip), times.get((work.op, work.shape, work.dtype)))
            for work in works
        ]
        name = re.sub(r"\W+", "_", chip.name).lower()
        files.append(_save(folder / f"kernels_{name}_roofline.svg", chip, calls, _draw_roofline, 6.0))
        height = 1.5 + INCH_PER_BAR * len(calls)
        files.append(_save(folder / f"kernels_{name}_times.svg", chip, calls, _draw_times, height))
    return files


def _save(
    path: Path,
    chip: Chip,
    calls: Sequence[Call],
    plot: Callable[[Axes, Chip, Sequence[Call]], None],
    height: float,
) -> Path:
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # the same lines give the same file
    with mpl.rc_context({"svg.hashsalt": "securetune", "svg.fonttype": "none"}):
        figure = Figure(figsize=(10.0, height), layout="constrained")
        axes = figure.subplots()
        plot(axes, chip, calls)
        axes.set_title(f"{chip.name}: {_origin(calls)}")
        FigureCanvasSVG(figure).print_svg(path, metadata={"Date": None, "Creator": None})
    # matplotlib leaves spaces at the ends of lines
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")
    return path


def _origin(calls: Sequence[Call]) -> str:
    if any(call.measured_s is not None for call in calls):
        return "measured (filled), and least times predicted from the data sheet (hollow)"
    return "predicted from the data sheet, nothing measured"


def _draw_roofline(axes: Axes, chip: Chip, calls: Sequence[Call]) -> None:
    """Operations per second over operations per byte, under the ceilings of memory and units."""
    ceilings = {"tensor": chip.tensor, "float32": chip.float32, "integer": chip.integer}
    intensities = [call.work.operations / call.work.moved_bytes for call in calls]
    low, high = min(*intensities, 0.1) / 2, max(*intensities, 1e3) * 2
    for unit, ceiling in ceilings.items():
        knee = ceiling / chip.memory
        (line,) = axes.plot(
            [low, knee, high], [low * chip.memory, ceiling, ceiling], color="0.6", linewidth=1
        )
        axes.annotate(
            {"tensor": "tensor cores, half precision"}.get(unit, unit), (high, ceiling),
            ha="right", va="bottom", color=line.get_color(), fontsize=8,
        )  # fmt: skip
    for index, op in enumerate(dict.fromkeys(call.work.op for call in calls)):
        color, marker = f"C{index % 10}", "osD^v<>ph"[index % 9]
        points = [(at, call) for at, call in zip(intensities, calls, strict=True) if call.work.op == op]
        axes.plot(
            [at for at, _ in points], [call.work.operations / call.predicted_s for _, call in points],
            color=color, marker=marker, linestyle="none", fillstyle="none", label=f"{op} (predicted)",
        )  # fmt: skip
        known = [(at, call.work.operations / call.measured_s) for at, call in points if call.measured_s]
        if known:
            axes.plot(
                [at for at, _ in known], [rate for _, rate in known],
                color=color, marker=marker, linestyle="none", label=f"{op} (measured)",
            )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    axes.set_xlabel("operations per byte")
    axes.set_ylabel("operations per second")
    axes.legend(fontsize=7, ncols=2, loc="lower right")


def _draw_times(axes: Axes, chip: Chip, calls: Sequence[Call]) -> None:
    """One bar for each call: the least time hollow, the measured time filled."""
    del chip
    places = range(len(calls))
    predicted = [1e6 * call.predicted_s for call in calls]
    axes.barh(places, predicted, height=0.8, fill=False, edgecolor="0.2", label="predicted, at least")
    known = [
        (place, 1e6 * call.measured_s) for place, call in zip(places, calls, strict=True) if call.measured_s
    ]
    if known:
        rows, widths = [place for place, _ in known], [width for _, width in known]
        axes.barh(rows, widths, height=0.4, color="C0", label="measured, median")
    labels = [f"{call.work.op}  {call.work.shape} {call.work.dtype}" for call in calls]
    axes.set_yticks(list(places), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set(xscale="log")
    axes.set_xlabel("microseconds")
    axes.legend(fontsize=8, loc="upper right")
