"""Which part of the parameters and of AdamW's moments each process saves, and how it gets its own back.

Whatever the strategy, an entry is saved under its canonical index (see
:class:`securetune.privacy.reduction.Address`), so any strategy restores what any other has saved.

Dimensions: ``P`` trainable parameters.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from securetune.checkpoints import ALONE, Peers
from securetune.errors import CheckpointError
from securetune.privacy.distributed import DataParallel, FullySharded, Zero
from securetune.privacy.per_sample import PerSampleGradients
from securetune.privacy.reduction import Address, Reduction

PARAMS = "params"
MOMENTS = ("exp_avg", "exp_avg_sq")
Read = Callable[[str, Address], Tensor]
_CHUNK = 1 << 24  # entries that are on the CPU at once


class StateShards(Protocol):
    """What a strategy says about the training state.

    Attributes:
        peers: The processes of the run.
        num_params: ``P``.
        saves: The range of entries of which this process saves what it holds: replicas save a part each.
    """

    peers: Peers
    num_params: int
    saves: slice

    def owned(self) -> Sequence[tuple[Address, dict[str, Tensor]]]:
        """Say what this process must save.

        Returns:
            Parts, each with its address and, by name (``params``, ``exp_avg``, ``exp_avg_sq``), a contiguous
            view of ``address.shape``. All processes' parts together hold each name's every entry once: of
            replicas, each process saves a part. Parts may name different arrays.
        """
        ...

    def held(self) -> Sequence[tuple[Address, Tensor]]:
        """Say which trained parameters this process updates.

        Returns:
            1-D views, each with its address; replicas hold the same. See :meth:`refresh`.
        """
        ...

    def refresh(self) -> None:
        """Let the model's parameters follow those of :meth:`held`, which something else changed."""
        ...

    def restore(self, read: Read, *, step: int) -> None:
        """Put a saved state into parameters and optimizer.

        Args:
            read: ``read(name, address)`` returns saved entries on the CPU, in the address' shape and the
                dtype they were saved in; any entry can be read, in any order, as often as needed.
            step: Steps that the optimizer has done.
        """
        ...


def state_shards(
    grads: PerSampleGradients, optimizer: torch.optim.Optimizer, reduction: Reduction | None
) -> StateShards:
    """Return what a run saves.

    Args:
        grads: Owner of the parameters.
        optimizer: AdamW over them, or over ``[grads.flat_params]``.
        reduction: The run's strategy; None for one process.

    Returns:
        The shards, which hold no copy.
    """
    if isinstance(reduction, FullySharded):
        return RowShards(grads, optimizer, reduction)
    if isinstance(reduction, Zero):
        return PartitionShards(grads, reduction)
    if isinstance(reduction, DataParallel):
        return ReplicaShards(grads, optimizer, reduction.processes)
    assert reduction is None, f"no state of {type(reduction).__name__}"
    return ReplicaShards(grads, optimizer)


class ReplicaShards:
    """The state of processes that each hold all of it: each saves a part of the flat vector, and reads all.

    Args:
        grads: Owner of the parameters.
        optimizer: AdamW over them, or over ``[grads.flat_params]``.
        peers: The processes.
    """

    def __init__(
        self, grads: PerSampleGradients, optimizer: torch.optim.Optimizer, peers: Peers = ALONE
    ) -> None:
        self.peers, self.num_params = peers, grads.num_params
        self.saves = part_of(self.num_params, peers)
        self._optimizer = optimizer
        _, flat = grads.owned_by_optimizer
        is_flat = flat is not None and optimizer.param_groups[0]["params"][0] is flat
        self._places: list[tuple[torch.nn.Parameter, int]] = (
            [(flat, 0)]
            if is_flat and flat is not None
            else [(p.parameter, p.start) for p in grads.parameters]
        )

    def owned(self) -> Sequence[tuple[Address, dict[str, Tensor]]]:
        """Return this process' part, parameter by parameter."""
        part = self.saves
        found: list[tuple[Address, dict[str, Tensor]]] = []
        for parameter, start in self._places:
            low, high = max(part.start, start), min(part.stop, start + parameter.numel())
            if low >= high:
                continue
            cut = slice(low - start, high - start)
            arrays = {PARAMS: parameter.detach(), **_moments(self._optimizer, parameter)}
            views = {name: array.reshape(-1)[cut] for name, array in arrays.items()}
            found.append((Address(low, (high - low,), (1,)), views))
        return found

    def held(self) -> Sequence[tuple[Address, Tensor]]:
        """Return all parameters."""
        return [_run(start, parameter.detach().view(-1)) for parameter, start in self._places]

    def refresh(self) -> None:
        """Do nothing: they are the model's own."""

    def restore(self, read: Read, *, step: int) -> None:
        """Read all of it."""
        for parameter, start in self._places:
            fill(parameter.detach(), PARAMS, read, start)
            moments = {name: torch.empty_like(parameter.detach()) for name in MOMENTS}
            for name, moment in moments.items():
                fill(moment, name, read, start)
            self._optimizer.state[parameter] = {"step": _step(self._optimizer, parameter, step), **moments}


class RowShards:
    """The state of FSDP2: each process saves and reads its own rows of each parameter.

    Args:
        grads: Owner of the sharded parameters.
        optimizer: AdamW over them.
        reduction: How the processes add up.
    """

    def __init__(
        self, grads: PerSampleGradients, optimizer: torch.optim.Optimizer, reduction: FullySharded
    ) -> None:
        self.peers: Peers = reduction.processes
        self.num_params = grads.num_params
        self.saves = slice(0, self.num_params)
        self._optimizer = optimizer
        self._places = [(place.parameter, reduction.address_of(place)) for place in grads.parameters]

    def owned(self) -> Sequence[tuple[Address, dict[str, Tensor]]]:
        """Return this process' rows of each parameter."""
        found: list[tuple[Address, dict[str, Tensor]]] = []
        for parameter, address in self._places:
            arrays = {PARAMS: parameter.detach(), **_moments(self._optimizer, parameter)}
            found.append((address, {name: _local(array).reshape(-1) for name, array in arrays.items()}))
        return found

    def held(self) -> Sequence[tuple[Address, Tensor]]:
        """Return this process' rows of each parameter."""
        return [(address, _local(parameter.detach()).view(-1)) for parameter, address in self._places]

    def refresh(self) -> None:
        """Do nothing: they are the model's own."""

    def restore(self, read: Read, *, step: int) -> None:
        """Read this process' rows."""
        for parameter, address in self._places:
            fill(_local(parameter.detach()), PARAMS, read, address.base)
            moments = {name: torch.empty_like(parameter.detach()) for name in MOMENTS}
            for name, moment in moments.items():
                fill(_local(moment), name, read, address.base)
            self._optimizer.state[parameter] = {"step": _step(self._optimizer, parameter, step), **moments}


class PartitionShards:
    """The state of DeepSpeed's ZeRO: each process saves and reads its float32 partitions, without padding.

    Args:
        grads: Owner of the parameters.
        reduction: How the processes add up.
    """

    def __init__(self, grads: PerSampleGradients, reduction: Zero) -> None:
        self.peers: Peers = reduction.processes
        self.num_params = grads.num_params
        self.saves = slice(0, self.num_params)
        self._reduction = reduction

    def owned(self) -> Sequence[tuple[Address, dict[str, Tensor]]]:
        """Return this process' pieces."""
        optimizer = self._reduction.partition_optimizer
        found: list[tuple[Address, dict[str, Tensor]]] = []
        for address, master, cut in self._reduction.owned_masters():
            arrays = {PARAMS: master.detach(), **_moments(optimizer, master)}
            found.append((address, {name: array[cut] for name, array in arrays.items()}))
        return found

    def held(self) -> Sequence[tuple[Address, Tensor]]:
        """Return this process' pieces."""
        owned = self._reduction.owned_masters()
        return [(address, master.detach()[cut]) for address, master, cut in owned]

    def refresh(self) -> None:
        """Copy the pieces into the model's parameters, on all processes."""
        self._reduction.refresh_parameters()

    def restore(self, read: Read, *, step: int) -> None:
        """Read this process' pieces, then let the model's parameters follow."""
        optimizer = self._reduction.partition_optimizer
        owned = self._reduction.owned_masters()
        for master in {id(master): master for _, master, _ in owned}.values():
            moments = {name: torch.zeros_like(master.detach()) for name in MOMENTS}
            optimizer.state[master] = {"step": _step(optimizer, master, step), **moments}
        for address, master, cut in owned:
            fill(master.detach()[cut], PARAMS, read, address.base)
            for name in MOMENTS:
                fill(optimizer.state[master][name][cut], name, read, address.base)
        self.refresh()


def part_of(count: int, peers: Peers) -> slice:
    """Return the range that this process saves of something that all of them hold.

    Args:
        count: Number of entries.
        peers: The processes.

    Returns:
        The range, which may be empty.
    """
    share = -(-count // peers.size)
    return slice(min(peers.rank * share, count), min((peers.rank + 1) * share, count))


def fill(target: Tensor, name: str, read: Read, first: int) -> None:
    """Read one run of saved entries into a tensor, in bounded memory.

    Args:
        target: Any shape and device, changed in place: entries in row-major order.
        name: The array.
        read: As in :meth:`StateShards.restore`.
        first: Canonical index of the first entry.

    Raises:
        CheckpointError: If the saved entries do not fit into the target's dtype.
    """
    flat = target.reshape(-1)
    for start in range(0, len(flat), _CHUNK):
        part = flat[start : start + _CHUNK]
        saved = read(name, Address(first + start, (len(part),), (1,)))
        if torch.promote_types(saved.dtype, part.dtype) != part.dtype:
            raise CheckpointError(
                f"the training state holds {name!r} as {saved.dtype}, and this run as {part.dtype}, which "
                "would lose digits. Resume with the dtype it was trained in."
            )
        part.copy_(saved)
    if flat.data_ptr() != target.data_ptr():  # a copy, since the target is not contiguous
        target.copy_(flat.view_as(target))


def _run(first: int, flat: Tensor) -> tuple[Address, Tensor]:
    return Address(first, (len(flat),), (1,)), flat


def _local(array: Tensor) -> Tensor:
    return array.to_local() if isinstance(array, DTensor) else array


def _moments(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> dict[str, Tensor]:
    state = optimizer.state.get(parameter, {})
    if missing := [name for name in MOMENTS if name not in state]:
        raise CheckpointError(
            f"{type(optimizer).__name__} has no {' and no '.join(missing)} for a parameter of shape "
            f"{tuple(parameter.shape)}. Only AdamW's state can be saved, after its first step."
        )
    return {name: state[name] for name in MOMENTS}


def _step(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, step: int) -> Tensor | int:
    """The optimizer's own counter, where it keeps it."""
    if type(optimizer).__name__ == "DeepSpeedCPUAdam":
        return step
    groups = optimizer.param_groups  # ZeRO-3 fills them for an update only
    group = next((g for g in groups if any(p is parameter for p in g["params"])), groups[0])
    on_device = group.get("fused") or group.get("capturable")
    return torch.tensor(float(step), device=parameter.device if on_device else None)
