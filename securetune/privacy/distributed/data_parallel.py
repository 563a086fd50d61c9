"""Data parallel training: every process holds the whole model and its optimizer.

The sum is reduced in parts: each process gets the sum of its part, adds the noise of that part's addresses,
divides, and the parts are gathered. That moves as many bytes as one all-reduce, draws each normal once in the
whole job, and gives all replicas the same gradient, bit for bit.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from securetune.privacy.distributed.collectives import Processes
from securetune.privacy.per_sample import PerSampleGradients
from securetune.privacy.per_sample.gradients import TrainableParameter
from securetune.privacy.reduction import Address, SingleProcess

_BUCKET = 1 << 26  # 256 MiB of float32 at a time


class DataParallel(SingleProcess):
    """Reduce over processes that each hold all parameters.

    The model may be plain or wrapped in ``DistributedDataParallel``, which must not synchronise gradients: it
    finds none, since per-sample gradients never become ``.grad`` before they are released.

    Args:
        processes: Those of the run.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes

    def layers(self, parameters: Sequence[TrainableParameter]) -> Sequence[slice]:
        """Cut the flat vector into ranges of at most 64 Mi entries."""
        stop = parameters[-1].stop
        return [slice(start, min(start + _BUCKET, stop)) for start in range(0, stop, _BUCKET)]

    def reduce_sum(self, layer: slice, summed: Tensor) -> Tensor:
        """Add up, and keep this process' part of the range."""
        return self.processes.sum_shards(summed, self._sizes(layer))

    def places(self, layer: slice, shard: Tensor) -> Sequence[tuple[Tensor, Address]]:
        """Return the part's own place."""
        before = sum(self._sizes(layer)[: self.processes.rank])
        return [(shard, Address(layer.start + before, (len(shard),), (1,)))]

    def assign(
        self,
        grads: PerSampleGradients,
        optimizer: torch.optim.Optimizer,
        layer: slice,
        shard: Tensor,
    ) -> None:
        """Gather the parts, and give the gradient to the optimizer."""
        whole = self.processes.gather_shards(shard, self._sizes(layer))
        super().assign(grads, optimizer, layer, whole)

    def add_counts(self, *counts: Tensor) -> None:
        """Add up over all processes."""
        self.processes.add(*counts)

    def _sizes(self, layer: slice) -> list[int]:
        size, count = self.processes.size, layer.stop - layer.start
        share = -(-count // size)
        return [max(0, min(share, count - rank * share)) for rank in range(size)]
