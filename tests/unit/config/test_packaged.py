"""What comes with securetune is found by name."""

import pytest

from securetune.config import load_recipe, parse_recipe
from securetune.config.packaged import find_config, find_packaged, packaged_files, recipes_folder
from securetune.config.schema import AdversarialConfig, EvaluationConfig
from securetune.config.template import recipe_template
from securetune.errors import ConfigError


def test_configs_have_a_summary():
    configs = {file.name: file for file in packaged_files() if file.kind == "config"}
    assert {"quickstart", "sms", "example"} <= set(configs)
    assert all(file.summary and not file.summary.startswith("#") for file in configs.values())


@pytest.mark.parametrize("file", [file for file in packaged_files() if file.kind == "config"], ids=str)
def test_configs_load(file):
    load_recipe(file.path)


def test_example_names_the_keys_that_init_does():
    template = parse_recipe(recipe_template("d.jsonl", [{"prompt": "p", "completion": "c"}]), "t")
    assert load_recipe(find_packaged("example").path).checkpoint == template.checkpoint


def test_sms_attacks_at_the_measured_radii():
    recipe = load_recipe(find_packaged("sms").path)
    defaults = EvaluationConfig()
    assert recipe.evaluation.pgd_radii == defaults.pgd_radii == [0.005, 0.01, 0.02]
    assert recipe.adversarial.radius == AdversarialConfig().radius == 0.01
    assert recipe.data.on_overlong == "truncate"


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml"])
def test_find_by_name(name):
    assert find_packaged(name).path == recipes_folder() / "configs" / "quickstart.yaml"


def test_a_file_comes_before_a_name(tmp_path, monkeypatch):
    (tmp_path / "quickstart").write_text("name: x")
    monkeypatch.chdir(tmp_path)
    assert find_config("quickstart").resolve() == tmp_path / "quickstart"
    monkeypatch.chdir("/")
    assert find_config("quickstart") == recipes_folder() / "configs" / "quickstart.yaml"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("quickstrat", "no recipe, config or launch file named 'quickstrat' .* Did you mean 'quickstart'?"),
        ("missing.yaml", r"missing\.yaml: no such file"),
        ("a/b", "a/b: no such file"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ConfigError, match=message):
        find_config(name)
