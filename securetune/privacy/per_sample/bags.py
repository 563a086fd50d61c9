"""``nn.EmbeddingBag``: rows of a table that are looked up, then reduced within each sample's bag.

Dimensions: ``B`` samples, ``N`` ids of all samples, ``M`` ids of the largest bag, ``d`` features.
"""

import torch
from torch import Tensor
from torch.nn import functional

from securetune.privacy.per_sample.paths import EmbeddingPath


class BagPath(EmbeddingPath):
    """``nn.EmbeddingBag``, of any mode."""

    def run(
        self, ids: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        """Run the layer.

        Args:
            ids: ``[B, M]``, or ``[N]``: the bags one after another.
            offsets: ``[B]``, where each bag of ``[N]`` starts; with ``include_last_offset`` one more, ``N``.
            per_sample_weights: Of the shape of ``ids``: a factor of each.

        Returns:
            ``[B, d]``.
        """
        module, weights = self.module, per_sample_weights
        is_there = torch.ones_like(ids, dtype=torch.bool)
        if offsets is not None:
            starts = offsets[:-1] if module.include_last_offset else offsets
            sizes = functional.pad(starts, (0, 1), value=len(ids)).diff()
            slots = torch.arange(max(1, *sizes.tolist()), device=ids.device)
            is_there = slots < sizes[:, None]
            position = torch.where(is_there, starts[:, None] + slots, len(ids))  # that of a zero behind them
            ids = functional.pad(ids, (0, 1))[position]
            weights = None if weights is None else functional.pad(weights, (0, 1))[position]
        if module.padding_idx is not None:
            is_there = is_there & (ids != module.padding_idx)
        rows = self._look_up(ids)  # [B, M, d]
        if weights is not None:
            rows = rows * weights.unsqueeze(-1)
        is_missing = ~is_there.unsqueeze(-1)
        if module.mode == "max":
            most = rows.masked_fill(is_missing, -torch.inf).amax(dim=1)
            return most.masked_fill(is_missing.all(dim=1), 0.0)
        total = rows.masked_fill(is_missing, 0.0).sum(dim=1)
        return total / is_there.sum(dim=1, keepdim=True).clamp_min(1) if module.mode == "mean" else total
