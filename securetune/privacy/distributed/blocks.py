"""The blocks of a model, which sharded strategies gather and reduce one after another."""

import re
from collections.abc import Iterator, Sequence
from itertools import groupby

from securetune.privacy.per_sample.gradients import TrainableParameter

_BLOCK = re.compile(r"^(.*?\.\d+)\.")


def group_by_block(parameters: Sequence[TrainableParameter]) -> Iterator[list[TrainableParameter]]:
    """Split the trainable parameters at the borders of the model's numbered layers.

    Args:
        parameters: In canonical order.

    Yields:
        Parameters that lie together: of one numbered layer (``model.layers.7``), or of one module elsewhere.
    """
    for _, block in groupby(parameters, key=lambda place: _block_of(place.name)):
        yield list(block)


def _block_of(name: str) -> str:
    found = _BLOCK.match(name)
    return found[1] if found else name.rpartition(".")[0]
