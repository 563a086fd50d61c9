"""Which adversarial objectives may be combined with differential privacy, and why the others may not.

DP training clips the gradient of each sample. That bounds what one record can change only if a sample's
gradient depends on no other record. An objective that couples samples breaks this, however strong the
noise.
"""

from enum import StrEnum
from typing import NamedTuple

from securetune.errors import PrivacyError


class Coupling(StrEnum):
    """How an adversarial objective lets one record influence the gradient of another."""

    NONE = "none"
    SHARED_TRIGGER = "shared_trigger"
    BATCH_STATISTIC = "batch_statistic"
    BATCH_REPLAY = "batch_replay"
    PRIVATE_POOL = "private_pool"


class Objective(NamedTuple):
    """An adversarial training objective and the coupling it declares.

    Attributes:
        name: What a recipe calls it.
        coupling: ``Coupling.NONE`` only if the perturbation of sample ``i`` is a function of sample ``i``,
            the current weights and independent randomness alone.
        reason: For a coupling: what exactly one record changes for the others.
    """

    name: str
    coupling: Coupling
    reason: str = ""


OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (
        Objective("none", Coupling.NONE),
        Objective("fgsm", Coupling.NONE),
        Objective("pgd", Coupling.NONE),
        Objective(
            "universal_trigger",
            Coupling.SHARED_TRIGGER,
            "one perturbation is optimised on the whole batch, so every input depends on all records",
        ),
        Objective(
            "soft_prompt_attacker",
            Coupling.SHARED_TRIGGER,
            "the attacker's own parameters are trained on private batches and reach every later sample",
        ),
        Objective(
            "free",
            Coupling.BATCH_REPLAY,
            "a batch is used several times, which the accountant counts once, and the perturbation "
            "carries one batch into the next",
        ),
        Objective(
            "batch_mean_pgd",
            Coupling.BATCH_STATISTIC,
            "the attacked loss is a mean over the batch (or is clipped, guarded or stopped by a batch-wide "
            "value), so the other records scale a sample's step",
        ),
        Objective(
            "hard_example_pool",
            Coupling.PRIVATE_POOL,
            "which records are trained on depends on the losses of others, so sampling is not independent",
        ),
    )
}


def find_objective(name: str) -> Objective:
    """Look up an objective by the name a recipe uses.

    Args:
        name: A key of ``OBJECTIVES``.

    Returns:
        The objective.

    Raises:
        ValueError: If the name is unknown.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"adversarial.method must be one of {', '.join(sorted(OBJECTIVES))}, got {name!r}.")
    return OBJECTIVES[name]


def require_private_training_allows(objective: Objective) -> None:
    """Refuse an objective that couples samples, for use where privacy is enabled.

    Guarantees:
        Returns only for objectives whose declared coupling is ``Coupling.NONE``.

    Args:
        objective: The objective the recipe asks for.

    Raises:
        PrivacyError: If the objective couples samples; the message names the coupling and the way out.
    """
    if objective.coupling is not Coupling.NONE:
        raise PrivacyError(
            f"adversarial.method = {objective.name!r} cannot be combined with privacy.enabled = true: "
            f"{objective.reason} ({objective.coupling.value}). Clipping would no longer bound one record's "
            "influence. Use 'fgsm' or 'pgd', which perturb each sample alone, or set privacy.enabled: false."
        )
