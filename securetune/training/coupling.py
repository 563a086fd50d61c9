"""Whether the loss of a record depends on its batch-mates, found by computing two records together and apart.

Dimensions: ``B`` records.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from securetune.errors import PrivacyError

__all__ = ["refuse_coupled_losses"]

_TOLERANCE, _COARSE_TOLERANCE = 1e-3, 5e-2  # a batch-wide divisor changes a loss by about half of it


def refuse_coupled_losses(
    batch: Mapping[str, Any],
    num_records: int,
    losses_of: Callable[[Mapping[str, Any]], Tensor],
    collate_alone: Callable[[int], Any],
    *,
    is_coarse: bool,
) -> bool:
    """Compute two records' losses together and apart: batch-mates must not change them.

    Apart each has the padding that it would have alone, so the shortest and the longest record are taken.

    Args:
        batch: A collated micro-batch.
        num_records: ``B``, at least 2.
        losses_of: Returns the losses ``[n]`` of ``n`` records, without gradients or anything random.
        collate_alone: Collates the record of a row as a batch of its own.
        is_coarse: Whether something is computed in half precision.

    Returns:
        Whether the two differ in length; where they do not, nothing is known about padding.

    Raises:
        PrivacyError: If there is not one loss for each record, or losses depend on batch-mates.
    """
    lengths = _lengths(batch)
    pair = [0, 1] if lengths is None else [int(lengths.argmin()), int(lengths.argmax())]
    is_telling = lengths is None or bool(lengths[pair[0]] < lengths[pair[1]])
    if pair[0] == pair[1]:
        pair = [0, 1]
    together = losses_of(_select(batch, pair, num_records))
    if together.shape != (2,):
        raise PrivacyError(
            f"the loss must be one value per record: two records gave shape {list(together.shape)}. Use "
            "reduction='none', average within each record, and no collator that packs records together."
        )
    apart = torch.cat(
        [losses_of(_without_mates(batch, row, num_records, collate_alone(row))) for row in pair]
    )
    tolerance = _COARSE_TOLERANCE if is_coarse else _TOLERANCE
    if not torch.allclose(together, apart, rtol=tolerance, atol=tolerance, equal_nan=True):
        raise PrivacyError(
            "the losses of two records differ when they are computed together and apart: they depend on "
            "their batch-mates. Causes: a divisor counted over the batch (num_items_in_batch), a mean "
            "over the padded length, positions that padding on the left moves, batch statistics, "
            "in-batch negatives. Divide by each record's own count, and pad on the right or to a fixed "
            "length."
        )
    return is_telling


def _lengths(batch: Mapping[str, Any]) -> Tensor | None:
    """``[B]``: tokens of each record that are no padding; None where the batch does not tell."""
    mask = batch.get("attention_mask")
    return mask.sum(dim=1) if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _select(batch: Mapping[str, Any], records: list[int], num_records: int) -> dict[str, Any]:
    return {
        name: value[records] if isinstance(value, Tensor) and value.shape[:1] == (num_records,) else value
        for name, value in batch.items()
    }


def _without_mates(batch: Mapping[str, Any], record: int, num_records: int, alone: Any) -> dict[str, Any]:
    """Take one record out of a batch, and the padding off that it has not ``alone``.

    The record is not taken from ``alone`` itself, since a collator may draw at random.
    """
    inputs = _select(batch, [record], num_records)
    lengths = _lengths(inputs)
    if lengths is None or not isinstance(alone, Mapping):
        return inputs
    is_left = not bool(inputs["attention_mask"][0, 0])
    for name, value in inputs.items():
        own = alone.get(name)
        if isinstance(own, Tensor) and isinstance(value, Tensor) and own.ndim == value.ndim >= 2:
            surplus = max(0, value.shape[1] - own.shape[1])
            inputs[name] = value[:, surplus:] if is_left else value[:, : value.shape[1] - surplus]
    return inputs
