"""``securetune init``: a recipe that fits the data and explains itself."""

from pathlib import Path

import pytest

from securetune.config import parse_recipe
from securetune.config.template import commented_yaml, recipe_template
from securetune.errors import DataError
from tests.sample_recipe import sample_recipe


def labelled(count):
    return [{"text": f"text {i}", "label": ("no", "yes")[i % 2]} for i in range(count)]


@pytest.mark.parametrize("count", [1, 3, 10, 100, 1000, 100_000])
def test_template_is_a_valid_recipe_whatever_the_size(count):
    rows = [{"prompt": "p", "completion": "c"}] * count
    recipe = parse_recipe(recipe_template("notes.jsonl", rows), "t")
    assert recipe.task == "generate"
    assert recipe.name == "notes"
    assert recipe.privacy.expected_records == pytest.approx(max(1, 0.8 * count), rel=0.01)
    assert recipe.privacy.delta <= 1 / recipe.privacy.expected_records


def test_labels_are_counted():
    recipe = parse_recipe(recipe_template("a b.csv", labelled(500)), "t")
    assert (recipe.task, recipe.data.labels, recipe.name) == ("classify", ["no", "yes"], "a-b")
    assert recipe.evaluation.num_texts == 100


def test_keys_are_those_that_keygen_makes(monkeypatch, tmp_path):
    from securetune.cli.checkpoint_commands import keygen

    monkeypatch.chdir(tmp_path)
    keygen(Path("keys"), passphrase=True)
    text = recipe_template("notes.jsonl", labelled(500))
    checkpoint = parse_recipe(text, "t").checkpoint
    named = [*checkpoint.recipients, checkpoint.signing_key, checkpoint.passphrase_file]
    assert len(named) == 3
    assert all(path and path.is_file() for path in named)
    assert "#   securetune checkpoint keygen keys --passphrase\n" in text


def test_number_and_boolean_labels_become_text():
    assert parse_recipe(
        recipe_template("d", [{"text": "a", "label": 0}, {"text": "b", "label": 1}]), "t"
    ).data.labels == ["0", "1"]
    rows = [{"text": "a", "label": True}, {"text": "b", "label": False}]
    assert parse_recipe(recipe_template("d", rows), "t").data.labels == ["false", "true"]


def test_messages_are_generated():
    assert parse_recipe(recipe_template("d", [{"messages": []}]), "t").task == "generate"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no records"),
        (
            [{"a": 1, "b": 2}],
            "the columns must be text and label, prompt and completion, or messages; found a, b",
        ),
        ([{"text": "t", "label": i} for i in range(51)], "more than 50 different values"),
    ],
)
def test_unusable_data(rows, message):
    with pytest.raises(DataError, match=message):
        recipe_template("d.jsonl", rows)


@pytest.mark.parametrize(
    ("labels", "found"), [(["a"], "1 value;"), (["a", "", None], "1 value;"), ([None], "no values;")]
)
def test_one_label_only_is_refused(labels, found):
    rows = [{"text": "t", "label": label} for label in labels]
    with pytest.raises(DataError, match=f"column 'label' holds {found} at least 2"):
        recipe_template("d.jsonl", rows)


def test_a_missing_label_is_no_label():
    recipe = parse_recipe(recipe_template("d.csv", [*labelled(10), {"text": "t", "label": ""}]), "t")
    assert recipe.data.labels == ["no", "yes"]


def test_every_option_is_there_with_its_description():
    recipe = sample_recipe()
    text = commented_yaml(recipe)
    assert parse_recipe(text, "t") == recipe
    assert "  # The privacy budget. The noise is calibrated so that" in text
    assert "  # Public records, of the same shape as the private ones" in text
    assert "    # Checks in a row without a better score after which" in text


def test_regularisation_is_off_unless_asked_for():
    training = sample_recipe().training
    assert training.early_stopping.method == "none"
    assert training.label_smoothing == training.weight_decay == training.lora.dropout == 0
