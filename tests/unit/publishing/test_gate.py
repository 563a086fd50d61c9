import pytest

from securetune.errors import GateFailed
from securetune.evidence import Evidence
from securetune.publishing.gate import GateRefusal, check_gate, require_passed
from tests.sample_report import DIGESTS, gate_rule, make_evidence


def epsilon(value: float) -> Evidence:
    return Evidence(
        metric="epsilon",
        subject="hardened",
        value=value,
        interval=None,
        n=15,
        method="ledger",
        status="pass",
        artefact=DIGESTS["hardened"],
        private_statistic=False,
    )


def test_at_least_is_checked_against_the_low_end():
    evidence = [make_evidence("accuracy", "hardened", 0.80, 0.03, 1000)]
    assert check_gate([gate_rule("accuracy", at_least=0.77)], evidence).passed
    result = check_gate([gate_rule("accuracy", at_least=0.78)], evidence)
    assert not result.passed
    assert "0.77" in result.rules[0].reason


def test_at_most_is_checked_against_the_high_end():
    evidence = [make_evidence("membership_auc", "hardened", 0.55, 0.04, 1000)]
    assert check_gate([gate_rule("membership_auc", at_most=0.60)], evidence).passed
    assert not check_gate([gate_rule("membership_auc", at_most=0.58)], evidence).passed


def test_a_rule_with_two_thresholds_needs_both():
    evidence = [make_evidence("accuracy", "hardened", 0.80, 0.03, 1000)]
    assert not check_gate([gate_rule("accuracy", at_least=0.7, at_most=0.82)], evidence).passed


def test_missing_evidence_fails():
    result = check_gate([gate_rule("membership_auc", at_most=0.6)], [])
    assert not result.passed
    assert "was not measured" in result.rules[0].reason


@pytest.mark.parametrize("status", ["invalid", "fail"])
def test_a_value_that_is_not_valid_fails(status):
    evidence = [make_evidence("accuracy", "hardened", 0.99, 0.005, 1000, status=status)]
    assert not check_gate([gate_rule("accuracy", at_least=0.1)], evidence).passed


@pytest.mark.parametrize("status", ["invalid", "not_run"])
def test_no_value_fails(status):
    measured = make_evidence("accuracy", "hardened", 0.5, 0.1, 100)
    evidence = [Evidence(**{**dict(measured), "value": None, "interval": None, "status": status})]
    result = check_gate([gate_rule("accuracy", at_least=0.1)], evidence)
    assert not result.passed
    assert "only a measurement can pass" in result.rules[0].reason


def test_a_rule_without_threshold_fails():
    evidence = [make_evidence("accuracy", "hardened", 0.8, 0.1, 100)]
    assert not check_gate([gate_rule("accuracy")], evidence).passed


def test_epsilon_is_checked_by_its_value():
    assert check_gate([gate_rule("epsilon", at_most=8.0)], [epsilon(8.0)]).passed
    assert not check_gate([gate_rule("epsilon", at_most=8.0)], [epsilon(8.0001)]).passed


def test_other_models_do_not_satisfy_a_rule_on_the_hardened_one():
    evidence = [make_evidence("accuracy", "plain", 0.9, 0.01, 1000)]
    assert not check_gate([gate_rule("accuracy", at_least=0.5)], evidence).passed


def test_subject_can_be_chosen():
    evidence = [make_evidence("accuracy", "plain", 0.9, 0.01, 1000)]
    assert check_gate([gate_rule("accuracy", at_least=0.5, subject="plain")], evidence).passed


def test_without_a_radius_every_strength_must_pass():
    evidence = [
        make_evidence("accuracy_pgd", "hardened", value, 0.05, 200, params={"radius": radius})
        for radius, value in ((0.1, 0.7), (0.4, 0.3))
    ]
    result = check_gate([gate_rule("accuracy_pgd", at_least=0.5)], evidence)
    assert [rule.passed for rule in result.rules] == [True, False]
    assert check_gate([gate_rule("accuracy_pgd", at_least=0.5, radius=0.1)], evidence).passed


def test_a_radius_that_was_not_measured_fails():
    evidence = [make_evidence("accuracy_pgd", "hardened", 0.7, 0.05, 200, params={"radius": 0.1})]
    result = check_gate([gate_rule("accuracy_pgd", at_least=0.5, radius=0.3)], evidence)
    assert "at radius 0.3 was not measured" in result.rules[0].reason


def test_differences_default_to_the_pair_they_are_asked_of():
    evidence = [
        make_evidence("accuracy_difference", "hardened - base", 0.05, 0.02, 1000),
        make_evidence("accuracy_difference", "hardened - plain", -0.05, 0.02, 1000),
    ]
    assert check_gate([gate_rule("accuracy_difference", at_least=0.0)], evidence).passed


def test_no_rules_demand_nothing():
    assert check_gate([], []).passed


def test_refusal_carries_every_rule_and_says_what_failed():
    evidence = [make_evidence("accuracy", "hardened", 0.80, 0.03, 1000), epsilon(9.0)]
    result = check_gate([gate_rule("accuracy", at_least=0.7), gate_rule("epsilon", at_most=8.0)], evidence)
    with pytest.raises(GateFailed, match="1 of 2 release rules failed") as caught:
        require_passed(result)
    assert isinstance(caught.value, GateRefusal)
    assert caught.value.result == result
    assert "epsilon (hardened): the value reaches up to 9, above the allowed 8" in str(caught.value)


def test_results_keep_settings_and_no_measurement_beside_the_value():
    params = {"radius": 0.2, "norm": "l2_token", "mean_queries": 31.25, "errors": 3}
    evidence = [make_evidence("accuracy_pgd", "hardened", 0.7, 0.05, 200, params=params)]
    (result,) = check_gate([gate_rule("accuracy_pgd", at_least=0.5)], evidence).rules
    assert result.params == {"radius": 0.2, "norm": "l2_token"}
