"""Bags of embeddings, against ordinary autograd on one sample at a time in float64."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from securetune.privacy.per_sample import PerSampleGradients
from tests.per_sample_oracle import assert_exact, random_parameters


class Bags(nn.Module):
    """Bags of ids below 9, each factor a sample's own; ``[B, M]``, or a bag of ``M - id`` after another."""

    def __init__(self, layout: str, *, weighs: bool, **options) -> None:
        super().__init__()
        self.factors = nn.Embedding(9, 1)
        self.bag = nn.EmbeddingBag(9, 6, include_last_offset=layout == "offsets and last", **options)
        self.layout, self.weighs = layout, weighs

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        factors = self.factors(ids).squeeze(-1)
        if self.layout == "rows":
            return self.bag(ids, None, factors if self.weighs else None)
        sizes = (ids.shape[1] - ids[:, 0]).clamp_min(0)
        is_kept = torch.arange(ids.shape[1]) < sizes[:, None]
        ends = sizes.cumsum(0)
        offsets = functional.pad(ends, (1, 0)) if self.bag.include_last_offset else ends - sizes
        return self.bag(ids[is_kept], offsets, factors[is_kept] if self.weighs else None)


@pytest.mark.parametrize("layout", ["rows", "offsets", "offsets and last"])
@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("mode", ["sum", "mean", "max", "weighted sum"])
def test_modes_and_layouts(mode, padding_idx, layout):
    options = {"mode": mode.removeprefix("weighted "), "padding_idx": padding_idx}
    model = random_parameters(Bags(layout, weighs="weighted" in mode, **options).double())
    ids = torch.tensor([[1, 2, 2, 5], [4, 3, 3, 3], [3, 3, 3, 3], [0, 8, 7, 8]])  # 3, 0, 1 and 4 ids
    expected = model(ids)
    assert_exact(model, ids)
    torch.testing.assert_close(model(ids), expected)


def test_a_batch_without_ids():
    model = random_parameters(nn.EmbeddingBag(9, 6).double())
    PerSampleGradients(model)
    found = model(torch.zeros(0, dtype=torch.long), torch.zeros(2, dtype=torch.long))
    assert found.tolist() == [[0.0] * 6] * 2
