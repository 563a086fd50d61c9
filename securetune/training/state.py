"""What a killed training goes on from: weights and optimizer moments, sealed; never a key of noise."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from securetune.checkpoints import Sealer, Vault
from securetune.errors import CheckpointError
from securetune.files import LazyFiles
from securetune.privacy.clipping import Clipping
from securetune.privacy.per_sample import PerSampleGradients
from securetune.training.access import Access
from securetune.training.stopping import EarlyStopping

_SUFFIX = ".safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq")


class SavedState(NamedTuple):
    """Where a saved training stands.

    Attributes:
        steps_done: Steps whose update is in the state.
        steps_charged: Steps the ledger held when it was saved; 0 without privacy.
        lineage: UUID of the saves.
        next_generation: Number of the next save.
        clipping: State of the clipping, public numbers.
    """

    steps_done: int
    steps_charged: int
    lineage: str
    next_generation: int
    clipping: dict[str, Any]


def save_state(
    folder: Path,
    sealer: Sealer,
    grads: PerSampleGradients,
    optimizer: torch.optim.Optimizer,
    *,
    owner: Mapping[str, str],
    stopping: EarlyStopping | None = None,
    clipping: Clipping | None = None,
    steps_done: int,
    steps_charged: int,
) -> None:
    """Seal the training state after a step; an older state stays whole until the new one is complete.

    Args:
        folder: Where to.
        sealer: Seals for this run's recipients.
        grads: Owner of the flat vector of all trainable parameters.
        optimizer: AdamW over it.
        owner: What the state belongs to: model, recipe, base. A state of another owner is not loaded.
        stopping: Early stopping, where there is any.
        clipping: The clipping, whose thresholds may have moved; None without privacy.
        steps_done: Steps whose update is in the state.
        steps_charged: Steps in the ledger; 0 without privacy.
    """
    moments = optimizer.state[grads.flat_params]
    params = {"params": grads.flat_params.detach()}
    metadata: dict[str, Any] = {
        "owner": dict(owner),
        "steps_done": steps_done,
        "steps_charged": steps_charged,
        "clipping": {} if clipping is None else clipping.state_dict(),
    }
    if stopping is not None:
        metadata["stopping"] = stopping.state()
        if stopping.best_params is not None:
            params["best_params"] = stopping.best_params
    sealer.seal(
        folder,
        {
            "weights": _files(params),
            "optimizer": _files({name: moments[name] for name in _MOMENTS}),
        },
        metadata=metadata,
    )


def load_state(
    folder: Path,
    access: Access,
    grads: PerSampleGradients,
    optimizer: torch.optim.Optimizer,
    *,
    owner: Mapping[str, str],
    stopping: EarlyStopping | None = None,
) -> SavedState:
    """Restore a sealed training state into model and optimizer.

    Args:
        folder: Where from.
        access: The run's keys.
        grads: Owner of the flat vector of all trainable parameters, changed in place.
        optimizer: AdamW over it, changed in place.
        owner: What the state must belong to.
        stopping: Early stopping, where there is any, changed in place.

    Returns:
        Where the training stands.

    Raises:
        CheckpointError: If the state belongs to something else, or was changed.
    """
    with access.open(folder) as vault:
        found = vault.metadata.get("owner")
        if found != dict(owner):
            raise CheckpointError(
                f"{folder} holds the training state of something else: expected {dict(owner)}, found "
                f"{found}. "
                "It cannot be resumed from here."
            )
        params = _read(vault, "weights", "params")
        moments = {name: _read(vault, "optimizer", name).to(grads.flat_params) for name in _MOMENTS}
        saved = SavedState(
            steps_done=int(vault.metadata["steps_done"]),
            steps_charged=int(vault.metadata["steps_charged"]),
            lineage=vault.manifest.lineage,
            next_generation=vault.manifest.generation + 1,
            clipping=vault.metadata["clipping"],
        )
        if stopping is not None:
            has_best = f"best_params{_SUFFIX}" in vault.names("weights")
            best = _read(vault, "weights", "best_params") if has_best else None
            stopping.load(vault.metadata["stopping"], best)
    if params.shape != grads.flat_params.shape:
        raise CheckpointError(
            f"{folder} holds {params.numel()} trained parameters, this recipe has {grads.num_params}."
        )
    with torch.no_grad():
        grads.flat_params.copy_(params)
    optimizer.state[grads.flat_params] = {
        "step": torch.tensor(float(saved.steps_done)),
        **moments,
    }
    return saved


def _files(tensors: Mapping[str, Tensor]) -> LazyFiles:
    """One file for each vector: each is as large as the model where all weights are trained."""
    return LazyFiles({f"{name}{_SUFFIX}": partial(_to_bytes, name, value) for name, value in tensors.items()})


def _to_bytes(name: str, tensor: Tensor) -> bytes:
    from safetensors.torch import save

    return save({name: tensor.cpu().contiguous()})


def _read(vault: Vault, compartment: str, name: str) -> Tensor:
    from safetensors.torch import load

    return load(vault.read(compartment, f"{name}{_SUFFIX}"))[name]
