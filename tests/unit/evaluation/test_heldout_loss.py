"""Held-out loss: per token over texts, in any batching."""

import math

import pytest
import torch
from torch.nn import functional as F

from securetune.data.encode import encode_records
from securetune.data.records import Record
from securetune.evaluation.heldout_loss import loss_per_token, score_texts
from securetune.models.task import GenerateHead
from tests.tiny import tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
RECORDS = [
    Record.completed("Q: 2+2? A:", " four"),
    Record.completed("", "hi"),
    Record.completed("a", "bcdefgh ij"),
]
EXAMPLES = encode_records(RECORDS, TOKENIZER, task="generate", max_length=64)


def test_losses_equal_those_of_the_whole_model():
    model = tiny_llama()
    scores = score_texts(GenerateHead(model), EXAMPLES, batch_tokens=30)
    for row, example in enumerate(EXAMPLES):
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        targets = torch.where(torch.tensor(example.supervised)[1:], ids[0, 1:], -100)
        assert scores.losses[row] == pytest.approx(F.cross_entropy(logits, targets).item(), abs=1e-4)
        assert scores.num_tokens[row] == sum(example.supervised)


def test_loss_per_token_weighs_texts_by_their_tokens():
    estimate = loss_per_token([2.0, 4.0], [1, 3])
    assert estimate.value == 3.5
    assert estimate.interval.low < 3.5 < estimate.interval.high


def test_untrained_model_knows_nothing():
    model = tiny_llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    scores = score_texts(GenerateHead(model), EXAMPLES, batch_tokens=100)
    estimate = loss_per_token(scores.losses.tolist(), scores.num_tokens.tolist())
    assert estimate.value == pytest.approx(math.log(len(TOKENIZER)), abs=1e-5)
