"""The report's plots as inline SVG, drawn here so that they follow the page's colours in light and dark."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple
from xml.etree import ElementTree

from markupsafe import Markup

__all__ = ["Band", "Point", "Series", "plot_robustness", "plot_roc", "plot_training", "plot_whiskers"]

_WIDTH, _HEIGHT = 560, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 68, 52, 18, 46
_MAX_POINTS = 600  # more than the pixels of the axis only makes the page heavy
_MARKERS = ("circle", "square", "diamond")


class Point(NamedTuple):
    """A measured point; ``low`` and ``high`` are its interval, equal to ``y`` when there is none."""

    x: float
    y: float
    low: float
    high: float


class Series(NamedTuple):
    """One line of a plot. ``style`` is the CSS class that gives its colour; ``marker`` counts from 0."""

    name: str
    style: str
    points: Sequence[Point]
    marker: int = 0


class Band(NamedTuple):
    """One row of a whisker plot."""

    name: str
    style: str
    marker: int
    value: float
    low: float
    high: float


class _Axis(NamedTuple):
    low: float
    high: float
    ticks: Sequence[float]
    is_log: bool = False

    def place(self, value: float) -> float:
        """Map a value to 0..1 along the axis; values outside end on its ends."""
        if self.is_log:
            value, low, high = math.log10(max(value, self.low)), math.log10(self.low), math.log10(self.high)
        else:
            low, high = self.low, self.high
        return min(1.0, max(0.0, (value - low) / (high - low)))


def plot_training(
    loss: Sequence[Series], epsilon: Series | None, *, target_epsilon: float | None, description: str
) -> Markup:
    """Draw loss (left axis) and epsilon spent (right axis) over training steps.

    Args:
        loss: One series per training run; may be empty.
        epsilon: Epsilon after each step, or None.
        target_epsilon: Drawn as the budget line.
        description: What a reader who cannot see the plot should know.

    Returns:
        An ``svg`` element.
    """
    losses = [point.y for series in loss for point in series.points]
    last = max(
        [point.x for series in [*loss, *([epsilon] if epsilon else [])] for point in series.points], default=1
    )
    canvas = _Canvas(description, _linear_axis([0, last], ticks=6, whole=True))
    if losses:
        axis = _linear_axis([*losses, 0.0] if min(losses) < 0.4 * max(losses) else losses)
        canvas.draw_left_axis(axis, "loss", _plain)
        for series in loss:
            canvas.draw_line(series, axis)
    if epsilon:
        values = [point.y for point in epsilon.points]
        axis = _linear_axis([0.0, *values, *([target_epsilon] if target_epsilon else [])])
        if losses:
            canvas.draw_right_axis(axis, "epsilon spent")
        else:
            canvas.draw_left_axis(axis, "epsilon spent", _plain)
        if target_epsilon:
            canvas.draw_rule(axis, target_epsilon, f"budget {target_epsilon:g}", on_right=bool(losses))
        canvas.draw_line(epsilon, axis)
    canvas.draw_bottom_axis("training step", _plain)
    return canvas.markup()


def plot_robustness(series: Sequence[Series], *, description: str) -> Markup:
    """Draw accuracy over attack radius, one line with error bars per model.

    Args:
        series: One series per model.
        description: What a reader who cannot see the plot should know.

    Returns:
        An ``svg`` element.
    """
    points = [point for line in series for point in line.points]
    canvas = _Canvas(description, _linear_axis([0.0, *(point.x for point in points)]), right=18)
    axis = _linear_axis([0.0, 1.0])
    canvas.draw_left_axis(axis, "accuracy under attack", _percent)
    step = 5.0  # pixels: lines of different models at one radius stay apart
    for index, line in enumerate(series):
        canvas.draw_line(line, axis, error_bars=True, shift=(index - (len(series) - 1) / 2) * step)
    canvas.draw_bottom_axis("attack radius (times the mean embedding norm)", _plain)
    return canvas.markup()


def plot_roc(
    series: Sequence[Series],
    *,
    epsilon: float | None,
    delta: float | None,
    lowest_rate: float,
    description: str,
) -> Markup:
    """Draw true- over false-positive rate on log axes, with guessing and the privacy ceiling.

    Args:
        series: One ROC per model, ``x`` the false- and ``y`` the true-positive rate.
        epsilon: Epsilon spent, for the ceiling, or None without privacy.
        delta: Its delta.
        lowest_rate: Left and lower end of the axes, > 0.
        description: What a reader who cannot see the plot should know.

    Returns:
        An ``svg`` element.
    """
    ticks = [10.0**power for power in range(math.ceil(math.log10(lowest_rate)), 1)]
    axis = _Axis(lowest_rate, 1.0, ticks, is_log=True)
    canvas = _Canvas(description, axis, right=18)
    canvas.draw_left_axis(axis, "members found (true positives)", _percent)
    grid = [lowest_rate ** (1 - index / 80) for index in range(81)]
    canvas.draw_line(Series("guessing", "guess", [Point(rate, rate, rate, rate) for rate in grid], -1), axis)
    if epsilon is not None and delta is not None:
        ceiling = [(rate, _ceiling(rate, epsilon, delta)) for rate in grid]
        canvas.draw_line(Series("ceiling", "ceiling", [Point(x, y, y, y) for x, y in ceiling], -1), axis)
    for line in series:
        canvas.draw_line(line._replace(marker=-1), axis, stairs=True)
    canvas.draw_bottom_axis("strangers taken for members (false positives)", _percent)
    return canvas.markup()


def plot_whiskers(bands: Sequence[Band], *, reference: float | None = None, description: str) -> Markup:
    """Draw one small row per model: its value as a dot, its interval as a line.

    Args:
        bands: The rows, top to bottom.
        reference: Drawn as a vertical line, such as 0.5 for guessing.
        description: What a reader who cannot see the plot should know.

    Returns:
        An ``svg`` element.
    """
    ends = [end for band in bands for end in (band.low, band.high)] + (
        [reference] if reference is not None else []
    )
    axis = _linear_axis(ends, ticks=3)
    row, width = 16, 240
    root = _root(width, row * len(bands) + 4, description, "whiskers")
    if reference is not None:
        x = 6 + axis.place(reference) * (width - 12)
        _add(root, "line", {"class": "guess", "x1": x, "x2": x, "y1": 0, "y2": row * len(bands) + 4})
    for index, band in enumerate(bands):
        y = 2 + row * (index + 0.5)
        low, value, high = (6 + axis.place(end) * (width - 12) for end in (band.low, band.value, band.high))
        group = _add(root, "g", {"class": f"s {band.style}"})
        _add(group, "line", {"class": "rail", "x1": 6, "x2": width - 6, "y1": y, "y2": y})
        _add(group, "line", {"class": "bar", "x1": low, "x2": high, "y1": y, "y2": y})
        _marker(group, band.marker, value, y, 4.5)
    return _markup(root)


class _Canvas:
    """A plot area with its axes."""

    def __init__(self, description: str, x_axis: _Axis, *, right: int = _RIGHT) -> None:
        self.x_axis = x_axis
        self.left, self.right = _LEFT, _WIDTH - right
        self.top, self.bottom = _TOP, _HEIGHT - _BOTTOM
        self.root = _root(_WIDTH, _HEIGHT, description, "plot")

    def x(self, value: float) -> float:
        return self.left + self.x_axis.place(value) * (self.right - self.left)

    def y(self, value: float, axis: _Axis) -> float:
        return self.bottom - axis.place(value) * (self.bottom - self.top)

    def draw_left_axis(self, axis: _Axis, title: str, label: Callable[[float], str]) -> None:
        for tick in axis.ticks:
            y = self.y(tick, axis)
            _add(self.root, "line", {"class": "grid", "x1": self.left, "x2": self.right, "y1": y, "y2": y})
            self._text(label(tick), self.left - 8, y + 4, "end")
        middle = (self.top + self.bottom) / 2
        self._text(title, 12, middle, "middle", {"transform": f"rotate(-90 12 {middle:g})", "class": "title"})

    def draw_right_axis(self, axis: _Axis, title: str) -> None:
        for tick in axis.ticks:
            self._text(_plain(tick), self.right + 8, self.y(tick, axis) + 4, "start", {"class": "epsilon"})
        x, middle = _WIDTH - 10, (self.top + self.bottom) / 2
        place = {"transform": f"rotate(90 {x:g} {middle:g})", "class": "title epsilon"}
        self._text(title, x, middle, "middle", place)

    def draw_bottom_axis(self, title: str, label: Callable[[float], str]) -> None:
        ends = {"x1": self.left, "x2": self.right, "y1": self.bottom, "y2": self.bottom}
        _add(self.root, "line", {"class": "axis", **ends})
        for tick in self.x_axis.ticks:
            self._text(label(tick), self.x(tick), self.bottom + 18, "middle")
        self._text(title, (self.left + self.right) / 2, _HEIGHT - 6, "middle", {"class": "title"})

    def draw_rule(self, axis: _Axis, value: float, text: str, *, on_right: bool) -> None:
        y = self.y(value, axis)
        _add(self.root, "line", {"class": "budget", "x1": self.left, "x2": self.right, "y1": y, "y2": y})
        x, anchor = (self.right - 4, "end") if on_right else (self.left + 6, "start")
        self._text(text, x, y - 5, anchor, {"class": "epsilon"})

    def draw_line(
        self,
        series: Series,
        axis: _Axis,
        *,
        error_bars: bool = False,
        stairs: bool = False,
        shift: float = 0.0,
    ) -> None:
        group = _add(self.root, "g", {"class": f"s {series.style}"})
        points = list(_thin(series.points))
        path = "".join(self._segments(points, axis, stairs, shift))
        _add(group, "path", {"d": path, "class": "line"})
        if series.marker < 0 or len(points) > 60:
            return
        for point in points:
            x, y = self.x(point.x) + shift, self.y(point.y, axis)
            if error_bars and point.low < point.high:
                low, high = self.y(point.low, axis), self.y(point.high, axis)
                _add(group, "line", {"class": "bar", "x1": x, "x2": x, "y1": low, "y2": high})
                for end in (low, high):
                    _add(group, "line", {"class": "bar", "x1": x - 3.5, "x2": x + 3.5, "y1": end, "y2": end})
            _marker(group, series.marker, x, y, 4 if error_bars else 2.6)

    def markup(self) -> Markup:
        return _markup(self.root)

    def _segments(self, points: Sequence[Point], axis: _Axis, stairs: bool, shift: float) -> Iterable[str]:
        for index, point in enumerate(points):
            x, y = self.x(point.x) + shift, self.y(point.y, axis)
            if index == 0:
                yield f"M{x:.1f} {y:.1f}"
            else:
                yield f"H{x:.1f}V{y:.1f}" if stairs else f"L{x:.1f} {y:.1f}"

    def _text(
        self, text: str, x: float, y: float, anchor: str, attributes: dict[str, str] | None = None
    ) -> None:
        _add(self.root, "text", {"x": x, "y": y, "text-anchor": anchor, **(attributes or {})}).text = text


def _plain(value: float) -> str:
    return f"{value:g}"


def _percent(value: float) -> str:
    return f"{100 * value:g} %"


def _ceiling(rate: float, epsilon: float, delta: float) -> float:
    forwards = math.exp(min(epsilon, 700.0)) * rate + delta
    backwards = 1 - math.exp(-epsilon) * (1 - delta - rate)
    return min(1.0, forwards, max(backwards, 0.0))


def _linear_axis(values: Sequence[float], *, ticks: int = 5, whole: bool = False) -> _Axis:
    low, high = min(values), max(values)
    if high - low < 1e-9:
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
    step = _round_step((high - low) / ticks)
    if whole:
        step = max(1.0, 2 * step if step % 1 else step)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if whole:
        last, high_end = math.floor(high / step + 1e-9), high
    else:
        high_end = last * step
    marks = [round(index * step, 10) for index in range(first, last + 1)]
    return _Axis(first * step, high_end, marks)


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(nice * power for nice in (1.0, 2.0, 2.5, 5.0, 10.0) if nice * power >= step * (1 - 1e-9))


def _thin(points: Sequence[Point]) -> Iterable[Point]:
    stride = max(1, math.ceil(len(points) / _MAX_POINTS))
    yield from points[::stride]
    if (len(points) - 1) % stride:
        yield points[-1]


def _marker(parent: ElementTree.Element, shape: int, x: float, y: float, radius: float) -> None:
    kind = _MARKERS[shape % len(_MARKERS)]
    if kind == "circle":
        _add(parent, "circle", {"class": "dot", "cx": x, "cy": y, "r": radius})
        return
    side = 1.8 * radius
    place: dict[str, float | str] = {"x": x - side / 2, "y": y - side / 2, "width": side, "height": side}
    if kind == "diamond":
        place["transform"] = f"rotate(45 {x:.1f} {y:.1f})"
    _add(parent, "rect", {"class": "dot", **place})


def _root(width: float, height: float, description: str, style: str) -> ElementTree.Element:
    box = {"viewBox": f"0 0 {width:g} {height:g}", "class": style, "role": "img", "aria-label": description}
    return ElementTree.Element("svg", box)


def _add(parent: ElementTree.Element, tag: str, attributes: dict[str, float | str]) -> ElementTree.Element:
    texts = {key: value if isinstance(value, str) else f"{value:.1f}" for key, value in attributes.items()}
    return ElementTree.SubElement(parent, tag, texts)


def _markup(root: ElementTree.Element) -> Markup:
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # ElementTree has escaped the texts
