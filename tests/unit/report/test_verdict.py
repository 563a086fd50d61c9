import pytest

from securetune.evidence import Interval
from securetune.publishing.gate import check_gate
from securetune.report.verdict import compare_all, headline, judge
from tests.sample_report import gate_rule, make_evidence, sample_evidence, sample_report


def difference(
    low: float, high: float, metric: str = "accuracy_difference", subject: str = "hardened - base", **changes
):
    return make_evidence(metric, subject, (low + high) / 2, 0.0, 100, **changes).model_copy(
        update={"interval": Interval(low=low, high=high)}
    )


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [
        (0.01, 0.05, "better"),
        (0.0, 0.05, "not shown"),
        (-0.02, 0.05, "not shown"),
        (-0.05, 0.0, "not shown"),
        (-0.05, -0.01, "worse"),
    ],
)
def test_a_difference_is_shown_only_if_its_interval_excludes_zero(low, high, outcome):
    assert judge(difference(low, high)) == outcome


def test_a_lower_loss_is_better():
    assert judge(difference(-0.3, -0.1, "heldout_loss_difference")) == "better"


def test_an_invalid_measurement_shows_nothing():
    assert judge(difference(0.1, 0.2, status="invalid")) == "not shown"


def test_comparisons_keep_their_place_in_the_evidence():
    report = sample_report()
    for item in compare_all(report):
        assert report.evidence[item.place] == item.evidence


def test_headline_says_what_was_shown():
    assert headline(sample_report()) == (
        "Private within its budget, better than the base model and harder to attack than a plain fine-tune"
    )


def test_headline_says_what_was_not_shown():
    evidence = [
        item
        for item in sample_evidence()
        if not (item.metric == "accuracy_pgd_difference" and item.params["radius"] in (0.2, 0.4))
    ]
    line = headline(sample_report(evidence=evidence, gate=None))
    assert line == "Private within its budget and better than the base model; gain in robustness not shown"


def test_headline_says_that_it_got_worse():
    evidence = [difference(-0.09, -0.02)]
    line = headline(sample_report(evidence=evidence, gate=None))
    assert line == "Private within its budget; worse than the base model"


def test_headline_names_both_when_one_attack_gains_and_another_loses():
    evidence = [
        difference(0.1, 0.2, "accuracy_pgd_difference", "hardened - plain"),
        difference(-0.2, -0.1, "accuracy_char_difference", "hardened - plain"),
    ]
    line = headline(sample_report(evidence=evidence, gate=None, privacy=None))
    assert (
        line == "Harder to attack than a plain fine-tune in one test "
        "and easier to attack than a plain fine-tune in another"
    )


def test_a_failed_gate_comes_first():
    evidence = sample_evidence()
    gate = check_gate([gate_rule("accuracy", at_least=0.99), gate_rule("epsilon", at_most=8.0)], evidence)
    assert headline(sample_report(gate=gate)) == "Not ready to release: 1 of 2 release rules failed"


def test_a_report_without_anything_says_so():
    assert (
        headline(sample_report(evidence=[], gate=None, privacy=None)) == "Measured, with nothing to compare"
    )
