"""``validate``: the recipe and its data, without training."""

import json

import pytest

from tests.sample_recipe import recipe_text
from tests.tiny import tiny_folder

ROWS = [{"text": f"text number {i}", "label": ("negative", "positive")[i % 4 == 0]} for i in range(100)]
LABELS = ["negative", "positive"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def write_run(tmp_path, model_folder):
    def write(rows=ROWS, **changes):
        content = b"".join(
            row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows
        )
        (tmp_path / "data.jsonl").write_bytes(content)
        small = {
            "model.name": str(model_folder),
            "data.labels": LABELS,
            "privacy.expected_batch_size": 8,
            "privacy.sample_rate": 0.1,
        }
        dotted = {name.replace("__", "."): value for name, value in changes.items()}
        (tmp_path / "run.yaml").write_text(recipe_text(small | dotted), encoding="utf-8")
        return "run.yaml"

    return write


def test_counts_labels_and_lengths(run_cli, write_run):
    outcome = run_cli("validate", write_run([*ROWS, ROWS[0]]))
    assert outcome.code == 0, outcome.err
    assert "records   101 read, 1 duplicates removed, 100 left" in outcome.out
    assert "labels    negative 75 (75%), positive 25 (25%)" in outcome.out
    assert "split     about 80 for training and 20 held out" in outcome.out
    assert "0 truncated, 0 dropped" in outcome.out
    assert "warning" not in outcome.out


def test_contradicting_labels_are_screened_as_in_training(run_cli, write_run):
    rows = [*ROWS, {"text": ROWS[0]["text"], "label": "negative"}]
    kept = run_cli("validate", write_run(rows, privacy__enabled=False), "--skip-lengths")
    assert "101 left" in kept.out
    assert "warning   2 records share their text with a record of another label" in kept.out
    screened = run_cli(
        "validate",
        write_run(rows, privacy__enabled=False, data__screen="cross_record"),
        "--skip-lengths",
    )
    assert screened.code == 0, screened.err
    assert "101 read, 2 with contradicting labels dropped, 0 duplicates removed, 99 left" in screened.out
    assert "share their text" not in screened.out


def test_nothing_left_after_screening_is_refused(run_cli, write_run):
    rows = [{"text": "t", "label": label} for label in LABELS]
    outcome = run_cli(
        "validate",
        write_run(rows, privacy__enabled=False, data__screen="cross_record"),
        "--skip-lengths",
    )
    assert outcome.code == 2
    assert "no record is left: each text appears with several labels" in outcome.err


def test_private_data_smaller_than_the_expected_batch(run_cli, write_run):
    outcome = run_cli("validate", write_run(privacy__expected_batch_size=81, privacy__sample_rate=0.5))
    assert outcome.code == 2
    assert (
        "DataError: there are 80 training records, fewer than privacy.expected_batch_size = 81" in outcome.err
    )


def test_constants_far_from_the_data_are_named(run_cli, write_run):
    outcome = run_cli("validate", write_run(privacy__sample_rate=0.5), "--skip-lengths")
    assert outcome.code == 0
    assert "privacy.sample_rate = 0.1 would match" in outcome.out


def test_an_overlong_record_is_refused_or_truncated(run_cli, write_run):
    rows = [*ROWS, {"text": "x" * 500, "label": "positive"}]
    refused = run_cli("validate", write_run(rows))
    assert refused.code == 2
    assert "over data.max_length = 128 tokens" in refused.err
    assert "xxx" not in refused.err
    assert "1 truncated, 0 dropped" in run_cli("validate", write_run(rows, data__on_overlong="truncate")).out
    assert "0 truncated, 1 dropped" in run_cli("validate", write_run(rows, data__on_overlong="drop")).out


def test_a_label_word_of_several_tokens_is_refused(run_cli, write_run):
    outcome = run_cli("validate", write_run(data__label_words=[" negative", " wonderful"]))
    assert outcome.code == 2
    assert "wonderful" in outcome.err


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "empty"),
        ([b"\n"], "no records"),
        ([*ROWS, b'{"text": "\xff", "label": "positive"}\n'], "line 101: not valid UTF-8"),
        ([{"text": "a", "label": "neutral"}], "labels that are not in data.labels: 'neutral'"),
        ([{"text": "", "label": "positive"}], "text is empty"),
        ([{"words": "a", "label": "positive"}], "text"),
    ],
)
def test_unusable_data(run_cli, write_run, rows, message):
    outcome = run_cli("validate", write_run(rows), "--skip-lengths")
    assert outcome.code == 2
    assert outcome.err.startswith("DataError: ")
    assert message in outcome.err


def test_missing_data_file(run_cli, write_run, tmp_path):
    config = write_run()
    (tmp_path / "data.jsonl").unlink()
    outcome = run_cli("validate", config)
    assert outcome.code == 2
    assert "data.jsonl" in outcome.err


def test_overrides_are_applied(run_cli, write_run):
    outcome = run_cli("validate", write_run(), "--skip-lengths", "--set", "data.held_out_fraction=0.5")
    assert "about 50 for training and 50 held out" in outcome.out


def test_users_are_counted_and_split(run_cli, write_run):
    rows = [{**row, "author": number // 5} for number, row in enumerate(ROWS)]
    changes = {"privacy__unit": "user", "privacy__max_records_per_user": 4, "data__user_field": "author"}
    changes |= {"privacy__sample_rate": 0.5}
    outcome = run_cli("validate", write_run(rows, **changes), "--skip-lengths")
    assert outcome.code == 0, outcome.err
    assert "users     20, with 5 to 5 records (median 5); 20 have more than the 4 of a step" in outcome.out
    assert "split     about 16 users for training and 4 held out" in outcome.out
    missing = run_cli("validate", write_run(**changes), "--skip-lengths")
    assert missing.code == 2
    assert "column 'author' missing" in missing.err


STOPPING = {"training__early_stopping__method": "public_validation", "training__early_stopping__every": 2}


class TestPublicValidation:
    def check(self, run_cli, write_run, tmp_path, rows, *options, **changes):
        content = "\n".join(json.dumps(row) for row in rows)
        (tmp_path / "public.jsonl").write_text(content, encoding="utf-8")
        public = {"data__public_validation": {"path": "public.jsonl"}}
        return run_cli("validate", write_run(**(public | STOPPING | changes)), *options)

    def test_is_counted_and_measured_like_the_private_records(self, run_cli, write_run, tmp_path):
        rows = [{"text": f"a public text {i}", "label": "negative"} for i in range(7)]
        outcome = self.check(run_cli, write_run, tmp_path, rows)
        assert outcome.code == 0, outcome.err
        assert "public    7 validation records read, none of them private too" in outcome.out
        assert "public    median " in outcome.out

    def test_a_record_that_is_private_too_is_refused(self, run_cli, write_run, tmp_path):
        rows = [{"text": "a public text", "label": "negative"}, {**ROWS[3], "label": "positive"}]
        outcome = self.check(run_cli, write_run, tmp_path, rows, "--skip-lengths")
        assert outcome.code == 2
        assert "data.public_validation: 1 of its 2 records are private records too" in outcome.err

    def test_a_bad_row_is_refused(self, run_cli, write_run, tmp_path):
        outcome = self.check(run_cli, write_run, tmp_path, [{"text": "", "label": "negative"}])
        assert outcome.code == 2
        assert "record 1 (line 1): text is empty" in outcome.err

    def test_a_file_that_is_not_there_is_named_with_its_option(self, run_cli, write_run):
        changes = {"data__public_validation": {"path": "nowhere.jsonl"}, **STOPPING}
        outcome = run_cli("validate", write_run(**changes), "--skip-lengths")
        assert outcome.code == 2
        assert "data.public_validation.path: there is no file 'nowhere.jsonl'" in outcome.err

    def test_records_that_are_all_too_long_are_refused(self, run_cli, write_run, tmp_path):
        rows = [{"text": "long " * 500, "label": "negative"}]
        outcome = self.check(run_cli, write_run, tmp_path, rows, data__on_overlong="drop")
        assert outcome.code == 2
        assert "data.public_validation: all 1 records are longer than data.max_length (128)" in outcome.err
