"""Held-out figures for the outside: the counts behind them, noised once and charged to the ledger."""

import logging
from collections.abc import Sequence
from typing import Final

from securetune.config.schema import EvaluationConfig, Recipe
from securetune.evidence import Evidence, Interval, public_params
from securetune.privacy.release import release_counts
from securetune.training.folder import RunFolder

_LOGGER = logging.getLogger(__name__)
_RELEASED = "released"
_SUBJECTS: Final = ("base", "hardened")
_METHODS: Final = {
    "accuracy": "share of held-out texts whose label word scores highest",
    "accuracy_pgd": "held-out texts still right under PGD on the margin, from the smallest radius to this "
    "one; radius in mean embedding norms",
    "accuracy_char": "held-out texts still right under a black-box search for misspellings, re-checked on "
    "the final text",
}
"""The metrics that are counts of held-out texts, in public words: its own may tell how it went."""


def release_evidence(recipe: Recipe, run: RunFolder, evidence: Sequence[Evidence]) -> list[Evidence]:
    """Noise the held-out accuracies of the base and the hardened model, once per run.

    The plain fine-tune saw private records without protection, so nothing about it is released. The ledger
    was charged ``publish.release_epsilon`` before the checkpoint was sealed.

    Guarantees:
        Beside the noised value, a released figure holds only what follows from the recipe: settings, a fixed
        text, and the recipe's number of texts. A figure that failed its own checks is not released; nor is
        one measured on another number of texts than the recipe's, which would tell how many were held out.

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
    if epsilon is None:
        return []
    chosen = _choose(evidence, recipe.evaluation)
    if not chosen:
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
            "method": f"{_METHODS[item.metric]}; released with two-sided geometric noise of scale "
            f"{fraction.noise_scale:.2f} texts, the interval covers sampling and noise",
            "private_statistic": False,
            "release_epsilon": epsilon,
            "params": public_params(item.params),
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


def _choose(evidence: Sequence[Evidence], settings: EvaluationConfig) -> list[Evidence]:
    """Pick the counts that may be noised, and name each metric whose number of texts is not the recipe's."""
    chosen: list[Evidence] = []
    refused: set[str] = set()
    for item in evidence:
        if item.metric not in _METHODS or item.subject not in _SUBJECTS or item.status != "pass":
            continue
        is_attack = item.metric != "accuracy"
        option, asked = (
            ("num_attacked", settings.num_attacked) if is_attack else ("num_texts", settings.num_texts)
        )
        if item.n == asked:
            chosen.append(item)
        elif item.metric not in refused:
            refused.add(item.metric)
            remedy = (
                f"Lower evaluation.{option}, or hold more records out (data.held_out_fraction), so that "
                "there are enough held-out records"
                if item.n < asked
                else f"Set evaluation.{option} to at least half of evaluation.num_membership"
            )
            _LOGGER.warning(
                "%s is not released: it was measured on %d texts, and only the recipe's own number "
                "(evaluation.%s = %d) is public. %s.",
                item.metric,
                item.n,
                option,
                asked,
                remedy,
            )
    return chosen
