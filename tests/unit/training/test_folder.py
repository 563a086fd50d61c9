"""The run folder: one run at a time, one recipe a folder, results whole or absent."""

import subprocess
import sys

import pytest

from securetune.config import parse_recipe
from securetune.errors import ConfigError, MachineError
from securetune.training.folder import RunFolder
from tests.sample_recipe import recipe_text


def recipe(tmp_path, **changes):
    text = recipe_text(
        {"run_dir": str(tmp_path / "run"), **{k.replace("__", "."): v for k, v in changes.items()}}
    )
    return parse_recipe(text, "recipe.yaml")


def test_resuming_needs_the_word_and_the_same_recipe(tmp_path):
    with RunFolder.open(recipe(tmp_path), resume=False) as run:
        run.save("thing", {"a": 1})
        run.save("trained_plain", {})
    with (
        pytest.raises(ConfigError, match=r"already holds a run\. Add --resume"),
        RunFolder.open(recipe(tmp_path), resume=False),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="a run of another recipe"),
        RunFolder.open(recipe(tmp_path, privacy__steps=11), resume=True),
    ):
        pass
    with RunFolder.open(recipe(tmp_path), resume=True) as run:
        assert run.load("thing") == {"a": 1}


def test_a_recipe_may_be_corrected_until_something_was_trained(tmp_path):
    with RunFolder.open(recipe(tmp_path), resume=False):
        pass  # stopped before training, by missing data, say
    with RunFolder.open(recipe(tmp_path, privacy__steps=11), resume=False) as run:
        assert "steps: 11" in run.recipe.read_text()


@pytest.mark.parametrize(
    "trace", ["ledger.jsonl", "checkpoint", "work/plain-state", "work/trained_plain.json"]
)
def test_a_run_whose_recipe_is_gone_is_still_a_run(tmp_path, trace):
    with RunFolder.open(recipe(tmp_path), resume=False) as run:
        (run.root / trace).mkdir()
        run.recipe.unlink()
        (run.work / "recipe_digest").unlink()
    for resume in (False, True):
        with pytest.raises(ConfigError), RunFolder.open(recipe(tmp_path), resume=resume):
            pass


def test_lost_key_of_the_split_is_never_replaced(tmp_path):
    with RunFolder.open(recipe(tmp_path), resume=False) as run:
        run.secret("split")
        run.save("trained_plain", {})
        (run.keys / "split.key").unlink()
        with pytest.raises(ConfigError, match=r"split\.key is missing"):
            run.secret("split")


@pytest.mark.parametrize("content", ["", "00", "zz" * 32, "0" * 65, "\u00e9"])
def test_a_damaged_key_of_the_split_is_refused(tmp_path, content):
    with RunFolder.open(recipe(tmp_path), resume=False) as run:
        run.secret("split")
        (run.keys / "split.key").write_text(content)
        with pytest.raises(ConfigError, match=r"split\.key is damaged"):
            run.secret("split")


def test_folder_of_no_run_has_no_key(tmp_path):
    with pytest.raises(ConfigError, match="is missing"):
        RunFolder(tmp_path / "nowhere").secret("split")


def test_resume_of_nothing_starts(tmp_path):
    with RunFolder.open(recipe(tmp_path), resume=True) as run:
        assert run.recipe.is_file()
        assert run.root.stat().st_mode & 0o777 == 0o700


def test_second_process_is_refused(tmp_path):
    code = (
        "import sys\n"
        "from securetune.config import parse_recipe\n"
        "from securetune.training.folder import RunFolder\n"
        "with RunFolder.open(parse_recipe(sys.stdin.read(), 'r.yaml'), resume=True): pass\n"
    )
    with RunFolder.open(recipe(tmp_path), resume=False):
        process = subprocess.run(
            [sys.executable, "-c", code],
            input=recipe_text({"run_dir": str(tmp_path / "run")}),
            capture_output=True,
            text=True,
            check=False,
        )
    assert "another process is running" in process.stderr


def test_folder_of_other_things_is_left_as_it_was(tmp_path):
    (tmp_path / "run").mkdir(mode=0o755)
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with (
        pytest.raises(ConfigError, match=r"run_dir: .*/run holds thesis\.txt and is no run folder"),
        RunFolder.open(recipe(tmp_path), resume=False),
    ):
        pass
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o755
    (tmp_path / "run" / "thesis.txt").unlink()
    with RunFolder.open(recipe(tmp_path), resume=False):
        pass


def test_unwritable_folder_is_named(tmp_path):
    (tmp_path / "run").write_text("a file where the folder should be")
    with (
        pytest.raises(MachineError, match="cannot be written"),
        RunFolder.open(recipe(tmp_path), resume=False),
    ):
        pass


def test_stage_times_add_up_over_restarts(tmp_path):
    with RunFolder.open(recipe(tmp_path), resume=False) as run:
        with run.stage("training"):
            pass
        first = run.stage_times()["training"]
        with pytest.raises(KeyError), run.stage("training"):
            raise KeyError
        assert run.stage_times()["training"] > first


def test_torn_metrics_line_is_left_out(tmp_path):
    with RunFolder.open(recipe(tmp_path), resume=False) as run:
        run.log_metrics({"step": 1})
        with run.metrics.open("a") as file:
            file.write('{"step": 2, "lo')
        run.log_metrics({"step": 3})
        assert [line["step"] for line in run.read_metrics()] == [1, 3]
        assert run.read_metrics()[0]["privacy"] == "not covered by epsilon"


def test_secret_is_random_kept_and_owner_only(tmp_path):
    with RunFolder.open(recipe(tmp_path), resume=False) as run:
        key = run.secret("split")
        assert len(key) == 32
        assert run.secret("split") == key
        assert run.secret("other") != key
        assert (run.keys / "split.key").stat().st_mode & 0o777 == 0o600
