"""Clean accuracy: exact scores in any batching, and a model left as it was."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from securetune.data.collate import collate
from securetune.data.encode import Example, encode_records
from securetune.data.records import Record
from securetune.evaluation.accuracy import LabelScores, score_labels
from securetune.models.task import ClassifyHead
from tests.tiny import LABEL_WORDS, tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXTS = ["a good film", "bad", "it is what it is, no more", "never again!", "fine cast"]


def examples() -> list[Example]:
    records = [Record.labelled(text, row % 2) for row, text in enumerate(TEXTS)]
    return encode_records(records, TOKENIZER, task="classify", max_length=64)


@pytest.fixture
def head() -> ClassifyHead:
    return ClassifyHead(tiny_llama(), TOKENIZER, LABEL_WORDS)


def test_scores_equal_those_of_one_text_at_a_time(head):
    scores = score_labels(head, examples(), batch_tokens=80)
    for row, example in enumerate(examples()):
        batch = collate([example])
        logits = head.logits(head.embed(batch), batch).detach()
        right, wrong = logits[0, row % 2], logits[0, 1 - row % 2]
        assert scores.margins[row] == pytest.approx((right - wrong).item(), abs=1e-5)
        loss = F.cross_entropy(logits, torch.tensor([row % 2])).item()
        assert scores.losses[row] == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_batch_size_does_not_change_the_result(head, batch_tokens):
    expected = score_labels(head, examples(), batch_tokens=100)
    scores = score_labels(head, examples(), batch_tokens=batch_tokens)
    np.testing.assert_allclose(scores.margins, expected.margins, atol=1e-5)
    assert scores.is_correct == expected.is_correct


def test_ties_and_broken_scores_are_mistakes():
    scores = LabelScores(np.array([1.0, 0.0, -1.0, math.nan]), np.zeros(4))
    assert scores.is_correct == [True, False, False, False]


def test_model_and_random_state_are_left_as_they_were(head):
    head.model.train()
    state = torch.get_rng_state()
    score_labels(head, examples(), batch_tokens=100)
    assert head.model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in head.model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_progress_counts_texts(head):
    seen: list[tuple[str, int, int]] = []
    score_labels(head, examples(), batch_tokens=40, progress=lambda *update: seen.append(update))
    assert seen[-1] == ("accuracy", 5, 5)
    assert [done for _, done, _ in seen] == sorted({done for _, done, _ in seen})


def test_example_without_label_is_refused(head):
    unlabelled = [Example("u", (5, 6), (True, True), None, (False, False))]
    with pytest.raises(ValueError, match="needs labelled examples"):
        score_labels(head, unlabelled, batch_tokens=10)


def test_no_example_gives_no_score(head):
    assert score_labels(head, [], batch_tokens=10).is_correct == []
