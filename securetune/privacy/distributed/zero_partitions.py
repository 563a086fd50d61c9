"""What DeepSpeed's ZeRO optimizers shard, read from the optimizers themselves.

Stages 1 and 2 put each group of parameters into one flat vector, of which each process updates an equal
range; stage 3 cuts each parameter into equal flat parts. Either way a process owns *pieces*: ranges of the
canonical vector that lie somewhere in its partition of a group. What no piece fills is padding.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist

from securetune.errors import PrivacyError
from securetune.privacy.distributed.collectives import Processes
from securetune.privacy.per_sample.gradients import TrainableParameter


class Piece(NamedTuple):
    """Entries ``[start, stop)`` of the canonical vector, at ``offset`` of a process' partition of a group."""

    owner: int
    start: int
    stop: int
    group: int
    offset: int


class Shards:
    """What an optimizer shards: groups of parameters, of each of which a process holds a partition.

    Args:
        optimizer: DeepSpeed's.
        groups: The parameters of each group.
        sizes: Length of a partition of each group.
        masters: The float32 partitions that this process updates, by group.
        is_offloaded: Whether their gradients have memory of their own on the CPU.
        process_groups: Over whose processes the partitions lie.
    """

    def __init__(
        self,
        optimizer: Any,
        groups: Sequence[Sequence[nn.Parameter]],
        sizes: Sequence[int],
        masters: Sequence[Tensor],
        is_offloaded: bool,
        process_groups: Sequence[Any],
    ) -> None:
        self._optimizer, self.groups, self._sizes = optimizer, groups, [int(size) for size in sizes]
        self._masters, self._is_offloaded, self._process_groups = masters, is_offloaded, process_groups

    def pieces(self, parameters: Sequence[TrainableParameter]) -> Iterator[Piece]:
        """Yield what each process owns of each parameter."""
        raise NotImplementedError

    def require(self, processes: Processes) -> None:
        """Refuse partitions over a part of the processes: other parallelism than that of data."""
        found = {(dist.get_rank(group), dist.get_world_size(group)) for group in self._process_groups}
        if found != {(processes.rank, processes.size)}:
            counts = ", ".join(str(size) for _, size in sorted(found))
            raise PrivacyError(
                f"DeepSpeed's partitions are over {counts} processes, the run has {processes.size}. Only "
                "plain data parallelism is supported: leave out tensor, pipeline, sequence and expert "
                "parallelism, and MiCS."
            )

    def new_partitions(self, *, like: Tensor) -> list[Tensor]:
        """Return zeros for the gradient of each partition, where the optimizer wants it."""
        if not self._is_offloaded:
            return [torch.zeros(size, dtype=like.dtype, device=like.device) for size in self._sizes]
        gradients = [master.grad for master in self._masters]
        assert [len(g) for g in gradients if g is not None] == self._sizes
        return [gradient.zero_() for gradient in gradients if gradient is not None]

    def master(self, piece: Piece) -> tuple[nn.Parameter, slice]:
        """Return the float32 partition that holds a piece of this process, and the piece's place in it."""
        master: Any = self._masters[piece.group]
        return master, slice(piece.offset, piece.offset + piece.stop - piece.start)

    def refresh(self) -> None:
        """Make the model's parameters those of the float32 partitions, which something else changed."""
        raise NotImplementedError

    def hand_over(self, partitions: Sequence[Tensor]) -> None:
        """Give the optimizer the released gradients of its partitions."""
        if not self._is_offloaded:
            for group, partition in enumerate(partitions):
                self._optimizer.averaged_gradients[group] = [partition]


class FlatGroups(Shards):
    """Stages 1 and 2: parameters are views of their group's flat vector, wherever they lie in it."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(
            optimizer,
            optimizer.bit16_groups,
            optimizer.partition_size,
            optimizer.single_partition_of_fp32_groups,
            optimizer.cpu_offload,
            optimizer.real_dp_process_group,
        )

    def pieces(self, parameters: Sequence[TrainableParameter]) -> Iterator[Piece]:
        """Yield each parameter's part in the partition of each process that it reaches."""
        places = {id(place.parameter): place for place in parameters}
        for number, group in enumerate(self.groups):
            flat, share = self._optimizer.bit16_groups_flat[number], self._sizes[number]
            for parameter in group:
                place = places[id(parameter)]
                first = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
                last = first + parameter.numel()
                assert 0 <= first < last <= len(flat)
                assert parameter.is_contiguous()
                for owner in range(first // share, (last - 1) // share + 1):
                    start, stop = max(first, owner * share), min(last, (owner + 1) * share)
                    before = place.start - first
                    yield Piece(owner, before + start, before + stop, number, start - owner * share)

    def refresh(self) -> None:
        """Copy each partition into its place in the flat vector, and gather."""
        self._optimizer.update_lp_params()


class CutParameters(Shards):
    """Stage 3: each parameter is cut into equal parts, the last one padded, which lie one after another."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(
            optimizer,
            optimizer.fp16_groups,
            optimizer.fp16_partitioned_groups_flat_numel,
            optimizer.fp32_partitioned_groups_flat,
            optimizer.offload_optimizer,
            [
                getattr(p, "ds_process_group", optimizer.dp_process_group)
                for g in optimizer.fp16_groups
                for p in g
            ],
        )

    def pieces(self, parameters: Sequence[TrainableParameter]) -> Iterator[Piece]:
        """Yield each parameter's parts, which are on all processes."""
        places = {id(place.parameter): place for place in parameters}
        for number, group in enumerate(self.groups):
            offset = 0
            for parameter in group:
                place = places[id(parameter)]
                share = int(parameter.partition_numel())  # pyright: ignore[reportAttributeAccessIssue]
                for owner, start in enumerate(range(place.start, place.stop, share)):
                    yield Piece(owner, start, min(start + share, place.stop), number, offset)
                offset += share

    def refresh(self) -> None:
        """Copy each partition into the parameters' own, and gather anew those that stay whole."""
        self._optimizer._partition_all_parameters()
        for group in range(len(self.groups)):
            self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if whole := self._optimizer.persistent_parameters:
            whole[0].all_gather(whole)


def pieces_within(layer: slice, pieces: Sequence[Piece]) -> list[Piece]:
    """The parts of the pieces in a range of the canonical vector, by owner."""
    found: list[Piece] = []
    for piece in pieces:
        start, stop = max(piece.start, layer.start), min(piece.stop, layer.stop)
        if start < stop:
            offset = piece.offset + start - piece.start
            found.append(Piece(piece.owner, start, stop, piece.group, offset))
    assert sum(piece.stop - piece.start for piece in found) == layer.stop - layer.start
    return sorted(found)
