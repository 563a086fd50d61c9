"""``train``: what is launched, and how."""

import json

import pytest

from securetune.config import packaged
from tests.sample_recipe import recipe_text

SCRIPT = """
import json, os, pathlib, sys
started = {"arguments": sys.argv[1:], "cpu": os.environ.get("ACCELERATE_USE_CPU")}
pathlib.Path("started.json").write_text(json.dumps(started))
if "kill" in sys.argv[1]:
    os.kill(os.getpid(), 9)
sys.exit(int(pathlib.Path(sys.argv[1]).stem.removeprefix("--fail-")) if "--fail" in sys.argv[1] else 0)
"""


@pytest.fixture
def fake_recipes(tmp_path, monkeypatch):
    (tmp_path / "recipes" / "configs").mkdir(parents=True)
    (tmp_path / "recipes" / "harden.py").write_text(SCRIPT)
    (tmp_path / "recipes" / "configs" / "mine.yaml").write_text(recipe_text({"model.device": "cpu"}))
    monkeypatch.setattr(packaged, "recipes_folder", lambda: tmp_path / "recipes")
    return tmp_path / "recipes"


def test_launches_one_process_with_the_arguments(run_cli, fake_recipes, tmp_path):
    outcome = run_cli("train", "mine", "--set", "privacy.steps=3", "--resume")
    assert outcome.code == 0
    started = json.loads((tmp_path / "started.json").read_text())
    config = str(fake_recipes / "configs" / "mine.yaml")
    assert started == {"arguments": [config, "--set", "privacy.steps=3", "--resume"], "cpu": "True"}


@pytest.mark.usefixtures("fake_recipes")
@pytest.mark.parametrize(
    ("name", "status"), [("--fail-1", 1), ("--fail-2", 2), ("--fail-130", 130), ("kill", 137)]
)
def test_the_status_of_the_run_is_that_of_the_command(run_cli, tmp_path, name, status):
    (tmp_path / f"{name}.yaml").write_text(recipe_text({"model.device": "cpu"}))
    assert run_cli("train", f"./{name}.yaml").code == status


@pytest.mark.usefixtures("fake_recipes")
def test_a_wrong_recipe_is_refused_before_anything_starts(run_cli, tmp_path):
    outcome = run_cli("train", "mine", "--set", "privacy.stepz=3")
    assert outcome.code == 2
    assert "Did you mean 'steps'?" in outcome.err
    assert not (tmp_path / "started.json").exists()
