"""Numbers as a person reads them, each tied to the place in ``report.json`` it comes from."""

import math
from collections.abc import Callable
from typing import Any, Final

from markupsafe import Markup

__all__ = ["FORMATS", "figure", "metric_format", "resolve", "threshold_format"]


def resolve(document: Any, path: str) -> Any:
    """Look up a value by its dotted path.

    Args:
        document: Parsed JSON.
        path: Keys and list indices, such as ``evidence.3.interval.low``.

    Returns:
        The value found.
    """
    value = document
    for part in path.split("."):
        value = value[int(part)] if isinstance(value, list) else value[part]
    return value


def figure(document: Any, path: str, kind: str) -> Markup:
    """Write one number of a report.

    Guarantees:
        The number comes from ``document`` at ``path``, and the element says so: anyone can compare.

    Args:
        document: The parsed ``report.json``.
        path: Where the number is.
        kind: A key of ``FORMATS``.

    Returns:
        A ``data`` element with the exact value beside the rounded one.
    """
    value = resolve(document, path)
    return Markup('<data class="figure" data-metric="{}" data-format="{}" value="{}">{}</data>').format(
        path, kind, repr(value), FORMATS[kind](value)
    )


def metric_format(metric: str) -> str:
    """Say which format a metric is written in.

    Args:
        metric: A metric name.

    Returns:
        A key of ``FORMATS``.
    """
    if metric.endswith("loss_difference") or metric == "memorisation_gap":
        return "signed"
    if metric.endswith("_difference"):
        return "points"
    if metric.startswith("accuracy") or "tpr" in metric:
        return "percent"
    return "epsilon" if metric == "epsilon" else "decimal"


def threshold_format(metric: str) -> str:
    """Say which format a threshold of a metric is written in: as short as a person would type it.

    Args:
        metric: A metric name.

    Returns:
        A key of ``FORMATS``.
    """
    kind = metric_format(metric)
    return {"points": "points_bound", "percent": "percent"}.get(kind, "plain")


def _percent(value: float) -> str:
    for digits in range(1, 6):
        text = f"{100 * value:.{digits}f}"
        if value in (0.0, 1.0) or (float(text) not in (0.0, 100.0)):
            return f"{text} %"
    return f"{100 * value:g} %"


def _points(value: float) -> str:
    return f"{_minus(f'{100 * value:+.1f}')} points"


def _signed(value: float) -> str:
    return _minus(f"{value:+.3f}")


def _epsilon(value: float) -> str:
    return f"{math.ceil(100 * value - 1e-9) / 100:.2f}"  # rounded up: never shown below what was spent


def _seconds(value: float) -> str:
    if value < 10:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def _small(value: float) -> str:
    mantissa, _, exponent = f"{value:.3g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


FORMATS: Final[dict[str, Callable[[Any], str]]] = {
    "percent": _percent,
    "percent_low": lambda value: _percent(value).removesuffix(" %"),
    "points": _points,
    "points_bound": lambda value: f"{_minus(f'{100 * value:g}')} points",
    "points_low": lambda value: _points(value).removesuffix(" points"),
    "signed": _signed,
    "decimal": lambda value: _minus(f"{value:.3f}"),
    "epsilon": _epsilon,
    "small": _small,
    "plain": lambda value: f"{value:.4g}",
    "count": lambda value: f"{round(value):,}",
    "seconds": _seconds,
    "gibibytes": lambda value: f"{value / 2**30:.1f} GiB",
    "times": lambda value: f"{value:.2f} times",
}
"""How each kind of number is written; ``_low`` is the first of two, whose unit follows the second."""
