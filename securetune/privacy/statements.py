"""What a plan, a ledger and a report say in words about how a private run bounds and hides each unit."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from securetune.privacy.ledger_header import LedgerHeader

__all__ = ["clipping_statement", "noise_statement", "sampling_statement"]


def sampling_statement(header: "LedgerHeader") -> str:
    """Say how the units of a step are chosen, under which neighbouring relation, and what that makes public.

    Args:
        header: The run's public constants.

    Returns:
        A sentence without a full stop.
    """
    unit = header.unit
    limit = "" if header.max_batch_size is None else f", at most {header.max_batch_size:,} {unit}s a step"
    if unit != "record":
        limit += f", up to {header.max_records_per_unit} records of each"
    if header.sampler == "fixed order":
        return (
            f"batches in a secret fixed order, without amplification by sampling{limit}; "
            f"{header.neighbouring_relation} {unit}; the number of {unit}s is private"
        )
    if header.num_records is None:
        size = f"the number of {unit}s is private"
    else:
        size = f"N = {header.num_records:,} is public: places for {unit}s, of which some may be empty"
    return (
        f"{header.sampler} sampling at rate {header.sample_rate:.6g}{limit}; "
        f"{header.neighbouring_relation} {unit}; {size}"
    )


def noise_statement(header: "LedgerHeader") -> str:
    """Say what noise hides each unit.

    Args:
        header: The run's public constants.

    Returns:
        A sentence without a full stop.
    """
    sigma = f"noise multiplier {header.noise_multiplier:.4f}"
    if not header.noise:
        return f"Gaussian, independent at every step, {sigma}"
    noise = header.noise
    return (
        f"{noise['kind'].replace('_', ' ')} (DP-FTRL), correlated over {noise['bands']} of the "
        f"{noise['steps']} steps: all of them are one Gaussian mechanism, {sigma}; a {header.unit} takes "
        f"part every {noise['batches_per_epoch']} steps, {noise['max_participations']} times at most; what "
        "is charged is mechanisms, one for the run and one for each resumption"
    )


def clipping_statement(
    mode: str, settings: Mapping[str, Any], *, unit: str = "record", sensitivity: float
) -> str:
    """Say how each unit's gradient is bounded, and by how much.

    Args:
        mode: A mode of :mod:`securetune.privacy.clipping`.
        settings: Its settings, public constants.
        unit: What is clipped as a whole: "record" or "user".
        sensitivity: Most that one unit adds to the sum, in L2 norm; for adaptive thresholds, at first.

    Returns:
        A sentence without a full stop.

    Raises:
        ValueError: If there is no such mode.
    """
    size = f"{sensitivity:g}"
    if mode == "adaptive":
        what = "each layer's threshold" if settings["per_layer"] else "the threshold"
        return (
            f"adaptive: {what} follows the {settings['target_quantile']:g} quantile of the {unit}s' gradient "
            f"norms; learning it, with count noise multiplier {settings['count_noise_multiplier']:g}, is "
            f"part of epsilon; sensitivity {size} at first, then the threshold of the step"
        )
    statements = {
        "flat": f"each {unit}'s gradient is scaled to L2 norm at most {size}",
        "per_layer": f"each layer of a {unit}'s gradient is scaled to a threshold of its own",
        "groups": f"each group of a {unit}'s gradient is scaled to a threshold of its own",
        "automatic": f"each {unit}'s gradient is multiplied by {size} / (its norm + "
        f"{settings.get('stability', 0.01):g})",
        "normalized": f"each {unit}'s gradient is scaled to L2 norm {size}",
    }
    if mode not in statements:
        raise ValueError(f"mode must be one of {', '.join([*statements, 'adaptive'])}, got {mode!r}.")
    if mode == "groups":
        groups = ", ".join(f"{pattern} {value:.4g}" for pattern, value in settings["groups"].items())
        statements[mode] += f" ({groups})"
    return f"{mode}: {statements[mode]}; sensitivity {size}"
