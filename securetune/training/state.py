"""What a killed training goes on from: adapters and optimizer moments, sealed; never a key of noise."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from securetune.checkpoints import Sealer
from securetune.errors import CheckpointError
from securetune.privacy.per_sample import PerSampleGradients
from securetune.training.access import Access

_FLAT = "flat.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq")


def save_state(
    folder: Path,
    sealer: Sealer,
    grads: PerSampleGradients,
    optimizer: torch.optim.Optimizer,
    *,
    steps_done: int,
) -> None:
    """Seal the training state after a step; an older state stays whole until the new one is complete.

    Args:
        folder: Where to.
        sealer: Seals for this run's recipients.
        grads: Owner of the flat adapter vector.
        optimizer: AdamW over it.
        steps_done: Steps whose update is in the state.
    """
    moments = optimizer.state[grads.flat_params]
    sealer.seal(
        folder,
        {
            "adapter": {_FLAT: _to_bytes({"params": grads.flat_params.detach()})},
            "optimizer": {_FLAT: _to_bytes({name: moments[name] for name in _MOMENTS})},
        },
        metadata={"steps_done": steps_done, "num_params": grads.num_params},
    )


def load_state(
    folder: Path, access: Access, grads: PerSampleGradients, optimizer: torch.optim.Optimizer
) -> tuple[int, dict[str, Any]]:
    """Restore a sealed training state into adapters and optimizer.

    Args:
        folder: Where from.
        access: The run's keys.
        grads: Owner of the flat adapter vector, changed in place.
        optimizer: AdamW over it, changed in place.

    Returns:
        The number of steps in the state, and ``lineage`` and ``generation`` for the sealer that goes on.

    Raises:
        CheckpointError: If the state belongs to other adapters, or was changed.
    """
    from safetensors.torch import load

    with access.open(folder) as vault:
        if vault.metadata.get("num_params") != grads.num_params:
            raise CheckpointError(
                f"{folder} holds a state of {vault.metadata.get('num_params')} adapter parameters, this "
                "recipe has "
                f"{grads.num_params}. It belongs to another recipe."
            )
        params = load(vault.read("adapter", _FLAT))["params"]
        moments = load(vault.read("optimizer", _FLAT))
        steps_done = int(vault.metadata["steps_done"])
        lineage = {"lineage": vault.manifest.lineage, "generation": vault.manifest.generation + 1}
    with torch.no_grad():
        grads.flat_params.copy_(params)
    optimizer.state[grads.flat_params] = {
        "step": torch.tensor(float(steps_done)),
        **{name: moments[name].to(grads.flat_params) for name in _MOMENTS},
    }
    return steps_done, lineage


def _to_bytes(tensors: dict[str, Tensor]) -> bytes:
    from safetensors.torch import save

    return save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
