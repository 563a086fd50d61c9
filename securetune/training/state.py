"""What a killed training goes on from: parameters and optimizer moments, sealed; never a key of noise.

Each process seals its own part, and any number of processes, with any strategy, goes on from it.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from securetune.checkpoints import Sealer, agreement, seal_part
from securetune.checkpoints.folders import recover_folder
from securetune.errors import CheckpointError
from securetune.privacy.clipping import Clipping
from securetune.privacy.reduction import Address
from securetune.training.access import Access
from securetune.training.shard_files import ShardFiles, ShardStream, check_cover, runs_of
from securetune.training.state_shards import PARAMS, StateShards, fill
from securetune.training.stopping import EarlyStopping

_BEST = "best_params"
_MANIFEST = "vault.json"


class SavedState(NamedTuple):
    """Where a saved training stands.

    Attributes:
        steps_done: Steps whose update is in the state.
        steps_charged: Steps the ledger held when it was saved; 0 without privacy.
        lineage: UUID of the saves.
        next_generation: Number of the next save.
        clipping: State of the clipping, public numbers.
        writers: Names of the processes that had charged steps to the ledger.
    """

    steps_done: int
    steps_charged: int
    lineage: str
    next_generation: int
    clipping: dict[str, Any]
    writers: frozenset[str] = frozenset()


def has_state(folder: Path) -> bool:
    """Say whether a training state was saved, and put it back if a save was killed between two renames.

    Args:
        folder: Where to.

    Returns:
        Whether :func:`load_state` finds one.
    """
    recover_folder(folder)
    return (folder / _MANIFEST).is_file()


def save_state(
    folder: Path,
    sealer: Sealer | None,
    shards: StateShards,
    *,
    owner: Mapping[str, str],
    stopping: EarlyStopping | None = None,
    clipping: Clipping | None = None,
    compartment: Literal["adapter", "weights"] = "adapter",
    steps_done: int,
    steps_charged: int,
    writers: Iterable[str] = (),
) -> None:
    """Seal the training state after a step; an older state stays whole until the new one is complete.

    All processes call it together.

    Args:
        folder: Where to: on a file system that all processes share.
        sealer: Seals for this run's recipients, on the first process; None on the others.
        shards: What each process saves.
        owner: What the state belongs to: model, recipe, base. A state of another owner is not loaded.
        stopping: Early stopping, where there is any.
        clipping: The clipping, whose thresholds may have moved; None without privacy.
        compartment: Where the trained parameters are sealed, under a key of its own.
        steps_done: Steps whose update is in the state.
        steps_charged: Steps in the ledger; 0 without privacy.
        writers: Names of the processes that charged them.

    Raises:
        CheckpointError: If the shards do not cover the parameters, the disk is full, or another process
            failed.
        MachineError: If another process is gone.
    """
    peers = shards.peers
    with agreement(peers, f"step {steps_done} is saved"):
        arrays = _arrays(shards, stopping)
    runs = peers.collect({name: runs_of(address for address, _ in parts) for name, parts in arrays.items()})
    with agreement(peers, f"step {steps_done} is saved"):
        for name in sorted({name for found in runs for name in found}):
            everywhere = [(first, length) for found in runs for first, length in found.get(name, ())]
            check_cover(name, everywhere, shards.num_params)
    file = f"part-{peers.rank:05d}.safetensors"
    trained = {name: arrays.pop(name) for name in (PARAMS, _BEST) if name in arrays}
    sealed = {compartment: {file: ShardStream(trained)}, "optimizer": {file: ShardStream(arrays)}}
    if peers.rank:
        seal_part(sealed, peers)
        return
    assert sealer is not None, "the first process seals"
    metadata: dict[str, Any] = {
        "owner": dict(owner),
        "steps_done": steps_done,
        "steps_charged": steps_charged,
        "writers": sorted(writers),
        "clipping": {} if clipping is None else clipping.state_dict(),
    }
    if stopping is not None:
        metadata["stopping"] = stopping.state()
    sealer.seal(folder, sealed, metadata=metadata, peers=peers)


def load_state(
    folder: Path,
    access: Access,
    shards: StateShards,
    *,
    owner: Mapping[str, str],
    stopping: EarlyStopping | None = None,
) -> SavedState:
    """Restore a sealed training state, whatever number of processes and strategy saved it.

    All processes call it together.

    Args:
        folder: Where from.
        access: The run's keys.
        shards: What each process needs; parameters and optimizer are changed in place.
        owner: What the state must belong to.
        stopping: Early stopping, where there is any, changed in place.

    Returns:
        Where the training stands.

    Raises:
        CheckpointError: If the state belongs to something else, was changed, or is not whole.
    """
    with access.open(folder, peers=shards.peers) as vault, agreement(shards.peers, f"{folder} is restored"):
        metadata, found = vault.metadata, vault.metadata.get("owner")
        if found != dict(owner):
            raise CheckpointError(
                f"{folder} holds the training state of something else: expected {dict(owner)}, found "
                f"{found}. It cannot be resumed from here."
            )
        files = ShardFiles(vault)
        if files.num_params != shards.num_params:
            raise CheckpointError(
                f"{folder} holds {files.num_params} trained parameters, this recipe has {shards.num_params}."
            )
        saved = SavedState(
            steps_done=int(metadata["steps_done"]),
            steps_charged=int(metadata["steps_charged"]),
            lineage=vault.manifest.lineage,
            next_generation=vault.manifest.generation + 1,
            clipping=metadata["clipping"],
            writers=frozenset(metadata.get("writers", ())),  # saves of before have none
        )
        with torch.no_grad():
            shards.restore(files.read, step=saved.steps_done)
        if stopping is not None:
            stopping.load(metadata["stopping"], _read_best(shards, files) if _BEST in files.names else None)
    return saved


def _arrays(shards: StateShards, stopping: EarlyStopping | None) -> dict[str, list[tuple[Address, Tensor]]]:
    """Collect what this process saves, by the array's name."""
    arrays: dict[str, list[tuple[Address, Tensor]]] = {}
    for address, parts in shards.owned():
        for name, part in parts.items():
            arrays.setdefault(name, []).append((address, part))
    if stopping is not None and stopping.best_params is not None:
        arrays[_BEST] = []
        for (address, _), best in zip(shards.held(), stopping.best_params, strict=True):
            start = max(address.base, shards.saves.start)
            stop = min(address.base + len(best), shards.saves.stop)
            if start < stop:
                own = best[start - address.base : stop - address.base]
                arrays[_BEST].append((Address(start, (stop - start,), (1,)), own))
    return arrays


def _read_best(shards: StateShards, files: ShardFiles) -> list[Tensor]:
    best: list[Tensor] = []
    for address, part in shards.held():
        best.append(torch.empty_like(part))
        fill(best[-1], _BEST, files.read, address.base)
    return best
