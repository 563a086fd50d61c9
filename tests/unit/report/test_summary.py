import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from securetune.errors import DataError, PrivacyError
from securetune.evidence import GateResult, Interval, RuleResult
from securetune.publishing.gate import check_gate
from securetune.report.environment import library_versions
from securetune.report.summary import (
    Costs,
    Curves,
    DataStatement,
    Report,
    RocCurve,
    StageTime,
    TrainingCurve,
    load_report,
    report_json,
    shareable,
)
from tests.sample_report import gate_rule, make_evidence, sample_evidence, sample_report

# what every field of a report is, decided by a person: a new field fails a test until it is added here
PUBLIC = {
    "schema_version", "audience", "created", "recipe", "environment", "base_model", "privacy", "adversarial",
    "limitations", "reproduce", "withheld",
}  # fmt: skip
REDUCED = {"data", "evidence", "gate", "curves"}
PRIVATE = {"costs", "stages", "peak_memory_bytes"}


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in (key, *leaves(item))]
    if isinstance(value, list):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


def released(value: float = 0.84):
    return make_evidence(
        "accuracy",
        "hardened",
        value,
        0.05,
        1000,
        private_statistic=False,
        release_epsilon=1.0,
        method="Laplace",
    )


def shared_gate(**changes: Any) -> GateResult:
    """The gate of a shareable report, with one rule's result changed."""
    gate = shareable(sample_report()).gate
    assert gate is not None
    first, second, *others = gate.rules
    return GateResult(passed=True, rules=[first, second.model_copy(update=changes), *others])


def test_report_survives_its_json(tmp_path):
    report = sample_report()
    path = tmp_path / "report.json"
    path.write_text(report_json(report))
    assert load_report(path) == report


def test_every_field_is_known_as_public_reduced_or_private():
    assert set(Report.model_fields) == PUBLIC | REDUCED | PRIVATE


def test_private_fields_are_empty_in_a_shareable_report():
    public = shareable(sample_report())
    empty = Report.model_fields
    for field in PRIVATE:
        assert getattr(public, field) == empty[field].get_default(call_default_factory=True), field


def test_no_private_statistic_survives():
    report = sample_report()
    public = shareable(report)
    private_values = {item.value for item in report.evidence if item.private_statistic}
    private_values |= {
        end for item in report.evidence if item.interval for end in (item.interval.low, item.interval.high)
    }
    private_values |= {loss for curve in report.curves.training for loss in curve.loss or ()}
    private_values |= {rate for curve in report.curves.roc for rate in curve.true_positive_rate[1:-1]}
    private_values |= {stage.seconds for stage in report.stages}
    private_values |= {report.data.records, report.data.training_records, report.data.held_out_records}
    found = set(leaves(json.loads(report_json(public)))) & private_values
    assert not found


def test_epsilon_and_its_curve_stay():
    public = shareable(sample_report())
    assert [item.metric for item in public.evidence if item.value is not None] == ["epsilon"]
    (curve,) = public.curves.training
    assert curve.loss is None
    assert curve.epsilon == sample_report().curves.training[0].epsilon


def test_released_figures_are_kept_with_their_epsilon():
    public = shareable(sample_report(), [released()])
    (item,) = (item for item in public.evidence if item.metric == "accuracy")
    assert item.value == 0.84
    assert item.release_epsilon == 1.0


def test_a_figure_that_was_not_noised_is_not_released():
    with pytest.raises(PrivacyError, match="not marked with a release_epsilon"):
        shareable(sample_report(), [make_evidence("accuracy", "hardened", 0.84, 0.02, 1000)])


@pytest.mark.parametrize("subject", ["plain", "hardened - plain"])
def test_figures_of_a_model_trained_without_privacy_are_never_released(subject):
    item = released().model_copy(update={"subject": subject})
    with pytest.raises(PrivacyError, match="without privacy"):
        shareable(sample_report(), [item])
    assert item not in shareable(sample_report(evidence=[item], gate=None)).evidence


def test_without_privacy_only_the_base_model_can_be_released():
    report = sample_report(privacy=None)
    assert shareable(report, [released().model_copy(update={"subject": "base"})])
    with pytest.raises(PrivacyError, match="Releasable here: base"):
        shareable(report, [released()])


def test_gate_keeps_its_rules_and_loses_its_measurements():
    public = shareable(sample_report())
    assert public.gate is not None
    epsilon, *others = public.gate.rules
    assert epsilon.value == 7.9634
    assert all(rule.passed and rule.value is None and rule.interval is None for rule in others)
    assert [rule.at_least for rule in others] == [0.75, 0.0, None, 0.0]


def test_measurements_among_the_params_do_not_survive():
    params = {"radius": 0.2, "norm": "l2_token", "mean_queries": 0.7312, "attack": "sentinel"}
    rule = RuleResult(
        metric="accuracy_pgd",
        subject="hardened",
        at_least=0.1,
        at_most=None,
        value=0.7312,
        interval=Interval(low=0.73, high=0.74),
        n=7312,
        passed=True,
        reason="0.7312",
        private_statistic=True,
        params=params,
    )
    report = sample_report(gate=GateResult(passed=True, rules=[rule]))
    public = shareable(report, [released().model_copy(update={"params": params})])
    assert public.gate is not None
    assert public.gate.rules[0].params == {"radius": 0.2, "norm": "l2_token"}
    (item,) = (item for item in public.evidence if item.metric == "accuracy")
    assert item.params == {"radius": 0.2, "norm": "l2_token"}
    text = report_json(public)
    assert "7312" not in text
    assert "sentinel" not in text


def test_a_failed_gate_is_not_shared():
    evidence = sample_evidence()
    report = sample_report(gate=check_gate([gate_rule("accuracy", at_least=0.99)], evidence))
    assert shareable(report).gate is None


def test_what_is_withheld_is_named_without_numbers():
    withheld = shareable(sample_report()).withheld
    assert "membership inference AUC (hardened)" in withheld
    assert "loss over steps (plain)" in withheld
    assert "times and memory" in withheld


def test_sharing_twice_changes_nothing():
    once = shareable(sample_report(), [released()])
    assert shareable(once) == once


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"evidence": [released().model_copy(update={"params": {"errors": 2}})]},
            "params that are no settings: errors",
        ),
        ({"gate": shared_gate(params={"blind_auc": 0.5})}, "params that are no settings: blind_auc"),
        ({"gate": shared_gate(n=731)}, "private values"),
        ({"gate": shared_gate(reason="low end 0.7312")}, "private values"),
        ({"peak_memory_bytes": 5}, "times or memory"),
        ({"stages": [StageTime(name="train", seconds=1.0)]}, "times or memory"),
        ({"costs": Costs(training_seconds={"plain": 2.0})}, "times or memory"),
        ({"data": DataStatement(source="local file", planned_records=10.0, records=9)}, "numbers of records"),
        ({"curves": sample_report().curves}, "loss curves, ROC points"),
        ({"evidence": sample_evidence()}, "private statistics"),
        ({"gate": sample_report().gate}, "private values"),
        ({"evidence": [released().model_copy(update={"subject": "plain"})]}, "trained without privacy"),
    ],
)
def test_a_report_cannot_be_called_shareable_with_private_parts(changes, message):
    public = dict(shareable(sample_report()))
    with pytest.raises(ValidationError, match=message):
        Report(**{**public, **changes})


MARKER = 0.7234567
MARKERS = st.integers(min_value=1, max_value=400).map(lambda step: MARKER + step * 1e-7)


@settings(max_examples=40)
@given(values=st.lists(MARKERS, min_size=8, max_size=8, unique=True), count=st.integers(7_000_001, 7_000_900))
def test_marked_private_values_never_reach_a_shareable_report(values, count):
    evidence = [
        make_evidence("accuracy", "hardened", values[0], 1e-6, count),
        make_evidence(
            "heldout_loss_difference", "hardened - base", values[1], 1e-6, count, params={"edits": values[2]}
        ),
    ]
    report = sample_report(
        data=DataStatement(
            source="local file",
            planned_records=8192.0,
            records=count,
            duplicates_removed=count,
            training_records=count,
            held_out_records=count,
        ),
        evidence=evidence,
        gate=check_gate([gate_rule("accuracy", at_least=0.1)], evidence),
        curves=Curves(
            training=[TrainingCurve(subject="hardened", steps=[1], loss=[values[3]], epsilon=[1.5])],
            roc=[
                RocCurve(
                    subject="hardened",
                    method=f"threshold {values[4]}",
                    false_positive_rate=[0.0, values[5]],
                    true_positive_rate=[0.0, values[6]],
                    n_members=count,
                    n_non_members=count,
                )
            ],
        ),
        costs=Costs(training_seconds={"plain": values[7]}, training_time_ratio=values[7]),
        stages=[StageTime(name="train", seconds=values[7])],
        peak_memory_bytes=count,
    )
    text = report_json(shareable(report))
    assert "0.7234" not in text
    assert "7000" not in text


def test_curves_of_unequal_length_are_refused():
    with pytest.raises(ValidationError, match="2 values for 1 steps"):
        TrainingCurve(subject="plain", steps=[1], loss=[0.1, 0.2], epsilon=None)


def test_a_roc_that_falls_is_refused():
    with pytest.raises(ValidationError, match="never fall"):
        RocCurve(
            subject="plain",
            method="loss",
            false_positive_rate=[0.0, 0.5, 0.2],
            true_positive_rate=[0.0, 0.5, 1.0],
            n_members=5,
            n_non_members=5,
        )


def test_an_unknown_report_version_is_refused_with_its_place(tmp_path):
    document = json.loads(report_json(sample_report())) | {"schema_version": "securetune.report/9"}
    path = tmp_path / "report.json"
    path.write_text(json.dumps(document))
    with pytest.raises(DataError, match="schema_version"):
        load_report(path)


def test_models_are_frozen_and_closed():
    parts = [
        Report,
        *(kind for kind in vars(__import__("securetune.report.summary", fromlist=["x"])).values()),
    ]
    for kind in parts:
        if isinstance(kind, type) and issubclass(kind, BaseModel) and kind not in (BaseModel, Interval):
            assert kind.model_config.get("frozen"), kind
            assert kind.model_config.get("extra") == "forbid", kind


def test_library_versions_name_what_is_installed():
    assert "torch" in library_versions()
