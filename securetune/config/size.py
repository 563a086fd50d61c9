"""Whether there are enough private records for what a recipe plans."""

from securetune.config.schema import Recipe
from securetune.errors import DataError

_TOLERANCE = 0.2


def require_enough_records(recipe: Recipe, num_training: int) -> None:
    """Refuse data that cannot fill one expected batch.

    Args:
        recipe: The recipe.
        num_training: Training records, or users where they are the unit, without those held out.

    Raises:
        DataError: If there are fewer than ``privacy.expected_batch_size``.
    """
    expected, unit = recipe.privacy.expected_batch_size, recipe.privacy.unit
    if num_training < expected:
        raise DataError(
            f"there are {num_training:,} training {unit}s, fewer than privacy.expected_batch_size = "
            f"{expected:,}. Lower it (and privacy.sample_rate with it), or bring more data."
        )


def require_places(recipe: Recipe, num_training: int) -> None:
    """Refuse more records than the public number of places that epsilon was computed for.

    Args:
        recipe: The recipe.
        num_training: Training records, or users where they are the unit, without those held out.

    Raises:
        DataError: If there are more than ``privacy.num_units``.
    """
    places, unit = recipe.privacy.num_units, recipe.privacy.unit
    if places is not None and num_training > places:
        raise DataError(
            f"there are {num_training:,} training {unit}s, more than the privacy.num_units = {places:,} "
            "places that epsilon is computed for. Raise it, with room to spare."
        )


def size_warning(recipe: Recipe, num_training: int) -> str | None:
    """Say if the recipe's constants are far from the data: privacy holds anyway, but batches differ.

    Args:
        recipe: The recipe.
        num_training: Training records, or users where they are the unit, without those held out.

    Returns:
        A warning, or None if batches come out within a fifth of the planned size.
    """
    actual = num_training * recipe.privacy.sample_rate
    expected, unit = recipe.privacy.expected_batch_size, recipe.privacy.unit
    if abs(actual - expected) <= _TOLERANCE * expected:
        return None
    return (
        f"batches will hold {actual:,.1f} {unit}s on average, the recipe divides by {expected:,}: with "
        f"{num_training:,} training {unit}s, privacy.sample_rate = {expected / num_training:.3g} would match."
    )
