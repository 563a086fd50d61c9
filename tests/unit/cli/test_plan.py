"""``plan``: noise and budget, printed before anything is spent."""

import json

import pytest

from tests.sample_recipe import recipe_text
from tests.tiny import tiny_folder


@pytest.fixture
def config(tmp_path):
    (tmp_path / "run.yaml").write_text(recipe_text({"model.name": str(tiny_folder(tmp_path / "base"))}))
    return "run.yaml"


def test_plan_as_json_keeps_the_promise(run_cli, config):
    outcome = run_cli("plan", config, "--json")
    assert outcome.code == 0, outcome.err
    privacy = json.loads(outcome.out)["privacy"]
    assert privacy["epsilon"] <= 8.0
    assert privacy["delta"] == 1e-5
    assert privacy["noise_multiplier"] > 0


def test_plan_names_the_unit_and_what_epsilon_means(run_cli, config):
    out = run_cli("plan", config).out
    assert "one record; a person with several records is not covered" in out
    assert "at delta = 1e-05" in out
    assert "1 % false alarms" in out


def test_a_target_that_cannot_be_reached(run_cli, config):
    outcome = run_cli("plan", config, "--set", "privacy.target_epsilon=1e-9")
    assert outcome.code == 2
    assert outcome.err.startswith("PrivacyError: ")
    assert "1e-09" in outcome.err
