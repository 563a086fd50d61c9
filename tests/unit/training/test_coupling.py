import re

import pytest
import torch

from securetune.errors import PrivacyError
from securetune.training.coupling import refuse_coupled_losses

ROWS = [[1, 2, 3], [4, 5, 6, 7, 8], [9, 1]]


def collate(rows, side="right"):
    width = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        padding = [0] * (width - len(row))
        ids.append(row + padding if side == "right" else padding + row)
        kept = [1] * len(row)
        mask.append(kept + padding if side == "right" else padding + kept)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def compare(losses_of, rows=ROWS, side="right", *, is_coarse=False):
    return refuse_coupled_losses(
        collate(rows, side), len(rows), losses_of, lambda row: collate([rows[row]], side), is_coarse=is_coarse
    )


def own_mean(batch):
    mask = batch["attention_mask"].double()
    return (batch["input_ids"] * mask).sum(dim=1) / mask.sum(dim=1)


def padded_mean(batch):
    return batch["input_ids"].double().mean(dim=1)


@pytest.mark.parametrize("side", ["right", "left"])
def test_loss_of_each_record_alone_passes_and_tells(side):
    assert compare(own_mean, side=side)


def test_records_of_one_length_tell_nothing_about_padding():
    assert not compare(padded_mean, [[1, 2], [3, 4]])


@pytest.mark.parametrize("side", ["right", "left"])
def test_mean_over_the_padded_length_is_refused_without_a_private_number(side):
    with pytest.raises(PrivacyError, match="batch-mates") as caught:
        compare(padded_mean, side=side)
    assert not re.search(r"\d", str(caught.value))


def test_divisor_of_the_batch_is_refused():
    with pytest.raises(PrivacyError, match="batch-mates"):
        compare(lambda batch: own_mean(batch) / batch["attention_mask"].sum())


def test_mean_over_the_batch_is_refused_by_its_shape():
    with pytest.raises(PrivacyError, match="one value per record"):
        compare(lambda batch: own_mean(batch).mean())


@pytest.mark.parametrize("is_coarse", [False, True])
def test_rounding_of_half_precision_is_allowed_where_it_is_used(is_coarse):
    def rounded(batch):
        return own_mean(batch) * (1.0 if len(batch["input_ids"]) == 1 else 1.01)

    if is_coarse:
        assert compare(rounded, is_coarse=True)
        return
    with pytest.raises(PrivacyError, match="batch-mates"):
        compare(rounded)
