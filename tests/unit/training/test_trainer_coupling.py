"""PrivateTrainer refuses losses in which one record depends on its batch-mates."""

import re

import pytest
import torch
from torch.nn import functional
from transformers import (
    DataCollatorForSeq2Seq,
    GPT2Config,
    GPT2LMHeadModel,
)

from securetune.errors import PrivacyError
from securetune.privacy.ledger import read_ledger
from securetune.training.trainer import per_sequence_losses
from tests.private_trainer import (
    ROWS,
    trainer_for,
)
from tests.tiny import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("calibrated_once")


def test_loss_with_a_divisor_counted_over_the_batch_is_refused(tmp_path):
    def coupled(outputs, labels, num_items_in_batch=None):
        losses = per_sequence_losses(outputs.logits, labels, is_shifted=True)
        return losses / (labels != -100).sum()

    trainer = trainer_for(tmp_path, compute_loss_func=coupled, sample_rate=1.0, target_epsilon=50.0)
    for _ in range(2):  # who tries again is refused again
        with pytest.raises(PrivacyError, match="batch-mates"):
            trainer.train()
    assert read_ledger(tmp_path / "out" / "ledger.jsonl").steps_charged == 0


def padded_mean(outputs, labels, num_items_in_batch=None):
    """A mean over the padded length, which is that of the longest batch-mate."""
    return functional.cross_entropy(
        outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none"
    ).mean(dim=1)


@pytest.mark.parametrize("side", ["right", "left"])
def test_loss_that_depends_on_the_padding_is_refused(tmp_path, side):
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    trainer = trainer_for(
        tmp_path, compute_loss_func=padded_mean, sample_rate=1.0, target_epsilon=50.0,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )  # fmt: skip
    with pytest.raises(PrivacyError, match="batch-mates") as caught:
        trainer.train()
    assert not re.search(r"\d", str(caught.value))  # errors are logged, and losses are private
    assert read_ledger(tmp_path / "out" / "ledger.jsonl").steps_charged == 0


def test_padding_to_a_public_length_may_enter_the_loss(tmp_path):
    collator = DataCollatorForSeq2Seq(tiny_tokenizer(), padding="max_length", max_length=80)
    trainer = trainer_for(
        tmp_path, compute_loss_func=padded_mean, sample_rate=1.0, target_epsilon=50.0, data_collator=collator
    )
    assert trainer.train().global_step == 2


def tiny_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=128, resid_pdrop=0.0,
                   embd_pdrop=0.0, attn_pdrop=0.0)
    )  # fmt: skip


@pytest.mark.parametrize("multiple", [None, 16])
def test_absolute_positions_that_padding_moves_are_refused(tmp_path, multiple):
    tokenizer = tiny_tokenizer()
    for side in ("right", "left"):
        tokenizer.padding_side = side
        collator = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=multiple)
        trainer = trainer_for(
            tmp_path, tiny_gpt2(), sample_rate=1.0, target_epsilon=50.0, data_collator=collator,
            ledger=tmp_path / f"{side}.jsonl",
        )  # fmt: skip
        if side == "right":
            trainer.train()
            continue
        with pytest.raises(PrivacyError, match="batch-mates"):
            trainer.train()


def test_records_of_one_length_do_not_end_the_search_for_coupling(tmp_path):
    rows = [ROWS[0], ROWS[0], ROWS[0], ROWS[2]]
    trainer = trainer_for(
        tmp_path, train_dataset=rows, compute_loss_func=padded_mean, sample_rate=1.0, target_epsilon=50.0
    )
    with pytest.raises(PrivacyError, match="batch-mates"):
        trainer.train()
