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


def test_plan_for_several_processes(run_cli, config):
    assert "Memory of each" not in run_cli("plan", config).out
    out = run_cli("plan", config, "--processes", 4, "--memory", 80).out
    assert "Memory of each of 4 processes, about, in GiB; each has 80.0" in out
    found = json.loads(run_cli("plan", config, "--processes", 4, "--memory", 0.5, "--json").out)
    assert [rank["strategy"] for rank in found["distribution"]["ranks"]] == [
        "ddp",
        "fsdp2",
        "zero1",
        "zero2",
        "zero3",
    ]
    assert not any(rank["fits"] for rank in found["distribution"]["ranks"])
    assert found["distribution"]["available_bytes"] == 1 << 29
