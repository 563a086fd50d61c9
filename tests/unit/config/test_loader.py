"""Loading recipes: every problem at once, in words a user can act on."""

import json
import re

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from securetune.config import dump_recipe, load_recipe, parse_recipe, recipe_digest, recipe_json_schema
from securetune.config.packaged import packaged_files
from securetune.config.yaml_text import parse_yaml
from securetune.errors import ConfigError
from tests.sample_recipe import recipe_text, sample_recipe

CONFIGS = [file for file in packaged_files() if file.kind == "config"]


def problems(text, overrides=()):
    """Return the lines of the message, without the indent."""
    with pytest.raises(ConfigError) as caught:
        parse_recipe(text, "run.yaml", overrides)
    return [line.strip() for line in str(caught.value).splitlines()]


def test_defaults_are_filled_in():
    recipe = sample_recipe()
    assert recipe.run_dir == "runs/run"
    assert recipe.data.words == [" no", " yes"]
    assert recipe.privacy.max_grad_norm == 1.0
    assert recipe.privacy.expected_records == 1000


@pytest.mark.parametrize("config", CONFIGS, ids=[file.name for file in CONFIGS])
def test_packaged_configs_load_and_round_trip(config):
    recipe = load_recipe(config.path)
    assert parse_recipe(dump_recipe(recipe), "dump") == recipe
    assert recipe_digest(parse_recipe(dump_recipe(recipe), "dump")) == recipe_digest(recipe)


@pytest.mark.parametrize("config", CONFIGS, ids=[file.name for file in CONFIGS])
def test_packaged_configs_match_the_json_schema(config):
    value = parse_yaml(config.path.read_text(encoding="utf-8"), config.name).value
    jsonschema.validate(value, recipe_json_schema())


def test_json_schema_is_valid_json_and_describes_every_option():
    schema = recipe_json_schema()
    jsonschema.Draft202012Validator.check_schema(json.loads(json.dumps(schema)))
    for section in [schema, *schema["$defs"].values()]:
        for name, option in section["properties"].items():
            described = schema["$defs"][option["$ref"].rpartition("/")[2]] if "$ref" in option else option
            assert described.get("description"), name


def test_all_errors_come_at_once():
    text = recipe_text({"privacy.target_epsilom": 8, "privacy.steps": 0, "seed": "x", "modell": {}})
    text = text.replace("  target_epsilon: 8.0\n", "")
    lines = problems(text)
    assert lines[0] == "5 problems in run.yaml"
    assert len(lines) == 6


def test_unknown_option_suggests_the_nearest():
    assert problems(recipe_text({"privacy.target_epsilom": 8}))[1].startswith(
        "privacy.target_epsilom: unknown option. Did you mean 'target_epsilon'?"
    )


def test_unknown_option_suggests_another_section():
    assert "Did you mean 'training.learning_rate'?" in problems(recipe_text({"learning_rate": 1e-3}))[1]


def test_unknown_option_without_a_neighbour_lists_what_is_allowed():
    assert (
        "unknown option. Allowed here: name, revision, dtype, device."
        in problems(recipe_text({"model.qqq": 1}))[1]
    )


def test_problem_names_the_line():
    text = recipe_text({"privacy.steps": 0})
    line = next(number for number, row in enumerate(text.splitlines(), 1) if "steps: 0" in row)
    assert problems(text)[1] == f"privacy.steps: must be >= 1, got 0. (line {line})"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("privacy.target_epsilon", -1.0, "must be > 0, got -1.0."),
        ("privacy.target_epsilon", 0, "must be > 0, got 0"),
        ("privacy.target_epsilon", float("inf"), "must be a finite number, got inf."),
        ("privacy.target_epsilon", "eight", "must be a number, got 'eight'."),
        ("privacy.delta", 1, "must be < 1, got 1"),
        ("privacy.sample_rate", 1.5, "must be <= 1, got 1.5."),
        ("privacy.steps", 1.5, "must be a whole number, got 1.5."),
        ("privacy.steps", 10**23, "must be <= 1e+06, got 100000000000000000000000."),
        ("privacy.steps", True, "must be a whole number, got true."),
        ("privacy.enabled", "yes", "must be true or false, got 'yes'."),
        ("privacy.unit", "example", "must be 'record' or 'user', got 'example'."),
        ("task", "clasify", "'classify' or 'generate', got 'clasify'. Did you mean 'classify'?"),
        ("model", None, "must be a section with options, got nothing (null)."),
        ("model.name", 3, "must be text, got 3."),
        ("model.name", "", "must not be shorter than 1, got ''."),
        ("data.labels", "yes", "must be a list, got 'yes'."),
        ("data.private.path", 3, "must be a path, got 3."),
        ("training.lora.target_modules", 3, "must be a list or 'all-linear', got 3."),
        ("training.trackers", ["wandbb"], "'wandbb'. Did you mean 'wandb'?"),
        ("training.betas", [0.9], "training.betas.1: missing: the list is too short."),
        ("name", "a/b", "not allowed: 'a/b'. Name of the run: letters, digits"),
        ("name", "..", "not allowed: '..'"),
    ],
)
def test_wrong_value_says_what_is_allowed(option, value, message):
    (_, line) = problems(recipe_text({option: value}))
    assert line.startswith(f"{option}")
    assert message in line


def test_required_option_is_explained():
    (_, line) = problems(recipe_text({"privacy.delta": ...}))
    assert line == (
        "privacy.delta: required, but missing. Probability that the epsilon bound fails; at most one over "
        "the number of records."
    )


def test_rules_between_sections_are_checked_beside_errors_elsewhere():
    lines = problems(recipe_text({"seed": "x", "adversarial.method": "pgd", "checkpoint.demo_keys": False}))
    assert [line.partition(":")[0] for line in lines[1:]] == [
        "seed",
        "adversarial.steps",
        "checkpoint.signing_key",
        "checkpoint.passphrase_file",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "this file is empty"),
        (b"# nothing\n", "this file is empty"),
        (b"just text", "this file is 'just text'"),
        (b"- 1\n", "this file is [1]"),
        (
            b"name: a\nname: b\n",
            "line 2, column 1: not valid YAML: 'name' stands here twice; the first is on line 1",
        ),
        (b"a: [1, 2\nb: 3\n", "line 2, column 2: not valid YAML"),
        (b"a: &x 1\nb: *x\n", "line 2, column 4: not valid YAML: aliases (*x) cannot be used in a recipe"),
        (b"a: !!python/object:os.system 1\n", "cannot be used in a recipe"),
        (b"a: 1\n---\nb: 2\n", "not valid YAML"),
        (b"? [1]\n: 2\n", "the name of an option must be plain text"),
        (b"name: run\ntask: \xff\n", "line 2: not valid UTF-8 (byte 16)"),
        (b"a: " + b"[" * 5000, "nested too deeply"),
        (b"#" * (1 << 21), "larger than"),
    ],
    ids=range(13),
)
def test_unusable_file(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"run\.yaml: no such file\. 'securetune ls' lists"):
        load_recipe(tmp_path / "run.yaml")


def test_folder_instead_of_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_recipe(tmp_path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1.0e-5", 1e-5),
        ("-.5", -0.5),
        ("010", 10),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        ("1_000", "1_000"),
        ("true", True),
        ("~", None),
        ("", None),
        ("'1'", "1"),
        ("[a, 1]", ["a", 1]),
    ],
)
def test_yaml_scalars_mean_what_they_look_like(text, value):
    assert parse_yaml(f"x: {text}", "t").value == {"x": value}


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=20))


@given(
    st.dictionaries(
        st.text(st.characters(categories=["L", "N", "P", "Z"]), min_size=1, max_size=8),
        st.one_of(SCALARS, st.lists(SCALARS, max_size=4)),
        max_size=4,
    )
)
def test_written_yaml_reads_back_the_same(value):
    from securetune.config.yaml_text import format_yaml

    assert parse_yaml(format_yaml(value), "t").value == (value or {})


class TestOverrides:
    def test_values_are_typed_as_in_yaml(self):
        recipe = sample_recipe(
            overrides=(
                "privacy.target_epsilon=3",
                "privacy.delta=1e-6",
                "data.labels=[a, b]",
                "model.revision=null",
            )
        )
        assert recipe.privacy.target_epsilon == 3.0
        assert recipe.privacy.delta == 1e-6
        assert recipe.data.labels == ["a", "b"]
        assert recipe.model.revision is None

    def test_the_last_one_wins_and_sections_are_made(self):
        recipe = sample_recipe(
            overrides=("gate.rules=[]", "publish.release_epsilon=1", "publish.release_epsilon=2")
        )
        assert recipe.publish.release_epsilon == 2.0

    def test_items_of_lists_can_be_set(self):
        changes = {"gate.rules": [{"metric": "epsilon", "at_most": 8.0}]}
        assert sample_recipe(changes, ("gate.rules.0.at_most=4",)).gate.rules[0].at_most == 4.0

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("privcy.steps=3", "privcy: unknown option. Did you mean 'privacy'? (from --set privcy.steps=3)"),
            (
                "privacy.stepz=3",
                "privacy.stepz: unknown option. Did you mean 'steps'? (from --set privacy.stepz=3)",
            ),
            (
                "privacy.steps=x",
                "privacy.steps: must be a whole number, got 'x'. (from --set privacy.steps=x)",
            ),
            (
                "privacy.steps",
                "--set privacy.steps: must look like section.option=value, such as privacy.steps=30.",
            ),
            ("=3", "--set =3: must look like section.option=value, such as privacy.steps=30."),
            ("name.x=3", "--set name.x=3: name is one value and has no option 'x'."),
            (
                "data.labels.7=x",
                "--set data.labels.7=x: data.labels is a list of 2: '7' is not one of its numbers",
            ),
            ("seed=[1", "--set seed=[1: --set seed, line 1"),
        ],
    )
    def test_problem_names_the_override(self, override, message):
        (_, line) = problems(recipe_text(), (override,))
        assert line.startswith(message)

    @pytest.mark.parametrize("text", ["{text} is", "{text}", "Text: {text}"])
    def test_text_that_yaml_reads_otherwise_is_put_in_quotes(self, text):
        (_, line) = problems(recipe_text(), (f"data.prompt={text}",))
        assert re.search(r"Put text .*in quotes", line)
        assert sample_recipe(overrides=(f"data.prompt='{text}'",)).data.prompt == text

    def test_problems_in_file_and_overrides_come_together(self):
        lines = problems(recipe_text({"seed": "x"}), ("privacy.stepz=3", "bad"))
        assert lines[0] == "3 problems in run.yaml"
