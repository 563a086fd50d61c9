"""Write a trained model as a plain transformers folder, for tools that know nothing of checkpoints."""

from pathlib import Path

from securetune.checkpoints import Vault
from securetune.config.schema import Recipe
from securetune.errors import CheckpointError
from securetune.models.adapters import merge_adapter
from securetune.models.base import load_base
from securetune.training.subjects import holds_weights, restore


def export_plain(recipe: Recipe, vault: Vault, destination: Path) -> None:
    """Save the model of an open checkpoint without any protection, an adapter folded into its base.

    Args:
        recipe: The recipe; names the base model.
        vault: The open checkpoint.
        destination: Folder to make; must not exist or be empty.

    Raises:
        CheckpointError: If the checkpoint belongs to another base model, or ``destination`` is not empty.
    """
    if destination.exists() and any(destination.iterdir()):
        raise CheckpointError(f"{destination} is not empty. Choose a new folder; nothing was written.")
    # Merging rounds to the base's number format, so it is done in float32.
    base = load_base(recipe.model.model_copy(update={"dtype": "float32"}))
    require_same_base(vault, base.digest)
    model = restore(base, vault)
    plain = base.model if holds_weights(vault) else merge_adapter(model)  # pyright: ignore[reportArgumentType]
    plain.save_pretrained(destination)
    base.tokenizer.save_pretrained(destination)


def require_same_base(vault: Vault, digest: str) -> None:
    """Refuse a base model other than the one the checkpoint was trained on.

    Args:
        vault: The open checkpoint.
        digest: SHA-256 of the base model at hand.

    Raises:
        CheckpointError: If they differ.
    """
    expected = vault.metadata.get("base", {})
    if expected.get("digest") != digest:
        raise CheckpointError(
            f"the checkpoint was trained on {expected.get('name')} with digest "
            f"{str(expected.get('digest'))[:12]}..., the base model "
            f"here has {digest[:12]}.... Use the same base model and revision."
        )
