"""What draws the records of each step, as a recipe asks for it, with new secret keys."""

from collections.abc import Callable, Sequence

from securetune.config.schema import Recipe
from securetune.config.size import require_places
from securetune.privacy.noise import SecretKey
from securetune.privacy.participation import EpochOrderSampler
from securetune.privacy.sampling import (
    FixedSizeSampler,
    PoissonSampler,
    Sampler,
    TruncatedPoissonSampler,
)
from securetune.privacy.units import UserSampler

NewKey = Callable[[], SecretKey]
UnitSampler = Sampler | UserSampler


def make_unit_sampler(
    recipe: Recipe,
    user_ids: Sequence[str | None],
    *,
    steps_done: int = 0,
    new_key: NewKey | None = None,
) -> UnitSampler:
    """Make what draws the records of each step: one by one, user by user, or in a fixed order.

    Args:
        recipe: The recipe.
        user_ids: The user of each training record, in their order; read where users are the unit only.
        steps_done: Steps of the run that are behind it.
        new_key: Makes keys that the processes of the run share; each sampler makes its own when None.

    Returns:
        The sampler, with new secret keys; it draws from step 0 on, also for a run that is resumed.

    Raises:
        DataError: If there are more units than places.
    """
    if recipe.privacy.unit == "record":
        return make_sampler(recipe, len(user_ids), steps_done=steps_done, new_key=new_key)
    return UserSampler(
        [user or "" for user in user_ids],
        make_sampler(recipe, len(set(user_ids)), steps_done=steps_done, new_key=new_key),
        max_records_per_user=most_records_of_a_user(recipe),
        key=_key(new_key),
    )


def planned_sampler(recipe: Recipe, *, steps_done: int = 0) -> UnitSampler:
    """Make the recipe's sampler of a single unit, to plan with: how many there are is in no public number.

    Args:
        recipe: The recipe.
        steps_done: Steps of the run that are behind it.

    Returns:
        The sampler.
    """
    return make_unit_sampler(recipe, ["somebody"], steps_done=steps_done)


def most_records_of_a_user(recipe: Recipe) -> int:
    """Return the public cap of records of one user in one step."""
    most = recipe.privacy.max_records_per_user
    assert most is not None, "a rule of the recipe"
    return most


def make_sampler(
    recipe: Recipe, num_units: int, *, steps_done: int = 0, new_key: NewKey | None = None
) -> Sampler:
    """Make the recipe's sampler of units.

    Where the accounting makes the number of units public, the sampler draws places instead, of which there
    are ``privacy.num_units``: positions from ``num_units`` on are empty places, without gradient. So adding
    or removing a unit is filling or emptying one place, and the true number stays private.

    Args:
        recipe: The recipe.
        num_units: Units (records, or users) there are to train on.
        steps_done: Steps of the run that are behind it.
        new_key: Makes keys that the processes of the run share.

    Returns:
        The sampler.

    Raises:
        DataError: If there are more units than places.
    """
    privacy = recipe.privacy
    if privacy.sampling == "fixed_order":
        left = max(1, privacy.steps - steps_done)
        return EpochOrderSampler(num_units, round(1 / privacy.sample_rate), steps=left, key=_key(new_key))
    if privacy.num_units is None:
        return PoissonSampler(num_units, privacy.sample_rate, _key(new_key))
    require_places(recipe, num_units)
    if privacy.sampling == "fixed_size":
        return FixedSizeSampler(privacy.num_units, privacy.expected_batch_size, _key(new_key))
    assert privacy.max_batch_size is not None
    return TruncatedPoissonSampler(
        privacy.num_units, privacy.sample_rate, privacy.max_batch_size, _key(new_key)
    )


def _key(new_key: NewKey | None) -> SecretKey | None:
    return None if new_key is None else new_key()
