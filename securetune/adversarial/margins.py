"""How far a model is from a mistake."""

import torch
from torch import Tensor


def label_margins(scores: Tensor, labels: Tensor) -> Tensor:
    """Return by how much the right label's score exceeds the best wrong one.

    Guarantees:
        Positive exactly if the right label scores strictly highest, so a tie is a mistake. NaN if any score
        of the sample is not finite. Row ``i`` depends on row ``i`` alone.

    Args:
        scores: ``[B, C]``, a floating dtype, C >= 2: one score per label.
        labels: ``[B]``, int64: the right label of each sample, in [0, C).

    Returns:
        ``[B]``, dtype of ``scores``: differentiable with respect to ``scores``.

    Raises:
        ValueError: If the shapes do not agree or there are fewer than two labels.
    """
    if scores.ndim != 2 or scores.shape[1] < 2 or labels.shape != scores.shape[:1]:
        raise ValueError(
            "scores must have shape [B, C >= 2] and labels [B], "
            f"got {tuple(scores.shape)} and {tuple(labels.shape)}."
        )
    right = labels[:, None]
    best_wrong = scores.scatter(1, right, -torch.inf).amax(dim=1)
    margins = scores.gather(1, right)[:, 0] - best_wrong
    return torch.where(scores.isfinite().all(dim=1), margins, torch.nan)
