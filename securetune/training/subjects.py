"""The three models of a run: how each is made, sealed and opened again."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from securetune.checkpoints import Vault
from securetune.config.schema import Recipe
from securetune.errors import CheckpointError
from securetune.models.adapters import adapt, adapter_files, load_adapter
from securetune.models.base import BaseModel, load_base
from securetune.models.checkpointing import checkpoint_layers
from securetune.models.task import ClassifyHead, GenerateHead
from securetune.models.weights import load_weights, unfreeze, weight_files
from securetune.training.access import Access
from securetune.training.folder import RunFolder
from securetune.training.loop import Head

if TYPE_CHECKING:
    from torch import Tensor, nn

Subject = Literal["base", "plain", "hardened"]
SUBJECTS: tuple[Subject, ...] = ("base", "plain", "hardened")


def checkpoint_of(run: RunFolder, subject: Subject) -> Path:
    """Return the folder of a sealed model; the plain fine-tune's is for measuring only."""
    return run.checkpoint if subject == "hardened" else run.work / subject


def load_recipe_base(recipe: Recipe) -> BaseModel:
    """Load the base model as all models of the run compute: in float32 weights where those are trained."""
    return load_base(recipe.model, float32_weights=recipe.training.method == "full")


def make_trainable(recipe: Recipe, base: BaseModel) -> "nn.Module":
    """Give a base model what the recipe trains.

    Args:
        recipe: The recipe.
        base: The base model, changed in place.

    Returns:
        The model, its trainable parameters in float32, in evaluation mode.
    """
    settings = recipe.training
    if settings.lora is None:
        model = unfreeze(base.model)
    else:
        model = adapt(base.model, settings.lora, seed=recipe.seed)
    if settings.gradient_checkpointing:
        checkpoint_layers(model)
    return model


def sealed_files(
    recipe: Recipe, model: "nn.Module", base: BaseModel, trained: Mapping[str, "Tensor"]
) -> dict[str, Mapping[str, bytes]]:
    """Return what is sealed of a trained model.

    Args:
        recipe: The recipe.
        model: From :func:`make_trainable`; it may be sharded.
        base: Its base.
        trained: What is trained of it, whole, by name.

    Returns:
        Files by compartment and name, each made when it is taken out.
    """
    if recipe.training.lora is None:
        return {"weights": weight_files(model, base.folder, trained=trained)}
    files = adapter_files(model, base_name=base.name, trained=trained)  # pyright: ignore[reportArgumentType]
    return {"adapter": files}


def holds_weights(vault: Vault) -> bool:
    """Say whether a checkpoint holds a whole model; else it holds adapters."""
    return bool(vault.names("weights"))


def restore(base: BaseModel, vault: Vault) -> "nn.Module":
    """Make the model of a checkpoint out of its base.

    Args:
        base: The base model, changed in place.
        vault: The open checkpoint.

    Returns:
        The base with the checkpoint's weights, or a peft model around it, in evaluation mode.

    Raises:
        CheckpointError: If what was sealed does not fit the base.
    """
    if holds_weights(vault):
        return load_weights(base.model, vault.names("weights"), lambda name: vault.read("weights", name))
    return load_adapter(base.model, {name: vault.read("adapter", name) for name in vault.names("adapter")})


def open_model(
    subject: Subject, recipe: Recipe, run: RunFolder, access: Access
) -> tuple[Head, BaseModel, str]:
    """Load a model as it was sealed, ready to be measured.

    Args:
        subject: Which model.
        recipe: The recipe.
        run: The run's folder.
        access: The run's keys.

    Returns:
        The model's head, its base, and the SHA-256 of the sealed checkpoint (of the base model itself for the
        base).

    Raises:
        CheckpointError: If the checkpoint is not the one that the run sealed.
    """
    base = load_recipe_base(recipe)
    if subject == "base":
        return make_head(recipe, base.model, base), base, base.digest
    folder = checkpoint_of(run, subject)
    with access.open(folder) as vault:
        digest = vault.manifest.digest
        if digest != run.load(f"trained_{subject}")["manifest"]:
            raise CheckpointError(
                f"{folder} is not the checkpoint that this run sealed as {subject}. Start a new run, or put "
                "the sealed one back."
            )
        model = restore(base, vault)
    return make_head(recipe, model, base), base, digest


def make_head(recipe: Recipe, model: "nn.Module", base: BaseModel) -> Head:
    """Put the recipe's task on a model.

    Args:
        recipe: The recipe.
        model: The base model, or the same with adapters or other weights.
        base: The loaded base.

    Returns:
        The head.
    """
    if recipe.task == "classify":
        return ClassifyHead(
            model, base.tokenizer, recipe.data.words, prompt=recipe.data.prompt, autocast=base.autocast
        )
    return GenerateHead(model, autocast=base.autocast)
