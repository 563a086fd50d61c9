"""``init``, ``ls``, ``cp`` and ``schema``."""

import json

import pytest

from securetune.config import load_recipe

ROWS = [{"text": f"text {i}", "label": ("no", "yes")[i % 2]} for i in range(200)]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_init_writes_a_recipe_that_loads(run_cli, tmp_path):
    write_rows(tmp_path / "notes.jsonl", ROWS)
    outcome = run_cli("init", "--data", "notes.jsonl")
    assert outcome.code == 0, outcome.err
    assert "Wrote notes.yaml: task classify, 160 training records" in outcome.out
    assert "Next: securetune checkpoint keygen keys --passphrase; securetune validate notes" in outcome.out
    recipe = load_recipe(tmp_path / "notes.yaml")
    assert recipe.data.labels == ["no", "yes"]
    assert str(recipe.data.private.path) == "notes.jsonl"


def test_init_never_replaces_a_file_unasked(run_cli, tmp_path):
    write_rows(tmp_path / "notes.jsonl", ROWS)
    (tmp_path / "notes.yaml").write_text("mine")
    outcome = run_cli("init", "--data", "notes.jsonl")
    assert outcome.code == 2
    assert "notes.yaml exists already. Choose another name, or replace it with --force." in outcome.err
    assert (tmp_path / "notes.yaml").read_text() == "mine"
    assert run_cli("init", "--data", "notes.jsonl", "--force").code == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b'{"a": 1}\n', "the columns must be text and label, prompt and completion, or messages; found a"),
        (b'{"text": "\xff", "label": "x"}\n', "not valid UTF-8"),
    ],
)
def test_init_with_unusable_data(run_cli, tmp_path, content, message):
    (tmp_path / "notes.jsonl").write_bytes(content)
    outcome = run_cli("init", "--data", "notes.jsonl")
    assert outcome.code == 2
    assert message in outcome.err
    assert not (tmp_path / "notes.yaml").exists()


def test_init_with_a_missing_file(run_cli):
    outcome = run_cli("init", "--data", "missing.jsonl")
    assert outcome.code == 2
    assert "missing.jsonl" in outcome.err


def test_ls_names_what_cp_copies(run_cli, tmp_path):
    names = [line.split()[1] for line in run_cli("ls").out.splitlines()]
    assert "quickstart" in names
    for name in names:
        assert run_cli("cp", name).code == 0
    assert (tmp_path / "quickstart.yaml").is_file()
    load_recipe(tmp_path / "quickstart.yaml")


def test_cp_into_a_folder_and_under_a_name(run_cli, tmp_path):
    (tmp_path / "folder").mkdir()
    assert run_cli("cp", "sms", "folder").code == 0
    assert run_cli("cp", "sms", "mine.yaml").code == 0
    assert (tmp_path / "folder" / "sms.yaml").read_text() == (tmp_path / "mine.yaml").read_text()


def test_cp_refuses_to_replace(run_cli, tmp_path):
    (tmp_path / "sms.yaml").write_text("mine")
    assert "exists already" in run_cli("cp", "sms").err
    assert (tmp_path / "sms.yaml").read_text() == "mine"


def test_cp_suggests_a_name(run_cli):
    outcome = run_cli("cp", "quikstart")
    assert outcome.code == 2
    assert "Did you mean 'quickstart'?" in outcome.err


def test_schema_is_json(run_cli):
    assert json.loads(run_cli("schema").out)["title"] == "Recipe"
