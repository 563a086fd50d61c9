"""Batches of similar length, on a CPU several at once."""

from collections.abc import Callable, Sequence

import torch

from securetune.data.collate import Batch, collate, length_buckets
from securetune.data.encode import Example
from securetune.models.concurrent import num_at_once, run_at_once

Progress = Callable[[str, int, int], None]
"""Called with the stage, the number of texts done and the number of texts in the stage."""


def for_each_batch(
    work: Callable[[list[int], Batch], None],
    examples: Sequence[Example],
    batch_tokens: int,
    *,
    device: torch.device,
    stage: str = "",
    progress: Progress | None = None,
) -> None:
    """Call a function with each batch, on a CPU with several batches at once.

    Args:
        work: Called with the positions of a batch's rows in ``examples`` and the batch, perhaps from another
            thread: gradient modes of the caller do not hold there.
        examples: What to batch.
        batch_tokens: Most tokens at a time, padding included, > 0.
        device: Where the model is.
        stage: Name for ``progress``.
        progress: See ``Progress``; called from the caller's thread.
    """

    def run(rows: list[int]) -> int:
        work(rows, collate([examples[row] for row in rows]))
        return len(rows)

    at_once = num_at_once(device)
    done = 0
    for count in run_at_once(run, length_buckets(examples, max(1, batch_tokens // at_once)), at_once):
        done += count
        if progress is not None:
            progress(stage, done, len(examples))
