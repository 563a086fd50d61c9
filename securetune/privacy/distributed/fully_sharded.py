"""FSDP2: parameters, accumulators and optimizer state are sharded; each shard gets its own noise.

``torch.distributed.fsdp.fully_shard`` splits every parameter by rows. A process sums a block's clipped
gradient over its own samples, the blocks' sums are reduced straight into the shards' float32 accumulators,
and what is released becomes the shard's ``.grad``, which any optimizer over the sharded parameters uses.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from securetune.errors import PrivacyError
from securetune.privacy.distributed.blocks import group_by_block
from securetune.privacy.distributed.collectives import Processes
from securetune.privacy.per_sample import PerSampleGradients
from securetune.privacy.per_sample.gradients import TrainableParameter
from securetune.privacy.reduction import Address, SingleProcess


class FullySharded(SingleProcess):
    """Reduce into the shards of ``fully_shard``.

    Args:
        processes: Those of the run, in the order of the shards.
        parameters: The trainable parameters of the sharded model, in canonical order.

    Raises:
        PrivacyError: If a parameter is not sharded by rows over these processes.
    """

    reduces_micro_batches = True

    def __init__(self, processes: Processes, parameters: Sequence[TrainableParameter]) -> None:
        self.processes = processes
        self._layers: dict[int, list[TrainableParameter]] = {}
        for place in parameters:
            _require_shard_by_rows(place, processes)
        for block in group_by_block(parameters):
            self._layers[block[0].start] = block

    def layers(self, parameters: Sequence[TrainableParameter]) -> Sequence[slice]:
        """Return the range of each block of the model."""
        return [slice(places[0].start, places[-1].stop) for places in self._layers.values()]

    def reduce_sum(self, layer: slice, summed: Tensor) -> Tensor:
        """Add up, and keep this process' rows of each parameter, one after another."""
        places = self._layers[layer.start]
        order: list[Tensor] = []
        for rank in range(self.processes.size):
            for place in places:
                start, stop = self._entries(place, rank)
                offset = place.start - layer.start
                order.append(summed[offset + start : offset + stop])
        return self.processes.sum_shards(torch.cat(order), self._sizes(places))

    def places(self, layer: slice, shard: Tensor) -> Sequence[tuple[Tensor, Address]]:
        """Return each parameter's rows."""
        found: list[tuple[Tensor, Address]] = []
        for place, part in self._parts(layer, shard):
            found.append((part, self.address_of(place)))
        return found

    def address_of(self, place: TrainableParameter) -> Address:
        """Say where this process' rows of a parameter lie.

        Args:
            place: The parameter.

        Returns:
            Their address, as one dimension.
        """
        start, stop = self._entries(place, self.processes.rank)
        return Address(place.start + start, (stop - start,), (1,))

    def assign(
        self,
        grads: PerSampleGradients,
        optimizer: torch.optim.Optimizer,
        layer: slice,
        shard: Tensor,
    ) -> None:
        """Make each parameter's rows its ``.grad``."""
        for place, part in self._parts(layer, shard):
            parameter = place.parameter
            assert isinstance(parameter, DTensor)
            own = parameter.to_local()  # on the CPU where parameters are offloaded, and so is the update
            local = part.view_as(own).to(own)
            parameter.grad = DTensor.from_local(  # pyright: ignore[reportAttributeAccessIssue]
                local,
                parameter.device_mesh,
                parameter.placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )

    def add_counts(self, *counts: Tensor) -> None:
        """Add up over all processes."""
        self.processes.add(*counts)

    def _parts(self, layer: slice, shard: Tensor) -> list[tuple[TrainableParameter, Tensor]]:
        places = self._layers[layer.start]
        sizes = [stop - start for start, stop in (self._entries(p, self.processes.rank) for p in places)]
        return list(zip(places, shard.split(sizes), strict=True))

    def _sizes(self, places: Sequence[TrainableParameter]) -> list[int]:
        ranges = [[self._entries(place, rank) for place in places] for rank in range(self.processes.size)]
        return [sum(stop - start for start, stop in own) for own in ranges]

    def _entries(self, place: TrainableParameter, rank: int) -> tuple[int, int]:
        """First and last entry, exclusive, of a process' rows: as ``torch.chunk`` splits them."""
        rows = place.shape[0]
        share, width = -(-rows // self.processes.size), place.shape.numel() // rows
        return min(rank * share, rows) * width, min((rank + 1) * share, rows) * width


def _require_shard_by_rows(place: TrainableParameter, processes: Processes) -> None:
    parameter = place.parameter
    if not isinstance(parameter, DTensor):
        raise PrivacyError(
            f"{place.name} is not sharded. Call fully_shard on every part of the model, then "
            "PerSampleGradients, then FullySharded; for whole parameters use DataParallel."
        )
    if tuple(parameter.placements) != (Shard(0),) or parameter.device_mesh.size() != processes.size:
        raise PrivacyError(
            f"{place.name} is laid out as {parameter.placements} over {parameter.device_mesh}; only rows "
            f"over all {processes.size} processes (one mesh dimension, Shard(0)) work. Leave out hybrid "
            "sharding and tensor parallelism."
        )
