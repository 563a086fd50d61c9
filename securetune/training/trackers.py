"""Experiment trackers: passed through to accelerate, and only those the recipe names."""

from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from securetune.config.schema import Recipe
from securetune.errors import MachineError
from securetune.training.folder import RunFolder


def start_trackers(recipe: Recipe, run: RunFolder) -> Accelerator:
    """Start accelerate with the recipe's trackers; what they receive is not covered by epsilon.

    Args:
        recipe: The recipe; by default it names no tracker.
        run: The run's folder; trackers that write files write below it.

    Returns:
        The accelerator, whose ``log`` feeds the trackers.

    Raises:
        MachineError: If the package of a tracker is not installed.
    """
    wanted: list[Any] = list(recipe.training.trackers)
    missing = sorted(set(wanted) - {tracker.value for tracker in get_available_trackers()})
    if missing:
        raise MachineError(
            f"training.trackers: {', '.join(missing)} cannot be used, because the package is not installed. "
            f"Install it (pip install {' '.join(missing)}) or take it out."
        )
    folder = run.root / "trackers" if wanted else None
    accelerator = Accelerator(cpu=recipe.model.device == "cpu", log_with=wanted or None, project_dir=folder)
    # under ZeRO-3 transformers would shard what this process alone loads, and wait for the others
    unset_hf_deepspeed_config()
    if wanted:
        accelerator.init_trackers(recipe.name)
    return accelerator
