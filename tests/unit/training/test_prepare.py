"""What early stopping looks at: public records that are not private too, or held-out ones of its own."""

import json

import pytest

from securetune.config.loader import load_recipe
from securetune.errors import DataError
from securetune.training.folder import RunFolder
from securetune.training.prepare import prepare_data
from tests.sample_run import make_workshop, write_recipe
from tests.tiny import tiny_tokenizer

DATA = {"labels": ["negative", "positive"], "held_out_fraction": 0.3, "min_held_out": 90}
NOISY = {"method": "noisy_test", "epsilon": 1.0, "every": 1, "num_texts": 30}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return make_workshop(tmp_path_factory.mktemp("workshop"))


def prepare(workshop, name, stopping, **data):
    training = {"learning_rate": 0.01, "early_stopping": stopping}
    data = {**DATA, "private": {"path": str(workshop / "labelled.jsonl")}, **data}
    recipe = load_recipe(write_recipe(workshop, name, training=training, data=data, publish={}))
    with RunFolder.open(recipe, resume=True) as run:
        return prepare_data(recipe, run, tiny_tokenizer())


def write_public(workshop, texts):
    path = workshop / "public.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "label": "positive"}) for text in texts))
    return {"public_validation": {"path": str(path)}}


def test_nothing_is_looked_at_without_early_stopping(workshop):
    assert prepare(workshop, "off", {"method": "none"}).validation == []


def test_noisy_tests_have_held_out_records_of_their_own(workshop):
    data = prepare(workshop, "noisy", NOISY)
    tested = {example.unit_id for example in data.validation}
    assert len(tested) == 30
    assert tested <= {example.unit_id for example in data.held_out}
    assert not tested & {example.unit_id for example in [*data.train, *data.held_out[:60]]}


def test_too_few_held_out_records_that_fit_are_refused(workshop):
    with pytest.raises(
        DataError, match=r"held-out records fit data\.max_length, fewer than .* \(30\) and the 60"
    ):
        prepare(workshop, "short", NOISY, on_overlong="drop", max_length=30)


def test_public_records_are_encoded_as_private_ones(workshop):
    public = write_public(workshop, ["it was public", "it was known"])
    data = prepare(workshop, "public", {"method": "public_validation", "every": 1}, **public)
    assert [example.label for example in data.validation] == [1, 1]
    assert not {e.unit_id for e in data.validation} & {e.unit_id for e in [*data.train, *data.held_out]}


def test_a_record_that_is_public_and_private_is_refused(workshop):
    first = json.loads((workshop / "labelled.jsonl").read_text().splitlines()[0])
    public = write_public(workshop, ["it was public", first["text"]])  # with any label
    with pytest.raises(DataError, match="1 of its 2 records are private records too"):
        prepare(workshop, "shared", {"method": "public_validation", "every": 1}, **public)


def test_public_records_that_are_all_too_long_are_refused(workshop):
    public = write_public(workshop, ["long " * 200])
    with pytest.raises(DataError, match=r"all 1 records are longer than data\.max_length"):
        prepare(
            workshop,
            "long",
            {"method": "public_validation", "every": 1},
            on_overlong="drop",
            **public,
        )


def test_other_records_than_the_run_began_with_are_refused(workshop):
    lines = (workshop / "labelled.jsonl").read_text().splitlines()
    path = workshop / "changing.jsonl"
    source = {"private": {"path": str(path)}}

    def prepare_these(lines):
        path.write_text("\n".join(lines))
        return prepare(workshop, "changing", {"method": "none"}, **source)

    prepare_these(lines[:-1])
    first = prepare_these(lines)  # nothing was trained yet
    (workshop / "changing" / "ledger.jsonl").touch()
    again = prepare_these(lines[::-1])
    assert {example.unit_id for example in again.train} == {example.unit_id for example in first.train}
    with pytest.raises(DataError, match=r"not those that the run in .* began with"):
        prepare_these(lines[:-1])
