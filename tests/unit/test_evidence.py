import math

import pytest
from pydantic import ValidationError

from securetune.evidence import Evidence, GateResult, Interval, RuleResult, describe_metric, public_params

ARTEFACT = "0123456789abcdef" * 4


def make(**changes):
    fields = {
        "metric": "accuracy",
        "subject": "hardened",
        "value": 0.84,
        "interval": Interval(low=0.81, high=0.87),
        "n": 1000,
        "method": "Clopper-Pearson",
        "status": "pass",
        "artefact": ARTEFACT,
        "private_statistic": True,
    }
    return Evidence(**{**fields, **changes})


def test_evidence_survives_json():
    evidence = make(params={"radius": 0.2, "steps": 5, "norm": "l2_token"}, seed=3)
    assert Evidence.model_validate_json(evidence.model_dump_json()) == evidence


def test_integer_params_stay_integers():
    assert isinstance(make(params={"steps": 5}).params["steps"], int)


def test_status_defaults_to_not_run():
    fields = {
        "metric": "accuracy",
        "subject": "base",
        "value": None,
        "interval": None,
        "n": 0,
        "method": "none",
    }
    assert Evidence(**fields, artefact=ARTEFACT, private_statistic=False).status == "not_run"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 0}, "n >= 1"),
        ({"interval": None}, "confidence interval"),
        ({"status": "not_run"}, "cannot carry a value"),
        ({"value": None, "interval": None}, "needs a value"),
        ({"value": None, "status": "invalid"}, "no value"),
        ({"release_epsilon": 1.0}, "cannot be both"),
        ({"params": {"radius": math.inf}}, "finite"),
        ({"value": math.nan}, "finite"),
        ({"artefact": "ABC"}, "pattern"),
        ({"status": "passed"}, "'pass', 'fail', 'invalid' or 'not_run'"),
        ({"spread": 1.0}, "Extra inputs"),
    ],
)
def test_evidence_that_means_nothing_is_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        make(**changes)


def test_epsilon_is_a_bound_and_needs_no_interval():
    assert make(metric="epsilon", value=7.9, interval=None, private_statistic=False).interval is None


def test_interval_ends_must_be_ordered():
    with pytest.raises(ValidationError, match="low must be <= high"):
        Interval(low=0.6, high=0.5)


def test_interval_contains_its_ends():
    interval = Interval(low=-1.0, high=0.0)
    assert interval.contains(0.0)
    assert interval.contains(-1.0)
    assert not interval.contains(0.01)


def test_unknown_metric_is_described_by_its_name():
    assert describe_metric("exposure_bits") == "exposure bits"


def test_gate_verdict_must_follow_from_its_rules():
    rule = RuleResult(
        metric="accuracy",
        subject="hardened",
        at_least=0.8,
        at_most=None,
        value=0.7,
        interval=Interval(low=0.6, high=0.8),
        n=10,
        passed=False,
        reason="too low",
        private_statistic=True,
    )
    with pytest.raises(ValidationError, match="does not follow"):
        GateResult(passed=True, rules=[rule])


def test_public_params_are_settings_of_the_recipe_only():
    settings = {"radius": 0.2, "steps": 5, "norm": "l2_token", "queries": 40, "edits": 3}
    private_plan = {"delta": 1e-5, "noise_multiplier": 0.8}
    measured = {
        "mean_queries": 3.5,
        "errors": 1,
        "members": 500,
        "blind_auc": 0.5,
        "attack": "ratio",
        "fpr": 0.01,
    }
    assert public_params(settings | private_plan | measured) == settings | private_plan
