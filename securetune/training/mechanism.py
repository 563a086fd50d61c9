"""A recipe's private mechanism: what bounds each unit's gradient, how much noise hides it, who counts."""

import math
from collections.abc import Sequence

import torch

from securetune.config.schema import Recipe
from securetune.config.size import require_places
from securetune.privacy.accounting import PrivacyPlan, PrivacySpec
from securetune.privacy.adaptive_clipping import AdaptiveClipping
from securetune.privacy.clipping import (
    AutomaticClipping,
    Clipping,
    FlatClipping,
    GroupClipping,
    NormalizedClipping,
    PerLayerClipping,
)
from securetune.privacy.ledger import Ledger, LedgerHeader
from securetune.privacy.noise import NoiseSource
from securetune.privacy.per_sample import PerSampleGradients
from securetune.privacy.sampling import (
    FixedSizeSampler,
    PoissonSampler,
    Sampler,
    TruncatedPoissonSampler,
)
from securetune.privacy.step import PrivateStep
from securetune.privacy.units import UserSampler
from securetune.training.folder import RunFolder

_COUNT_NOISE_OF_BATCH = 10  # the choice of Andrew et al. 2021 for one threshold
_COUNT_NOISE_OF_RUN = 5  # the gradient's noise then grows by 2 %


def make_unit_sampler(recipe: Recipe, user_ids: Sequence[str | None]) -> Sampler | UserSampler:
    """Make what draws the records of each step: one by one, or user by user.

    Args:
        recipe: The recipe.
        user_ids: The user of each training record, in their order; read where users are the unit only.

    Returns:
        The sampler, with new secret keys.

    Raises:
        DataError: If there are more units than places.
    """
    if recipe.privacy.unit == "record":
        return make_sampler(recipe, len(user_ids))
    most = recipe.privacy.max_records_per_user
    assert most is not None, "a rule of the recipe"
    users = [user for user in user_ids if user is not None]
    assert len(users) == len(user_ids), "records are read with their users"
    return UserSampler(users, make_sampler(recipe, len(set(users))), max_records_per_user=most)


def planned_header(recipe: Recipe, plan: PrivacyPlan, *, reportable_epsilon: bool = True) -> LedgerHeader:
    """Say what the run's ledger will begin with.

    Args:
        recipe: The recipe.
        plan: The calibrated mechanism.
        reportable_epsilon: Whether sampler and noise have secret keys.

    Returns:
        The public constants of the run.
    """
    return LedgerHeader.from_plan(
        plan,
        reportable_epsilon=reportable_epsilon,
        unit=recipe.privacy.unit,
        sampler=_sampler_of_one(recipe),
        clipping=make_clipping(recipe, noise_multiplier=plan.noise_multiplier),
    )


def _sampler_of_one(recipe: Recipe) -> Sampler | UserSampler:
    """The recipe's sampler of a single unit: how many there are is in no public number."""
    return make_unit_sampler(recipe, ["somebody"])


def make_sampler(recipe: Recipe, num_units: int) -> Sampler:
    """Make the recipe's sampler, with a new secret key.

    Where the accounting makes the number of units public, the sampler draws places instead, of which there
    are ``privacy.num_units``: positions from ``num_units`` on are empty places, without gradient. So adding
    or removing a unit is filling or emptying one place, and the true number stays private.

    Args:
        recipe: The recipe.
        num_units: Units (records, or users) there are to train on.

    Returns:
        The sampler.

    Raises:
        DataError: If there are more units than places.
    """
    privacy = recipe.privacy
    if privacy.num_units is None:
        return PoissonSampler(num_units, privacy.sample_rate)
    require_places(recipe, num_units)
    if privacy.sampling == "fixed_size":
        return FixedSizeSampler(privacy.num_units, privacy.expected_batch_size)
    assert privacy.max_batch_size is not None
    return TruncatedPoissonSampler(privacy.num_units, privacy.sample_rate, privacy.max_batch_size)


def privacy_spec(recipe: Recipe) -> PrivacySpec:
    """Take the privacy constants out of a recipe, those of sampling from the sampler that it asks for.

    Args:
        recipe: The recipe.

    Returns:
        What the accountant calibrates for.
    """
    settings = recipe.privacy
    sampler = _sampler_of_one(recipe)
    return PrivacySpec(
        target_epsilon=settings.target_epsilon,
        delta=settings.delta,
        sample_rate=sampler.sample_rate,
        steps=settings.steps,
        max_grad_norm=settings.max_grad_norm,
        expected_batch_size=settings.expected_batch_size,
        sampler=sampler.sampling.kind,
        num_records=sampler.sampling.num_records,
        max_batch_size=sampler.sampling.max_batch_size,
    )


def make_clipping(recipe: Recipe, *, noise_multiplier: float) -> Clipping:
    """Make the recipe's clipping, not yet bound to parameters.

    Args:
        recipe: The recipe.
        noise_multiplier: The calibrated noise of the whole step, in which adaptive thresholds have a part.

    Returns:
        The clipping; its sensitivity, at first, is ``privacy.max_grad_norm``.

    Raises:
        PrivacyError: If a threshold is out of range.
    """
    privacy, settings = recipe.privacy, recipe.privacy.clipping
    norm = privacy.max_grad_norm
    match settings.mode:
        case "flat":
            return FlatClipping(norm)
        case "per_layer":
            return PerLayerClipping(norm)
        case "groups":
            whole = math.hypot(*settings.groups.values())
            return GroupClipping(
                {pattern: norm * weight / whole for pattern, weight in settings.groups.items()}
            )
        case "automatic":
            return AutomaticClipping(norm, settings.stability)
        case "normalized":
            return NormalizedClipping(norm)
        case "adaptive":
            count_noise = settings.count_noise_multiplier
            if count_noise is None:
                of_batch = privacy.expected_batch_size / _COUNT_NOISE_OF_BATCH
                count_noise = max(of_batch, _COUNT_NOISE_OF_RUN * noise_multiplier)
            return AdaptiveClipping(
                norm,
                settings.target_quantile,
                learning_rate=settings.threshold_learning_rate,
                count_noise_multiplier=count_noise,
                expected_batch_size=privacy.expected_batch_size,
                per_layer=settings.per_layer,
            )


def gradient_noise_multiplier(recipe: Recipe, *, noise_multiplier: float) -> float:
    """Say how much of the run's noise multiplier is left for the gradient once adaptive thresholds are paid.

    Args:
        recipe: The recipe.
        noise_multiplier: The calibrated noise of the whole step.

    Returns:
        Noise standard deviation over sensitivity, for the gradient sum; more than ``noise_multiplier`` where
        thresholds are adaptive, since both releases together must cost what is charged.

    Raises:
        PrivacyError: If the count of clipped units would cost the whole step.
    """
    if recipe.privacy.clipping.mode != "adaptive":
        return noise_multiplier
    clipping = make_clipping(recipe, noise_multiplier=noise_multiplier)
    clipping.assign(["any"])
    return clipping.noise_stddev(noise_multiplier) / clipping.sensitivity


def make_private_step(
    recipe: Recipe,
    run: RunFolder,
    plan: PrivacyPlan,
    grads: PerSampleGradients,
    optimizer: torch.optim.Optimizer,
    sampler: Sampler | UserSampler,
) -> tuple[Ledger, PrivateStep]:
    """Open the run's ledger and make the step that is charged to it.

    Args:
        recipe: The recipe.
        run: The run's folder.
        plan: The calibrated mechanism.
        grads: Per-sample gradients of the trainable parameters.
        optimizer: Over those parameters.
        sampler: Draws the units of each step.

    Returns:
        The open ledger, and the step.

    Raises:
        PrivacyError: If the ledger is another run's, or the parameters do not fit the clipping.
    """
    noise = NoiseSource()
    reportable = noise.reportable_epsilon and sampler.reportable_epsilon
    clipping = make_clipping(recipe, noise_multiplier=plan.noise_multiplier)
    clipping.assign(grads.parameter_names())  # refuses before there is a ledger
    header = LedgerHeader.from_plan(
        plan, reportable_epsilon=reportable, unit=recipe.privacy.unit, sampler=sampler, clipping=clipping
    )
    ledger = Ledger(run.ledger, header)
    try:
        step = PrivateStep(
            grads,
            optimizer,
            clipping=clipping,
            noise_multiplier=plan.noise_multiplier,
            expected_batch_size=recipe.privacy.expected_batch_size,
            noise=noise,
            ledger=ledger,
        )
    except BaseException:
        ledger.close()
        raise
    return ledger, step
