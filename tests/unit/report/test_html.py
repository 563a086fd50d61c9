import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from securetune.publishing.gate import check_gate
from securetune.report import render_html, report_json, shareable
from tests.sample_report import gate_rule, make_evidence, sample_evidence, sample_report


class Page(HTMLParser):
    """Collects the figures, the tags and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.figures: list[tuple[str, str, str, str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: tuple[str, str, str] | None = None
        self._inside_style = False
        self.feed(text)
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        fields = dict(attrs)
        self.tags.append((tag, fields))
        self._inside_style = tag == "style"
        if "data-metric" in fields:
            self._open = (fields["data-metric"] or "", fields["data-format"] or "", fields["value"] or "")

    def handle_endtag(self, tag: str) -> None:
        self._inside_style = False

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            self.figures.append((*self._open, data))
            self._open = None
        if not self._inside_style:
            self.words.append(data)


def lookup(document: Any, path: str) -> Any:
    for part in path.split("."):
        document = document[int(part)] if isinstance(document, list) else document[part]
    return document


def read_number(text: str, kind: str) -> tuple[float, float]:
    """Read a printed number and how far rounding may have moved it."""
    plain = text.replace("\N{MINUS SIGN}", "-").replace(",", "")
    number = re.match(r"[-+]?[\d.]+(e-?\d+)?", plain)
    assert number is not None, text
    value = float(number[0])
    half = 0.5000001 * 10.0 ** -len(number[0].partition("e")[0].partition(".")[2])
    if kind.startswith(("percent", "points")):
        return value / 100, half / 100
    if kind == "epsilon":
        return value, 0.0100001  # rounded up
    if kind in ("small", "plain"):
        return value, 0.005 * abs(value) + 1e-12
    if kind == "gibibytes":
        return value * 2**30, half * 2**30
    if kind == "seconds" and "min" in plain:
        parts = [float(part) for part in re.findall(r"\d+", plain)]
        scale = (3600.0, 60.0) if " h " in plain else (60.0, 1.0)
        return parts[0] * scale[0] + parts[1] * scale[1], scale[1]
    return value, half


REPORTS = {
    "internal": lambda: sample_report(),
    "shareable": lambda: shareable(
        sample_report(),
        [
            make_evidence(
                "accuracy", "hardened", 0.83, 0.05, 1000, private_statistic=False, release_epsilon=1.0
            )
        ],
    ),
    "bare": lambda: sample_report(
        privacy=None,
        adversarial=None,
        evidence=[],
        gate=None,
        curves={},
        costs={},
        stages=[],
        peak_memory_bytes=None,
    ),
    "generate": lambda: sample_report(
        evidence=[
            make_evidence("heldout_loss", subject, value, 0.1, 500).model_copy(update={"value": value})
            for subject, value in (("base", 0.91), ("hardened", 0.72))
        ]
        + [make_evidence("heldout_loss_difference", "hardened - base", -0.19, 0.05, 500)],
        gate=None,
    ),
}


@pytest.mark.parametrize("kind", REPORTS)
def test_every_number_shown_is_the_one_in_report_json(kind):
    report = REPORTS[kind]()
    document = json.loads(report_json(report))
    figures = Page(render_html(report)).figures
    assert len(figures) >= 1
    for path, shape, exact, text in figures:
        value = lookup(document, path)
        assert float(exact) == value, path
        shown, tolerance = read_number(text, shape)
        assert shown == pytest.approx(value, abs=tolerance), (path, text)


def test_every_evidence_is_in_the_table():
    report = sample_report()
    shown = {path for path, *_ in Page(render_html(report)).figures}
    for index, item in enumerate(report.evidence):
        if item.value is not None:
            assert f"evidence.{index}.value" in shown
        if item.interval is not None:
            assert {f"evidence.{index}.interval.low", f"evidence.{index}.interval.high"} <= shown
        assert f"evidence.{index}.n" in shown


@pytest.mark.parametrize("kind", REPORTS)
def test_the_page_loads_nothing(kind):
    text = render_html(REPORTS[kind]())
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & {tag for tag, _ in page.tags}
    attributes = {(name, value) for _, fields in page.tags for name, value in fields.items()}
    assert not {name for name, _ in attributes} & {"src", "href", "srcset", "action", "onload"}
    assert not re.search(r"url\(|@import|https?:", text)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in attributes


def test_text_from_outside_is_escaped():
    attack = "<script>alert(1)</script>\"'><img src=x>"
    report = sample_report(
        reproduce=attack,
        created=attack,
        limitations=[attack],
        evidence=[
            make_evidence("accuracy", "hardened", 0.8, 0.1, 10, method=attack, params={attack: attack}),
            make_evidence("accuracy_difference", "hardened - base", 0.8, 0.1, 10).model_copy(
                update={"subject": attack}
            ),
        ],
        gate=None,
    )
    tags = {tag for tag, _ in Page(render_html(report)).tags}
    assert not tags & {"script", "img"}


def test_every_private_statistic_is_marked():
    report = sample_report()
    marked = render_html(report).count('<span class="badge">not covered by epsilon</span>')
    private = sum(item.private_statistic for item in report.evidence)
    assert marked == private + 3  # and the three plots


def test_a_shareable_page_shows_no_mark_and_no_warning():
    text = Page(render_html(REPORTS["shareable"]())).text
    assert "Keep this page in the run folder" not in text
    assert "This page may be shared." in text
    assert "noised at epsilon 1" in text
    assert "membership inference AUC (hardened)" in text  # named as withheld


def test_a_shareable_page_draws_no_private_curve():
    text = render_html(REPORTS["shareable"]())
    assert text.count('class="plot"') == 1  # epsilon over steps
    assert "loss" not in Page(text).text.split("Withheld")[0]


def test_a_gain_that_is_not_shown_says_so():
    text = Page(render_html(sample_report())).text
    assert (
        "Robustness gain over the plain fine-tune under the character attack: not shown at this size; "
        "the difference is +2.5 points (95 % interval \N{MINUS SIGN}3.0 to +8.0 points)" in text
    )


def test_a_loss_of_robustness_is_not_hidden_by_a_gain():
    evidence = [
        make_evidence(
            "accuracy_pgd_difference", "hardened - plain", value, 0.05, 200, params={"radius": radius}
        )
        for radius, value in ((0.1, -0.2), (0.4, 0.2))
    ]
    text = Page(render_html(sample_report(evidence=evidence, gate=None))).text
    assert "at radius 0.1 it keeps less accuracy than the plain fine-tune" in text


def test_a_failed_gate_leads_the_page():
    evidence = sample_evidence()
    gate = check_gate([gate_rule("accuracy", at_least=0.99)], evidence)
    text = Page(render_html(sample_report(gate=gate))).text
    assert "Not ready to release: 1 of 1 release rules failed" in text
    assert "below the required 0.99" in text


def test_an_invalid_membership_attack_is_not_called_safe():
    evidence = [
        make_evidence("membership_auc", "hardened", 0.5, 0.03, 1000, status="invalid", method="blind AUC 0.7")
    ]
    text = Page(render_html(sample_report(evidence=evidence, gate=None))).text
    assert "gives no usable answer" in text
    assert "no leak found" not in text


def test_the_privacy_statement_is_complete():
    text = Page(render_html(sample_report())).text
    for phrase in (
        "one record; a person with several records is not covered",
        "add or remove one record",
        "Poisson sampling at rate 0.03125",
        "dp-accounting 0.6.0, PLD",
        "wrongly accuses 1 % of strangers can find at most 99.97 % of the members",
        "tuning a learning rate",
        "The decision to publish",
    ):
        assert phrase in text, phrase


def test_a_run_without_privacy_says_so():
    text = Page(render_html(REPORTS["bare"]())).text
    assert "This run used no differential privacy." in text


def test_correlated_noise_is_told_in_mechanisms_not_in_steps():
    report = sample_report()
    privacy = report.privacy.model_copy(update={"sampler": "fixed order", "noise": "matrix factorization"})
    text = Page(render_html(report.model_copy(update={"privacy": privacy}))).text
    assert "mechanisms charged" in text
    assert "The noise of all steps is one mechanism, which is paid for as a whole" in text
    assert "Each training step costs" not in text


def test_users_are_named_where_they_are_the_unit():
    report = sample_report()
    data = report.data.model_copy(update={"unit": "user", "training_users": 70, "held_out_users": 30})
    text = Page(render_html(report.model_copy(update={"data": data}))).text
    assert "Whether the records of any one user were trained on" in text
    assert "one user is protected" in text
    assert "of 70 and 30 users" in text
    public = Page(render_html(shareable(report.model_copy(update={"data": data})))).text
    assert "of 70 and 30 users" not in public


def test_the_memorisation_gap_stands_with_the_membership_attack():
    report = sample_report()
    gap = make_evidence("memorisation_gap", "hardened", 0.02, 0.05, 2000)
    text = Page(render_html(report.model_copy(update={"evidence": [*report.evidence, gap]}))).text
    assert (
        "Memorisation gap, the mean loss on held-out texts minus that on training texts: +0.020 nats" in text
    )
