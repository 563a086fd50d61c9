"""Attacks on a classifier: survivors only, never rising with the budget, errors never counted as robust."""

import pytest
import torch

from securetune.adversarial.embedding import mean_embedding_norm
from securetune.data.encode import Example, encode_records
from securetune.data.records import Record
from securetune.evaluation.accuracy import score_labels
from securetune.evaluation.robustness import add_noise, attack_characters, attack_embeddings, text_predictor
from securetune.models.task import ClassifyHead
from tests.tiny import LABEL_WORDS, tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXTS = [
    f"{mood} film number {number}"
    for number in range(6)
    for mood in ("wonderful", "terrible", "lovely", "boring")
]
OPTIONS = {"norm": "l2_token", "steps": 3, "step_size": None, "seed": 0, "batch_tokens": 400}


@pytest.fixture(scope="module")
def head() -> ClassifyHead:
    return ClassifyHead(tiny_llama(dtype=torch.float64), TOKENIZER, LABEL_WORDS)


@pytest.fixture(scope="module")
def labelled(head) -> list[Example]:
    """Examples whose label is what the model says, except for every sixth."""
    records = [Record.labelled(text, 0) for text in TEXTS]
    scores = score_labels(head, encode(records), batch_tokens=1000)
    said = [0 if correct else 1 for correct in scores.is_correct]
    labels = [1 - label if row % 6 == 5 else label for row, label in enumerate(said)]
    return encode([Record.labelled(text, label) for text, label in zip(TEXTS, labels, strict=True)])


def encode(records: list[Record]) -> list[Example]:
    return encode_records(records, TOKENIZER, task="classify", max_length=64)


def correct(head, examples) -> list[bool]:
    return score_labels(head, examples, batch_tokens=1000).is_correct


def test_robust_accuracy_never_rises_with_the_radius(head, labelled):
    unit = mean_embedding_norm(head.causal)
    radii = [unit * factor for factor in (3.0, 1e-6, 0.3)]
    is_correct = correct(head, labelled)
    largest, tiny, middle = attack_embeddings(head, labelled, is_correct=is_correct, radii=radii, **OPTIONS)
    assert tiny.is_robust == is_correct
    for weaker, stronger in ((tiny, middle), (middle, largest)):
        assert all(a or not b for a, b in zip(weaker.is_robust, stronger.is_robust, strict=True))
    assert sum(largest.is_robust) < sum(is_correct)


def test_unbounded_radius_breaks_nearly_every_text(head, labelled):
    (outcome,) = attack_embeddings(
        head, labelled, is_correct=correct(head, labelled), radii=[1e4], **{**OPTIONS, "steps": 20}
    )
    assert sum(outcome.is_robust) <= 2


def test_attacking_one_text_at_a_time_gives_the_same_result(head, labelled):
    radius = 0.5 * mean_embedding_norm(head.causal)
    is_correct = correct(head, labelled)
    (together,) = attack_embeddings(head, labelled, is_correct=is_correct, radii=[radius], **OPTIONS)
    alone = [
        attack_embeddings(head, [example], is_correct=[right], radii=[radius], **OPTIONS)[0].is_robust[0]
        for example, right in zip(labelled, is_correct, strict=True)
    ]
    assert together.is_robust == alone


def test_text_that_is_wrong_already_is_neither_attacked_nor_robust(head, labelled):
    (outcome,) = attack_embeddings(head, labelled, is_correct=[False] * len(labelled), radii=[1.0], **OPTIONS)
    assert not any(outcome.is_robust)
    assert outcome.mean_queries == 0


def test_broken_texts_cost_no_further_steps(head, labelled):
    is_correct = correct(head, labelled)
    (strong,) = attack_embeddings(
        head, labelled, is_correct=is_correct, radii=[1e4], **{**OPTIONS, "steps": 20}
    )
    assert strong.mean_queries < 10


def test_attack_beats_random_noise_of_the_same_radius(head, labelled):
    radius = mean_embedding_norm(head.causal)
    is_correct = correct(head, labelled)
    (attack,) = attack_embeddings(head, labelled, is_correct=is_correct, radii=[radius], **OPTIONS)
    noise = add_noise(
        head, labelled, is_correct=is_correct, radius=radius, norm="l2_token", seed=0, batch_tokens=400
    )
    assert sum(attack.is_robust) < sum(noise.is_robust)


def test_same_seed_repeats(head, labelled):
    first, second = (
        attack_embeddings(head, labelled, is_correct=correct(head, labelled), radii=[1.0], **OPTIONS)
        for _ in range(2)
    )
    assert first == second


class BrokenHead(ClassifyHead):
    """Gives NaN for texts longer than a limit once their embeddings are perturbed."""

    def logits(self, inputs_embeds, batch):
        scores = super().logits(inputs_embeds, batch)
        is_long = batch.lengths > 28
        perturbed = (inputs_embeds != self.embed(batch)).any(dim=2).any(dim=1)
        return scores.masked_fill((is_long & perturbed)[:, None], float("nan"))


def test_score_that_is_not_finite_is_an_error_and_never_robust(labelled):
    head = BrokenHead(tiny_llama(dtype=torch.float64), TOKENIZER, LABEL_WORDS)
    is_correct = correct(head, labelled)
    (outcome,) = attack_embeddings(head, labelled, is_correct=is_correct, radii=[1e-6], **OPTIONS)
    noise = add_noise(
        head, labelled, is_correct=is_correct, radius=1e-6, norm="l2_token", seed=0, batch_tokens=400
    )
    is_long = [len(example.input_ids) > 28 for example in labelled]
    expected = [right and not long for right, long in zip(is_correct, is_long, strict=True)]
    assert outcome.is_robust == noise.is_robust == expected
    assert outcome.errors == noise.errors == sum(is_correct) - sum(expected) > 0


def test_model_is_left_as_it_was(head, labelled):
    state = torch.get_rng_state()
    modes = [module.training for module in head.model.modules()]
    attack_embeddings(head, labelled[:4], is_correct=[True] * 4, radii=[1.0], **OPTIONS)
    assert [module.training for module in head.model.modules()] == modes
    assert all(parameter.grad is None and parameter.requires_grad for parameter in head.model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_progress_of_the_embedding_attack_rises_to_its_total(head, labelled):
    seen: list[tuple[int, int]] = []
    attack_embeddings(
        head,
        labelled,
        is_correct=correct(head, labelled),
        radii=[0.1, 2.0],
        progress=lambda _, done, total: seen.append((done, total)),
        **OPTIONS,
    )
    assert seen == sorted(seen)
    assert seen[-1] == (2 * len(labelled), 2 * len(labelled))


def test_text_predictor_agrees_with_the_encoded_examples(head, labelled):
    predict = text_predictor(head, TOKENIZER, prompt="{text}\nLabel:", max_length=64, batch_tokens=200)
    margins = score_labels(head, labelled, batch_tokens=1000).margins
    scores = predict(TEXTS)
    for row, example in enumerate(labelled):
        label = example.label or 0
        assert (scores[row, label] - scores[row, 1 - label]).item() == pytest.approx(margins[row], abs=1e-5)


def test_character_attack_skips_wrong_texts_and_breaks_some(head, labelled):
    predict = text_predictor(head, TOKENIZER, prompt="{text}\nLabel:", max_length=64, batch_tokens=2000)
    is_correct = correct(head, labelled)
    asked: list[str] = []
    outcome = attack_characters(
        lambda texts: (asked.extend(texts), predict(texts))[1],
        TEXTS,
        [example.label or 0 for example in labelled],
        is_correct=is_correct,
        max_edits=3,
        max_queries=15,
        seed=0,
    )
    wrong = [text for text, right in zip(TEXTS, is_correct, strict=True) if not right]
    assert not set(wrong) & set(asked)
    assert not any(robust and not right for robust, right in zip(outcome.is_robust, is_correct, strict=True))
    assert sum(outcome.is_robust) < sum(is_correct)
    assert outcome.mean_queries == pytest.approx(len(asked) / sum(is_correct))
