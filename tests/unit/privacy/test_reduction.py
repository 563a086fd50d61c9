"""Shards of the clipped sum: addresses, noise by address, and several processes against one."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from securetune.privacy.clipping import FlatClipping
from securetune.privacy.noise import NoiseSource
from securetune.privacy.per_sample import PerSampleGradients
from securetune.privacy.reduction import Address, SingleProcess, add_noise
from securetune.privacy.step import PrivateStep
from tests.unit.privacy.test_step import Uncharged

KEY = bytes(range(32))


def indices(address: Address) -> list[int]:
    return [first + i for first, length in address.runs() for i in range(length)]


def by_strides(address: Address) -> list[int]:
    """What numpy finds at the address, in a vector that holds its own indices."""
    whole = np.arange(10_000)
    view = np.lib.stride_tricks.as_strided(
        whole[address.base :], address.shape, [8 * stride for stride in address.strides]
    )
    return view.flatten().tolist()


@pytest.mark.parametrize(
    "address",
    [
        Address(5, (7,), (1,)),
        Address(40, (3, 8), (8, 1)),  # rows of a matrix
        Address(3, (6, 2), (8, 1)),  # columns of a matrix
        Address(3, (6, 1), (8, 1)),  # one column
        Address(0, (2, 3, 4), (100, 8, 1)),
        Address(9, (2, 3, 4), (1, 2, 6)),
        Address(9, (1, 5), (77, 1)),
        Address(9, (), ()),
        Address(9, (0, 4), (4, 1)),
        Address(9, (4, 0), (4, 1)),
    ],
)
def test_runs_are_the_entries_in_row_major_order(address):
    assert indices(address) == by_strides(address)


def test_a_contiguous_block_is_one_run():
    assert list(Address(8, (3, 4, 5), (20, 5, 1)).runs()) == [(8, 60)]


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), start=st.integers(0, 50), data=st.data())
def test_noise_of_shards_is_that_of_the_whole(rows, columns, start, data):
    whole = NoiseSource(KEY).normal(step=3, stream=2, start=start, count=rows * columns, stddev=0.5)
    matrix = whole.view(rows, columns)
    cut = data.draw(st.integers(0, columns))
    for low, high in ((0, cut), (cut, columns)):
        shard = torch.zeros(rows, high - low)
        address = Address(start + low, (rows, high - low), (columns, 1))
        add_noise(shard, address, NoiseSource(KEY), step=3, stream=2, stddev=0.5)
        assert shard.equal(matrix[:, low:high])


def test_a_shard_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"address' shape \(2, 3\).*got shape \(3, 2\)"):
        add_noise(
            torch.zeros(3, 2), Address(0, (2, 3), (3, 1)), NoiseSource(KEY), step=0, stream=0, stddev=1.0
        )
    with pytest.raises(ValueError, match="contiguous"):
        add_noise(
            torch.zeros(3, 2).t(), Address(0, (2, 3), (3, 1)), NoiseSource(KEY), step=0, stream=0, stddev=1.0
        )


class ColumnShards(SingleProcess):
    """One of two processes: each parameter is a layer, and a matrix is split by columns."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.other: torch.Tensor | None = None  # what the other process summed
        self.shards: dict[int, torch.Tensor] = {}
        self._shape_at: dict[int, torch.Size] = {}

    def layers(self, parameters):
        self._shape_at = {place.start: place.parameter.shape for place in parameters}
        return [slice(place.start, place.stop) for place in parameters]

    def _columns(self, layer):
        width = self._shape_at[layer.start][-1]
        return slice(0, width // 2) if self.rank == 0 else slice(width // 2, width)

    def reduce_sum(self, layer, summed):
        total = summed + self.other[layer]
        return total.view(self._shape_at[layer.start])[..., self._columns(layer)].contiguous()

    def places(self, layer, shard):
        strides = torch.empty(self._shape_at[layer.start]).stride()
        return [(shard, Address(layer.start + self._columns(layer).start, tuple(shard.shape), strides))]

    def assign(self, grads, optimizer, layer, shard):
        self.shards[layer.start] = shard


def test_two_processes_release_what_one_would():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(8, 6, dtype=torch.float64)
    public = torch.randn(4, 6, dtype=torch.float64)

    def start(reduction):
        grads = PerSampleGradients(copy.deepcopy(base))
        step = PrivateStep(
            grads,
            torch.optim.SGD(list(grads.model.parameters()), lr=1.0),
            clipping=FlatClipping(0.7),
            noise_multiplier=1.3,
            expected_batch_size=10,
            noise=NoiseSource(KEY),
            ledger=Uncharged(1.3),
            reduction=reduction,
        )
        return grads, step

    def add(grads, step, rows, public_rows):
        step.accumulate(grads.model(x[rows]).square().sum(dim=1))
        step.accumulate_public(grads.model(public[public_rows]).square().sum(dim=1), weight=0.25)

    grads, alone = start(None)
    add(grads, alone, slice(None), slice(None))
    before = torch.cat([p.detach().flatten() for p in grads.model.parameters()])
    alone.finish()
    expected = before - torch.cat([p.detach().flatten() for p in grads.model.parameters()])

    ranks = [start(ColumnShards(rank)) for rank in range(2)]
    add(*ranks[0], slice(0, 3), slice(0, 1))
    add(*ranks[1], slice(3, None), slice(1, None))
    sums = [(step.summed.clone(), step._public.summed.clone()) for _, step in ranks]
    for rank, (_, step) in enumerate(ranks):
        both = _Both(step._reduction, sums[1 - rank])
        step._reduction = step._sum._reduction = step._public._reduction = both
        step.finish()
    parts = [step._reduction.inner.shards for _, step in ranks]
    whole = torch.cat([torch.cat([parts[0][key], parts[1][key]], dim=-1).flatten() for key in parts[0]])
    torch.testing.assert_close(whole, expected)


class _Both(SingleProcess):
    """Shows the inner reduction the other process' private sum, then its public one."""

    def __init__(self, inner, sums) -> None:
        self.inner, self.sums = inner, sums
        self._asked: set[int] = set()

    def layers(self, parameters):
        return self.inner.layers(parameters)

    def reduce_sum(self, layer, summed):
        self.inner.other = self.sums[layer.start in self._asked]
        self._asked.add(layer.start)
        return self.inner.reduce_sum(layer, summed)

    def places(self, layer, shard):
        return self.inner.places(layer, shard)

    def assign(self, *args):
        self.inner.assign(*args)
