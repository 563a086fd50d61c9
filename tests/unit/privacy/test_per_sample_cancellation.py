"""Norms of gradients whose parts cancel almost wholly: never below the truth, in float64."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from securetune.privacy.clipping import ROUNDING_EXCESS
from securetune.privacy.per_sample import BatchGradients
from securetune.privacy.per_sample.gradients import TrainableParameter, Uses
from tests.per_sample_oracle import randn


class TestNormsUnderCancellation:
    """Float32 norms where positions, samples of a unit or two uses of a tied table cancel almost wholly."""

    @staticmethod
    def norms(uses: Uses, shape: tuple[int, int], unit_index: torch.Tensor | None = None):
        weight = nn.Parameter(torch.zeros(shape))
        place = TrainableParameter("w", weight, 0, 0, weight.numel(), weight.shape)
        samples = len((uses.dense or uses.lookups)[0][0])
        grads = BatchGradients([place], torch.zeros(samples, 0), {}, {0: uses}, unit_index)
        found = grads.squared_norms().sqrt().squeeze(1).double()
        return found

    @staticmethod
    def truth(uses: Uses, shape: tuple[int, int]) -> torch.Tensor:
        total = torch.zeros(len((uses.dense or uses.lookups)[0][0]), *shape, dtype=torch.float64)
        for a, g in uses.dense:
            total += g.double().transpose(1, 2) @ a.double()
        for ids, g in uses.lookups:
            one_hot = functional.one_hot(ids, shape[0]).double()
            total += one_hot.transpose(1, 2) @ g.double()
        return total

    # [p, d] with few and with many positions: by Gram matrices, and by the product
    @settings(max_examples=60)
    @given(
        left=st.floats(-9, 0), size=st.sampled_from([(40, 40), (3, 5)]), pairs=st.integers(1, 6),
        scale=st.floats(-3, 3), seed=st.integers(0, 2**16),
    )  # fmt: skip
    def test_positions_that_cancel(self, left, size, pairs, scale, seed):
        a, g = randn(4, pairs, size[1], seed=seed), 10**scale * randn(4, pairs, size[0], seed=seed + 1)
        rest = 10**left * randn(4, pairs, size[0], seed=seed + 2)
        uses = Uses(dense=[(torch.cat([a, a], dim=1).float(), torch.cat([g, rest - g], dim=1).float())])
        expected = self.truth(uses, size).flatten(1).norm(dim=1)
        assert (self.norms(uses, size) >= expected * (1 - ROUNDING_EXCESS)).all()

    # the two uses cancel each other, or each cancels in itself
    @settings(max_examples=80)
    @given(
        left=st.floats(-9, 0), tokens=st.integers(1, 5), size=st.sampled_from([(50, 40), (7, 5)]),
        within=st.booleans(), seed=st.integers(0, 2**16),
    )  # fmt: skip
    def test_tied_uses_that_cancel(self, left, tokens, size, within, seed):
        vocab, width = size
        ids = torch.randint(0, vocab, (4, tokens), generator=torch.Generator().manual_seed(seed))
        a = randn(4, tokens, width, seed=seed)
        one_hot = functional.one_hot(ids, vocab).double()
        rest = 10**left * randn(4, tokens, vocab, seed=seed + 1)
        if within:
            dense = (torch.cat([a, a], dim=1), torch.cat([one_hot, rest - one_hot], dim=1))
            lookup_g = 10**left * randn(4, 2 * tokens, width, seed=seed + 2)
            lookup = (ids.repeat(1, 2), torch.cat([10 * a, -10 * a], dim=1) + lookup_g)
        else:
            dense, lookup = (a, one_hot + rest), (ids, -a)
        uses = Uses(dense=[tuple(part.float() for part in dense)], lookups=[(lookup[0], lookup[1].float())])
        expected = self.truth(uses, size).flatten(1).norm(dim=1)
        assert (self.norms(uses, size) >= expected * (1 - ROUNDING_EXCESS)).all()

    @settings(max_examples=40)
    @given(left=st.floats(-9, 0), tokens=st.integers(1, 4), seed=st.integers(0, 2**16))
    def test_samples_of_one_unit_that_cancel(self, left, tokens, seed):
        a, g = randn(1, tokens, 40, seed=seed), randn(1, tokens, 40, seed=seed + 1)
        rest = 10**left * randn(1, tokens, 40, seed=seed + 2)
        uses = Uses(dense=[(torch.cat([a, a]).float(), torch.cat([g, rest - g]).float())])
        expected = self.truth(uses, (40, 40)).sum(dim=0).norm()
        found = self.norms(uses, (40, 40), torch.tensor([0, 0]))
        assert float(found) >= float(expected) * (1 - ROUNDING_EXCESS)

    def test_norms_without_cancellation_are_tight(self):
        uses = Uses(dense=[(randn(4, 8, 40).float(), randn(4, 8, 40, seed=3).float())])
        expected = self.truth(uses, (40, 40)).flatten(1).norm(dim=1)
        torch.testing.assert_close(self.norms(uses, (40, 40)), expected, rtol=1e-5, atol=0.0)
