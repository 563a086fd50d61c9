"""Batches: right padding that costs no sample its independence, and buckets of similar length."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from securetune.data.encode import Example


@dataclass(frozen=True)
class Batch:
    """A right-padded batch of ``B`` examples, ``T`` tokens long.

    Attributes:
        input_ids: ``[B, T]``, int64: token ids, then padding.
        lengths: ``[B]``, int64: real tokens per row, each at least 1.
        labels: ``[B]``, int64: label indices; ``None`` when the examples carry no label.
        attack_mask: ``[B, T]``, bool: tokens an adversary may touch; never true on padding.
        supervised: ``[B, T]``, bool: tokens the model is trained to predict; never true on padding.
        unit_ids: One privacy unit per row.
    """

    input_ids: Tensor
    lengths: Tensor
    labels: Tensor | None
    attack_mask: Tensor
    supervised: Tensor
    unit_ids: tuple[str, ...]

    def to(self, device: torch.device | str) -> "Batch":
        """Copy the tensors to a device.

        Args:
            device: Where to.

        Returns:
            A batch on ``device``.
        """
        return Batch(
            input_ids=self.input_ids.to(device),
            lengths=self.lengths.to(device),
            labels=None if self.labels is None else self.labels.to(device),
            attack_mask=self.attack_mask.to(device),
            supervised=self.supervised.to(device),
            unit_ids=self.unit_ids,
        )

    def select(self, rows: Tensor) -> "Batch":
        """Take some rows, as long as the longest of them.

        Args:
            rows: ``[A]``, int64: their numbers, at least one.

        Returns:
            A batch of ``A`` examples.
        """
        rows = rows.to(self.lengths.device)
        longest = int(self.lengths[rows].max())
        return Batch(
            input_ids=self.input_ids[rows, :longest],
            lengths=self.lengths[rows],
            labels=None if self.labels is None else self.labels[rows],
            attack_mask=self.attack_mask[rows, :longest],
            supervised=self.supervised[rows, :longest],
            unit_ids=tuple(self.unit_ids[row] for row in rows.tolist()),
        )


def collate(examples: Sequence[Example], *, pad_id: int = 0) -> Batch:
    """Pad examples on the right to the length of the longest.

    Args:
        examples: At least one example; either all or none carry a label.
        pad_id: Written behind the real tokens. Its value has no effect on a causal model's real tokens.

    Returns:
        The batch, on the CPU, rows in the order given.

    Raises:
        ValueError: If there is no example, or only some carry a label.
    """
    if not examples:
        raise ValueError("collate needs at least one example, got none.")
    labels = [example.label for example in examples if example.label is not None]
    if labels and len(labels) < len(examples):
        raise ValueError(f"{len(labels)} of {len(examples)} examples carry a label; give all or none.")
    shape = (len(examples), max(len(example.input_ids) for example in examples))
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    attack_mask = torch.zeros(shape, dtype=torch.bool)
    supervised = torch.zeros(shape, dtype=torch.bool)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[row, :length] = torch.tensor(example.input_ids)
        attack_mask[row, :length] = torch.tensor(example.attack_mask)
        supervised[row, :length] = torch.tensor(example.supervised)
    return Batch(
        input_ids=input_ids,
        lengths=torch.tensor([len(example.input_ids) for example in examples]),
        labels=torch.tensor(labels) if labels else None,
        attack_mask=attack_mask,
        supervised=supervised,
        unit_ids=tuple(example.unit_id for example in examples),
    )


def length_buckets(examples: Sequence[Example], max_tokens: int, *, by_user: bool = False) -> list[list[int]]:
    """Group examples of similar length into micro-batches of bounded padded size.

    Guarantees:
        Every index appears exactly once. A bucket's rows times its longest row is at most ``max_tokens``,
        unless it holds a single example that alone is longer, or ``by_user`` a single user.

    Args:
        examples: What to group; may be empty.
        max_tokens: Largest padded size of a bucket, in tokens, > 0.
        by_user: Keep all examples of one user in one bucket, since they are clipped as one.

    Returns:
        Lists of indices into ``examples``, the longest examples first, so that memory peaks at the start.

    Raises:
        ValueError: If ``max_tokens`` is not positive.
    """
    if max_tokens <= 0:
        raise ValueError(f"max_tokens must be > 0, got {max_tokens}.")
    units: dict[object, list[int]] = {}
    for index, example in enumerate(examples):
        units.setdefault(example.user_id if by_user else index, []).append(index)
    length = {unit: max(len(examples[i].input_ids) for i in indices) for unit, indices in units.items()}
    buckets: list[list[int]] = []
    longest = 0
    for unit in sorted(units, key=lambda unit: -length[unit]):
        if not buckets or (len(buckets[-1]) + len(units[unit])) * longest > max_tokens:
            buckets.append([])
            longest = length[unit]
        buckets[-1].extend(units[unit])
    return buckets
