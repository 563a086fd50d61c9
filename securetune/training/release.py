"""Held-out figures for the outside: the counts behind them, noised once and charged to the ledger."""

from collections.abc import Sequence

from securetune.config.schema import Recipe
from securetune.evidence import Evidence, Interval
from securetune.privacy.release import release_counts
from securetune.training.folder import RunFolder

_RELEASED = "released"
_COUNTED = ("accuracy", "accuracy_pgd", "accuracy_char")


def release_evidence(recipe: Recipe, run: RunFolder, evidence: Sequence[Evidence]) -> list[Evidence]:
    """Noise the held-out accuracies of the base and the hardened model, once per run.

    The plain fine-tune saw private records without protection, so nothing about it is released; without
    privacy only the base model's figures are. The ledger was charged ``publish.release_epsilon`` before the
    checkpoint was sealed.

    Args:
        recipe: The recipe.
        run: The run's folder; keeps the released figures, so that a second call draws no new noise.
        evidence: The un-noised evidence of the run.

    Returns:
        Evidence that may be published; empty if the recipe sets no ``publish.release_epsilon``.
    """
    if run.has(_RELEASED):
        return released_evidence(recipe)
    epsilon = recipe.publish.release_epsilon
    subjects = ("base", "hardened") if recipe.privacy.enabled else ("base",)
    chosen = [
        item
        for item in evidence
        if item.metric in _COUNTED and item.subject in subjects and item.value is not None
    ]
    if epsilon is None or not chosen:
        return []
    counts = {str(index): round((item.value or 0.0) * item.n) for index, item in enumerate(chosen)}
    totals = {str(index): item.n for index, item in enumerate(chosen)}
    fractions = release_counts(counts, totals, epsilon)
    released = []
    for index, item in enumerate(chosen):
        fraction = fractions[str(index)]
        changes = {
            "value": fraction.value,
            "interval": Interval(low=fraction.low, high=fraction.high),
            "method": f"{item.method}; released with two-sided geometric noise of scale "
            f"{fraction.noise_scale:.2f} texts, the interval covers sampling and noise",
            "status": "pass",
            "private_statistic": False,
            "release_epsilon": epsilon,
        }
        released.append(Evidence.model_validate(item.model_dump() | changes))
    run.save(_RELEASED, [item.model_dump(mode="json") for item in released])
    return released


def released_evidence(recipe: Recipe) -> list[Evidence]:
    """Return the figures a run has released already.

    Args:
        recipe: The recipe of the run.

    Returns:
        Its released evidence; empty if there is none.
    """
    run = RunFolder(recipe.run_folder)
    return [Evidence.model_validate(item) for item in run.load(_RELEASED)] if run.has(_RELEASED) else []
