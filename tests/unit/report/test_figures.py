import pytest

from securetune.report.figures import FORMATS, figure, resolve


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        ("percent", 0.8412, "84.1 %"),
        ("percent", 0.99966, "99.97 %"),
        ("percent", 1.0, "100.0 %"),
        ("percent", 0.0, "0.0 %"),
        ("percent_low", 0.5, "50.0"),
        ("points", 0.0512, "+5.1 points"),
        ("points", -0.0129, "\N{MINUS SIGN}1.3 points"),
        ("points_low", -0.0129, "\N{MINUS SIGN}1.3"),
        ("points_bound", 0.0, "0 points"),
        ("signed", -0.1234, "\N{MINUS SIGN}0.123"),
        ("decimal", 0.50612, "0.506"),
        ("small", 1e-5, "1e-5"),
        ("small", 0.001, "0.001"),
        ("count", 10543, "10,543"),
        ("seconds", 2.44, "2.4 s"),
        ("seconds", 42.0, "42 s"),
        ("seconds", 183.2, "3 min 03 s"),
        ("seconds", 7265.0, "2 h 01 min"),
        ("gibibytes", 3 * 2**30, "3.0 GiB"),
        ("times", 1.9004, "1.90 times"),
    ],
)
def test_numbers_are_written_for_people(kind, value, text):
    assert FORMATS[kind](value) == text


def test_epsilon_is_never_shown_below_what_was_spent():
    assert FORMATS["epsilon"](7.9601) == "7.97"
    assert FORMATS["epsilon"](8.0) == "8.00"


def test_figure_states_its_place_and_exact_value():
    markup = figure({"a": [{"b": 0.123456}]}, "a.0.b", "percent")
    assert str(markup) == (
        '<data class="figure" data-metric="a.0.b" data-format="percent" value="0.123456">12.3 %</data>'
    )


def test_resolve_follows_keys_and_indices():
    assert resolve({"a": [1, {"b": 2}]}, "a.1.b") == 2
