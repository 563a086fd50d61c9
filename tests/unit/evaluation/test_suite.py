"""The evaluation of a model: the same texts for all, resumable after every stage."""

import dataclasses
import json

import pytest

from securetune.config.schema import EvaluationConfig
from securetune.data.encode import encode_records
from securetune.data.records import Record
from securetune.evaluation.findings import compare, summarise
from securetune.evaluation.results import ModelEvaluation
from securetune.evaluation.suite import EvaluationTexts, evaluate_model
from securetune.models.task import ClassifyHead, GenerateHead
from tests.tiny import LABEL_WORDS, tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
CONFIG = EvaluationConfig(
    num_texts=20,
    num_membership=24,
    num_attacked=8,
    pgd_radii=[0.4, 0.1],
    pgd_steps=2,
    character_queries=6,
    character_edits=2,
    batch_tokens=400,
)
ARTEFACT = "a" * 64


def texts(config: EvaluationConfig = CONFIG) -> EvaluationTexts:
    held_out = [Record.labelled(f"a film, number {row}", row % 2) for row in range(30)]
    members = [Record.labelled(f"some book, volume {row}", row % 2) for row in range(30)]
    return EvaluationTexts.draw(
        encode_records(held_out, TOKENIZER, task="classify", max_length=64),
        encode_records(members, TOKENIZER, task="classify", max_length=64),
        config,
        raw=[record.text or "" for record in held_out],
    )


def head(seed: int = 0) -> ClassifyHead:
    return ClassifyHead(tiny_llama(seed=seed), TOKENIZER, LABEL_WORDS)


def evaluate(model_head=None, config=CONFIG, **options) -> ModelEvaluation:
    options = {"subject": "base", "artefact": ARTEFACT, **options}
    return evaluate_model(model_head or head(), TOKENIZER, texts(config), config, **options)


@pytest.fixture(scope="module")
def evaluation() -> ModelEvaluation:
    return evaluate()


def test_every_stage_has_one_result_per_text(evaluation):
    assert len(evaluation.is_correct) == len(evaluation.losses) == 20
    assert len(evaluation.member_losses) == len(evaluation.non_member_losses) == 12
    assert [record.params["radius"] for record in evaluation.embedding] == [0.1, 0.4]
    for record in (*evaluation.embedding, evaluation.noise, evaluation.characters):
        assert len(record.is_robust) == 8
        assert not any(
            robust and not right
            for robust, right in zip(record.is_robust, evaluation.is_correct, strict=False)
        )


def test_time_of_every_stage_is_kept(evaluation):
    assert list(evaluation.seconds) == ["accuracy", "membership", "embedding attack", "character attack"]
    assert all(seconds > 0 for seconds in evaluation.seconds.values())


def test_evaluation_repeats_with_its_seed(evaluation):
    again = evaluate()
    assert dataclasses.replace(again, seconds={}) == dataclasses.replace(evaluation, seconds={})


def test_evaluation_killed_after_any_stage_ends_in_the_same_result(evaluation):
    saved: list[str] = []
    evaluate(save=lambda result: saved.append(json.dumps(result.to_dict())))
    assert len(saved) == 4
    for number, text in enumerate(saved):
        stages: set[str] = set()
        previous = ModelEvaluation.from_dict(json.loads(text))
        resumed = evaluate(previous=previous, progress=lambda stage, *_, seen=stages: seen.add(stage))
        assert len(stages) == 3 - number
        assert dataclasses.replace(resumed, seconds={}) == dataclasses.replace(evaluation, seconds={})


@pytest.mark.parametrize(
    "change",
    [{"artefact": "b" * 64}, {"norm": "linf"}, {"config": CONFIG.model_copy(update={"pgd_steps": 1})}],
)
def test_results_of_another_model_or_other_settings_are_not_reused(evaluation, change, caplog):
    stages: set[str] = set()
    evaluate(previous=evaluation, progress=lambda stage, *_: stages.add(stage), **change)
    assert len(stages) == 4
    assert "evaluated anew" in caplog.text


def test_fewer_texts_than_asked_for_are_all_used():
    config = CONFIG.model_copy(update={"num_texts": 1000, "num_membership": 1000, "num_attacked": 500})
    drawn = texts(config)
    assert (len(drawn.scored), len(drawn.members), drawn.num_non_members, drawn.num_attacked) == (
        30,
        30,
        30,
        30,
    )


def test_blind_baseline_sees_members_that_read_differently():
    config = CONFIG.model_copy(update={"num_membership": 60})
    assert texts().check_split(seed=0) is None  # twelve on a side say nothing
    many = texts(config)
    drawn = dataclasses.replace(many, members=many.members * 2, scored=many.scored * 2, num_non_members=60)
    estimate = drawn.check_split(seed=0)
    assert estimate is not None
    assert estimate.interval.low > 0.5


def test_two_models_are_compared_on_the_same_texts(evaluation):
    other = evaluate(head(seed=1), subject="plain", artefact="b" * 64)
    evidence = compare(other, evaluation)
    assert {item.subject for item in evidence} == {"plain - base"}
    right = [sum(result.is_correct) / 20 for result in (other, evaluation)]
    assert evidence[0].value == pytest.approx(right[0] - right[1])


def test_evidence_of_a_whole_evaluation(evaluation):
    other = evaluate(head(seed=1), subject="plain", artefact="b" * 64)
    evidence = {(item.metric, item.params.get("radius")): item for item in summarise(other, base=evaluation)}
    assert evidence["accuracy", None].n == 20
    assert evidence["accuracy_pgd", 0.4].n == 8
    assert evidence["accuracy_pgd", 0.1].value >= evidence["accuracy_pgd", 0.4].value
    assert evidence["membership_auc", None].params["attack"] in ("loss", "calibrated")
    assert evidence["membership_tpr_at_1pct_fpr", None].status == "not_run"
    assert all(item.private_statistic and item.artefact == "b" * 64 for item in evidence.values())


def test_generating_model_reports_loss_and_membership():
    records = [Record.completed("question ", f"answer {row}") for row in range(40)]
    examples = encode_records(records, TOKENIZER, task="generate", max_length=64)
    drawn = EvaluationTexts.draw(examples[:20], examples[20:], CONFIG)
    results = [
        evaluate_model(
            GenerateHead(tiny_llama(seed=seed)), TOKENIZER, drawn, CONFIG, subject=name, artefact=name[0] * 64
        )
        for seed, name in enumerate(("base", "fine"))
    ]
    evidence = summarise(results[1], base=results[0])
    assert [item.metric for item in evidence] == [
        "heldout_loss",
        "membership_auc",
        "membership_tpr_at_1pct_fpr",
        "memorisation_gap",
    ]
    (difference,) = compare(results[1], results[0])
    assert difference.metric == "heldout_loss_difference"
    losses = [summarise(result)[0].value for result in results]
    assert difference.value == pytest.approx(losses[1] - losses[0])


def test_texts_that_do_not_fit_the_examples_are_refused():
    with pytest.raises(ValueError, match=r"one text per held-out example \(20\), got 1"):
        EvaluationTexts.draw(texts().scored, [], CONFIG, raw=["one"])
