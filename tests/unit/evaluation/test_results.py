"""Saved evaluations: plain JSON that reads back as what was written."""

import json

import pytest

from securetune.evaluation.results import AttackRecord, ModelEvaluation
from securetune.evaluation.robustness import AttackOutcome

RECORD = AttackRecord.of(AttackOutcome([True, False], 1, 2.5), params={"radius": 0.2, "steps": 3}, seed=4)
FULL = ModelEvaluation(
    subject="plain",
    artefact="a" * 64,
    fingerprint="f",
    num_non_members=1,
    is_correct=[True, False],
    losses=[0.5, None],
    member_losses=[0.1],
    embedding=[RECORD],
    noise=RECORD,
    characters=RECORD,
    seconds={"accuracy": 1.5},
)


@pytest.mark.parametrize("evaluation", [FULL, ModelEvaluation("base", "b" * 64, "f", 0)])
def test_evaluation_survives_json(evaluation):
    text = json.dumps(evaluation.to_dict(), allow_nan=False)
    assert ModelEvaluation.from_dict(json.loads(text)) == evaluation


def test_non_members_are_the_first_scored_texts():
    assert FULL.non_member_losses == [0.5]


@pytest.mark.parametrize("change", [{"extra": 1}, {"noise": {"params": {}}}])
def test_unknown_or_missing_field_is_refused(change):
    with pytest.raises(ValueError, match="not a saved evaluation of this version"):
        ModelEvaluation.from_dict(FULL.to_dict() | change)


def test_evaluation_without_a_field_is_refused():
    saved = FULL.to_dict()
    del saved["embedding"]
    with pytest.raises(ValueError, match="embedding"):
        ModelEvaluation.from_dict(saved)
