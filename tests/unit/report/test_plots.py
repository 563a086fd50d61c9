import re
from xml.etree import ElementTree

import pytest

from securetune.report import plots
from securetune.report.plots import Band, Point, Series


def line(values, style="hardened", start=1):
    return Series(
        style, style, [Point(index + start, value, value, value) for index, value in enumerate(values)]
    )


def coordinates(svg: str) -> list[float]:
    root = ElementTree.fromstring(svg)
    numbers = [element.get("d", "") for element in root.iter("path")]
    return [float(number) for path in numbers for number in re.findall(r"-?\d+\.\d", path)]


@pytest.mark.parametrize(
    "svg",
    [
        plots.plot_training(
            [line([0.9, 0.5, 0.4])], line([1.0, 2.0, 3.0]), target_epsilon=3.0, description="x"
        ),
        plots.plot_training([], line([1.0, 2.0]), target_epsilon=None, description="x"),
        plots.plot_training([line([0.5])], None, target_epsilon=None, description="x"),
        plots.plot_training([line([0.5, 0.5])], None, target_epsilon=None, description="x"),
        plots.plot_training([line([1e9, -5.0])], None, target_epsilon=None, description="x"),
        plots.plot_robustness([line([0.9, 0.1]), line([0.8, 0.3])], description="x"),
        plots.plot_roc(
            [line([0.0, 1.0], start=0)], epsilon=0.5, delta=1e-5, lowest_rate=1e-3, description="x"
        ),
        plots.plot_roc(
            [line([0.0, 1.0], start=0)], epsilon=None, delta=None, lowest_rate=1e-3, description="x"
        ),
        plots.plot_roc(
            [line([0.0, 1.0], start=0)], epsilon=900.0, delta=1e-5, lowest_rate=1e-3, description="x"
        ),
        plots.plot_whiskers([Band("a", "base", 0, 0.5, 0.5, 0.5)], description="x"),
        plots.plot_whiskers([Band("a", "base", 0, 0.0, 0.0, 0.0)], reference=0.5, description="x"),
    ],
)
def test_plots_are_well_formed_and_stay_inside(svg):
    root = ElementTree.fromstring(svg)
    _, _, width, height = (float(part) for part in root.get("viewBox", "").split())
    assert all(-3 <= number <= max(width, height) + 3 for number in coordinates(svg))
    assert "nan" not in svg
    assert "inf" not in svg


def test_text_in_a_plot_is_escaped():
    svg = plots.plot_whiskers([Band("a", 'x"><script>', 0, 0.5, 0.4, 0.6)], description='"><script>')
    assert "<script>" not in svg


def test_a_long_curve_is_thinned_but_keeps_its_end():
    svg = plots.plot_training([line([0.5] * 100_000)], None, target_epsilon=None, description="x")
    assert len(svg) < 40_000
    path = max((element.get("d", "") for element in ElementTree.fromstring(svg).iter("path")), key=len)
    assert path.rsplit("L", 1)[1].startswith("508.0")  # the right end of the axis


def test_the_ceiling_is_what_epsilon_and_delta_allow():
    assert plots._ceiling(0.01, 1.0, 1e-5) == pytest.approx(0.0271928, abs=1e-6)  # e * 1 % + delta
    assert plots._ceiling(0.9, 1.0, 0.0) == pytest.approx(0.9632121, abs=1e-6)  # 1 - (1 - 0.9) / e
    assert plots._ceiling(0.01, 8.0, 1e-5) < 1.0


def test_higher_values_are_drawn_higher():
    svg = plots.plot_robustness(
        [Series("a", "a", [Point(0.0, 0.2, 0.2, 0.2), Point(1.0, 0.8, 0.8, 0.8)])], description="x"
    )
    circles = list(ElementTree.fromstring(svg).iter("circle"))
    assert float(circles[0].get("cy", "")) > float(circles[1].get("cy", ""))
    assert float(circles[0].get("cx", "")) < float(circles[1].get("cx", ""))
