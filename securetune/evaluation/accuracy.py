"""Clean accuracy: one forward pass over the held-out texts, kept per text for everything that follows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from securetune.adversarial.embedding import attack_mode
from securetune.adversarial.margins import label_margins
from securetune.data.collate import Batch
from securetune.data.encode import Example
from securetune.evaluation.batches import Progress, for_each_batch
from securetune.models.task import ClassifyHead


@dataclass(frozen=True)
class LabelScores:
    """What a classifier says about ``N`` labelled texts.

    Attributes:
        margins: ``[N]``, float64: the right label's logit minus the best wrong one's; NaN where a logit is
            not finite.
        losses: ``[N]``, float64: cross-entropy in nats.
    """

    margins: NDArray[np.float64]
    losses: NDArray[np.float64]

    @property
    def is_correct(self) -> list[bool]:
        """``N`` flags: the right label scores strictly highest. Ties and non-finite scores are mistakes."""
        return (self.margins > 0).tolist()


def score_labels(
    head: ClassifyHead,
    examples: Sequence[Example],
    *,
    batch_tokens: int,
    stage: str = "accuracy",
    progress: Progress | None = None,
) -> LabelScores:
    """Classify labelled examples, in batches of similar length.

    Guarantees:
        The model's parameters, gradients, mode and the global random state are the same after as before.

    Args:
        head: The model under test.
        examples: ``N`` examples with labels, in any order.
        batch_tokens: Most tokens of a batch, padding included, > 0.
        stage: Name for ``progress``.
        progress: See ``Progress``.

    Returns:
        Margins and losses, in the order of ``examples``.

    Raises:
        ValueError: If an example has no label.
    """
    margins, losses = np.empty(len(examples)), np.empty(len(examples))

    @torch.no_grad()  # what a sharded model gathers in inference mode could not be trained on after
    def score(rows: list[int], batch: Batch) -> None:
        if batch.labels is None:
            raise ValueError("accuracy needs labelled examples, got some without a label.")
        logits = head.logits(head.embed(batch), batch)
        labels = batch.labels.to(logits.device)
        margins[rows] = label_margins(logits, labels).double().cpu().numpy()
        losses[rows] = F.cross_entropy(logits, labels, reduction="none").double().cpu().numpy()

    with attack_mode(head.model):
        for_each_batch(score, examples, batch_tokens, device=head.device, stage=stage, progress=progress)
    return LabelScores(margins, losses)
