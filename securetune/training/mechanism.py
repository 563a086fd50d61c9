"""A recipe's private mechanism: what bounds each unit's gradient, how much noise hides it, who counts."""

import math

import torch

from securetune.config.schema import Recipe
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
from securetune.privacy.distributed import Processes, SharedLedger
from securetune.privacy.ledger import Ledger, LedgerHeader
from securetune.privacy.matrix_factorization import CorrelatedNoise, MatrixMechanism, WholeRunCharge
from securetune.privacy.noise import NoiseSource
from securetune.privacy.per_sample import PerSampleGradients
from securetune.privacy.reduction import Reduction
from securetune.privacy.step import PrivateStep
from securetune.training.drawing import UnitSampler, planned_sampler
from securetune.training.folder import RunFolder

_BANDS = 16
_COUNT_NOISE_OF_BATCH = 10  # the choice of Andrew et al. 2021 for one threshold
_COUNT_NOISE_OF_RUN = 5  # the gradient's noise then grows by 2 %


def planned_header(
    recipe: Recipe,
    plan: PrivacyPlan,
    *,
    sampler: UnitSampler | None = None,
    reportable_epsilon: bool = True,
) -> LedgerHeader:
    """Say what the run's ledger will begin with.

    Args:
        recipe: The recipe.
        plan: The calibrated mechanism.
        sampler: What draws the units of each step; None plans with the recipe's.
        reportable_epsilon: Whether sampler and noise have secret keys.

    Returns:
        The public constants of the run.

    Raises:
        PrivacyError: If the sampler draws otherwise than planned.
    """
    header = LedgerHeader.from_plan(
        plan,
        reportable_epsilon=reportable_epsilon,
        unit=recipe.privacy.unit,
        sampler=sampler or planned_sampler(recipe),
        clipping=make_clipping(recipe, noise_multiplier=plan.noise_multiplier),
    )
    if recipe.privacy.noise != "matrix_factorization":
        return header
    mechanism = make_mechanism(recipe, steps_done=0)
    noise = {
        "kind": "matrix_factorization",
        "bands": mechanism.bands,
        "batches_per_epoch": mechanism.participation.min_separation,
        "max_participations": mechanism.participation.possible_participations,
        "steps": recipe.privacy.steps,
    }
    return header.model_copy(update={"noise": noise})


def make_mechanism(recipe: Recipe, *, steps_done: int) -> MatrixMechanism:
    """Make what correlates the noise of the steps that are left.

    Args:
        recipe: The recipe.
        steps_done: Steps of the run that are behind it.

    Returns:
        The mechanism; a resumed run starts a new one.
    """
    participation = planned_sampler(recipe, steps_done=steps_done).participation
    assert participation is not None, "a rule of the recipe"
    bands = min(recipe.privacy.noise_bands or _BANDS, participation.steps)
    return MatrixMechanism(participation=participation, bands=bands)


def privacy_spec(recipe: Recipe) -> PrivacySpec:
    """Take the privacy constants out of a recipe, those of sampling from the sampler that it asks for.

    Args:
        recipe: The recipe.

    Returns:
        What the accountant calibrates for.
    """
    settings = recipe.privacy
    sampler = planned_sampler(recipe)
    # with correlated noise the whole run is one mechanism, and so is each resumption
    is_whole = settings.noise == "matrix_factorization"
    return PrivacySpec(
        target_epsilon=settings.target_epsilon,
        delta=settings.delta,
        sample_rate=sampler.sample_rate,
        steps=1 + settings.planned_resumptions if is_whole else settings.steps,
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
    sampler: UnitSampler,
    *,
    steps_done: int = 0,
    processes: Processes | None = None,
    reduction: Reduction | None = None,
) -> tuple[Ledger, PrivateStep]:
    """Open the run's ledger and make the step that is charged to it.

    Args:
        recipe: The recipe.
        run: The run's folder.
        plan: The calibrated mechanism.
        grads: Per-sample gradients of the trainable parameters.
        optimizer: Over those parameters.
        sampler: Draws the units of each step.
        steps_done: Steps of the run that are behind it.
        processes: Those that take the step together; None for one.
        reduction: How they add up.

    Returns:
        The open ledger, and the step.

    Raises:
        PrivacyError: If the ledger is another run's, the sampler draws otherwise than planned, or the
            parameters do not fit the clipping.
    """
    correlated = None
    if recipe.privacy.noise == "matrix_factorization":
        correlated = make_mechanism(recipe, steps_done=steps_done)
        assert correlated.participation == sampler.participation
    key = None if processes is None else processes.new_key()
    noise = NoiseSource(key) if correlated is None else CorrelatedNoise(correlated, key)
    reportable = noise.reportable_epsilon and sampler.reportable_epsilon
    clipping = make_clipping(recipe, noise_multiplier=plan.noise_multiplier)
    clipping.assign(grads.parameter_names())  # refuses before there is a ledger
    header = planned_header(recipe, plan, sampler=sampler, reportable_epsilon=reportable)
    ledger = Ledger(run.ledger, header) if processes is None else SharedLedger(run.ledger, header, processes)
    try:
        step = PrivateStep(
            grads,
            optimizer,
            clipping=clipping,
            noise_multiplier=plan.noise_multiplier,
            expected_batch_size=recipe.privacy.expected_batch_size,
            noise=noise,
            ledger=ledger if correlated is None else WholeRunCharge(ledger, correlated),
            reduction=reduction,
        )
    except BaseException:
        ledger.close()
        raise
    return ledger, step
