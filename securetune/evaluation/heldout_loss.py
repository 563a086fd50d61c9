"""Held-out loss of a generating model, in nats per supervised token."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from securetune.adversarial.embedding import attack_mode
from securetune.data.collate import Batch
from securetune.data.encode import Example
from securetune.evaluation.batches import Progress, for_each_batch
from securetune.evaluation.statistics import Estimate, ratio
from securetune.models.task import GenerateHead


@dataclass(frozen=True)
class TextLosses:
    """The loss of ``N`` texts.

    Attributes:
        losses: ``[N]``, float64: mean loss of each text's supervised tokens, in nats.
        num_tokens: ``[N]``, int64: how many those are.
    """

    losses: NDArray[np.float64]
    num_tokens: NDArray[np.int64]


def score_texts(
    head: GenerateHead,
    examples: Sequence[Example],
    *,
    batch_tokens: int,
    stage: str = "held-out loss",
    progress: Progress | None = None,
) -> TextLosses:
    """Compute the loss of each text, in batches of similar length.

    Guarantees:
        The model's parameters, gradients, mode and the global random state are the same after as before.

    Args:
        head: The model under test.
        examples: ``N`` examples with supervised tokens.
        batch_tokens: Most tokens of a batch, padding included, > 0.
        stage: Name for ``progress``.
        progress: See ``Progress``.

    Returns:
        Losses and token counts, in the order of ``examples``.
    """
    losses, num_tokens = np.empty(len(examples)), np.empty(len(examples), dtype=np.int64)

    @torch.no_grad()  # what a sharded model gathers in inference mode could not be trained on after
    def score(rows: list[int], batch: Batch) -> None:
        losses[rows] = head.losses(head.embed(batch), batch).double().cpu().numpy()
        num_tokens[rows] = head.num_supervised(batch).cpu().numpy()

    with attack_mode(head.model):
        for_each_batch(score, examples, batch_tokens, device=head.device, stage=stage, progress=progress)
    return TextLosses(losses, num_tokens)


def loss_per_token(losses: Sequence[float], num_tokens: Sequence[int]) -> Estimate:
    """Estimate the loss of a token over independent texts, or a paired difference of it.

    Args:
        losses: ``[n]``, n >= 2: mean loss of each text in nats, or the difference of two models' mean losses.
        num_tokens: ``[n]``: supervised tokens of each text.

    Returns:
        Nats per supervised token, with its interval.

    Raises:
        ValueError: If a loss is not finite, or no text has a supervised token.
    """
    weights = np.asarray(num_tokens, dtype=np.float64)
    return ratio(np.asarray(losses, dtype=np.float64) * weights, weights)
