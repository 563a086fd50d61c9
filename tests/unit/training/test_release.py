"""Released figures: noised once, never about a model that saw private records unprotected."""

import json
from typing import Any

import pytest

from securetune.config import parse_recipe
from securetune.evidence import Evidence, Interval
from securetune.training.folder import RunFolder
from securetune.training.release import release_evidence, released_evidence
from tests.sample_recipe import recipe_text


def item(metric: str, subject: str, value: float | None = 0.75, n: int = 200, **changes: Any) -> Evidence:
    fields: dict[str, Any] = {
        "metric": metric,
        "subject": subject,
        "value": value,
        "interval": None if value is None else Interval(low=value - 0.05, high=value + 0.05),
        "n": n,
        "method": "counted",
        "status": "not_run" if value is None else "pass",
        "artefact": "a" * 64,
        "private_statistic": True,
    }
    return Evidence(**{**fields, **changes})


EVIDENCE = [
    item("accuracy", "base"),
    item("accuracy", "plain"),
    item("accuracy", "hardened"),
    item("accuracy_char", "hardened"),
    item("membership_auc", "hardened"),
    item("accuracy_pgd", "hardened", value=None),
]


@pytest.fixture
def run(tmp_path):
    def make(**changes):
        values = {
            "run_dir": str(tmp_path / "run"),
            "publish.release_epsilon": 4.0,
            "evaluation.num_texts": 200,
            "evaluation.num_attacked": 200,
        } | changes
        recipe = parse_recipe(recipe_text(values), "recipe.yaml")
        folder = RunFolder(recipe.run_folder)
        folder.work.mkdir(parents=True)
        return recipe, folder

    return make


def test_only_counts_of_protected_models_are_released(run):
    recipe, folder = run()
    released = release_evidence(recipe, folder, EVIDENCE)
    assert {(e.metric, e.subject) for e in released} == {
        ("accuracy", "base"),
        ("accuracy", "hardened"),
        ("accuracy_char", "hardened"),
    }
    for e in released:
        assert e.release_epsilon == 4.0
        assert not e.private_statistic
        assert e.interval is not None
        assert e.interval.low <= e.value <= e.interval.high
        assert "noise of scale 0.75 texts" in e.method  # three counts at epsilon 4


def test_second_release_draws_no_new_noise(run):
    recipe, folder = run()
    first = release_evidence(recipe, folder, EVIDENCE)
    assert release_evidence(recipe, folder, EVIDENCE) == first == released_evidence(recipe)


def test_nothing_is_released_unless_asked(run):
    recipe, folder = run(**{"publish.release_epsilon": None})
    assert release_evidence(recipe, folder, EVIDENCE) == [] == released_evidence(recipe)


def test_released_value_differs_by_whole_texts_within_the_noise(run):
    recipe, folder = run(**{"publish.release_epsilon": 50.0})
    for e in release_evidence(recipe, folder, EVIDENCE):
        assert e.value * e.n == pytest.approx(round(e.value * e.n))
        assert abs(e.value - 0.75) < 0.05


def test_only_settings_and_a_fixed_text_leave_with_a_figure(run):
    recipe, folder = run()
    measured = {"mean_queries": 17.29, "errors": 1729, "radius": 0.2, "norm": "l2_token", "steps": 5}
    (released,) = release_evidence(
        recipe, folder, [item("accuracy_pgd", "hardened", params=measured, method="sentinel 0.7312")]
    )
    assert released.params == {"radius": 0.2, "norm": "l2_token", "steps": 5}
    assert "sentinel" not in released.method
    assert released.method.startswith("held-out texts still right under PGD")
    assert "1729" not in json.dumps(folder.load("released"))


@pytest.mark.parametrize("status", ["invalid", "fail"])
def test_a_figure_that_failed_its_own_checks_is_not_released(run, status):
    recipe, folder = run()
    evidence = [item("accuracy", "hardened"), item("accuracy_pgd", "hardened", status=status)]
    assert [e.metric for e in release_evidence(recipe, folder, evidence)] == ["accuracy"]


@pytest.mark.parametrize(("metric", "option"), [("accuracy", "num_texts"), ("accuracy_char", "num_attacked")])
def test_a_number_of_texts_that_the_data_decided_is_not_released(run, caplog, metric, option):
    recipe, folder = run()
    evidence = [item(metric, subject, n=173) for subject in ("base", "hardened")]
    other = "accuracy_char" if metric == "accuracy" else "accuracy"
    released = release_evidence(recipe, folder, [*evidence, item(other, "hardened")])
    assert [(e.metric, e.n) for e in released] == [(other, 200)]
    (record,) = caplog.records
    assert f"evaluation.{option}" in record.message
    assert "held-out records" in record.message


def test_more_texts_than_the_recipe_names_are_not_released(run, caplog):
    recipe, folder = run()
    assert release_evidence(recipe, folder, [item("accuracy", "hardened", n=273)]) == []
    assert "at least half of evaluation.num_membership" in caplog.text
