"""How the noise of a plan would change with its target or its length, for the plan's table and plots."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from securetune.errors import PrivacyError
from securetune.privacy.accounting import PrivacySpec, calibrate_noise_multiplier

__all__ = ["NoiseCurve", "noise_over_epsilon", "noise_over_steps"]

DEFAULT_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)


class NoiseCurve(NamedTuple):
    """Calibrated noise at a few values of one setting, the others as planned.

    Attributes:
        values: Values of the setting, increasing; those that no allowed noise reaches are left out.
        noise_multipliers: The least noise that keeps each within its target.
    """

    values: tuple[float, ...]
    noise_multipliers: tuple[float, ...]


def noise_over_epsilon(spec: PrivacySpec, target_epsilons: Sequence[float] | None = None) -> NoiseCurve:
    """Calibrate the noise for other targets. Costs about a second for each.

    Args:
        spec: The plan's settings.
        target_epsilons: Targets > 0; by default a quarter of the planned one to four times it.

    Returns:
        The curve over ``target_epsilon``, falling.
    """
    if target_epsilons is None:
        target_epsilons = [spec.target_epsilon * factor for factor in DEFAULT_FACTORS]
    return _curve(
        [replace(spec, target_epsilon=target) for target in sorted(target_epsilons)], "target_epsilon"
    )


def noise_over_steps(spec: PrivacySpec, steps: Sequence[int] | None = None) -> NoiseCurve:
    """Calibrate the noise for shorter and longer runs. Costs about a second for each.

    Args:
        spec: The plan's settings.
        steps: Numbers of steps; by default a quarter of the planned number to four times it.

    Returns:
        The curve over ``steps``, rising.
    """
    if steps is None:
        steps = sorted({max(1, round(spec.steps * factor)) for factor in DEFAULT_FACTORS})
    return _curve([replace(spec, steps=count) for count in sorted(steps)], "steps")


def _curve(specs: Sequence[PrivacySpec], setting: str) -> NoiseCurve:
    values: list[float] = []
    noise_multipliers: list[float] = []
    for spec in specs:
        try:
            noise_multiplier = calibrate_noise_multiplier(
                target_epsilon=spec.target_epsilon,
                delta=spec.delta,
                sample_rate=spec.sample_rate,
                steps=spec.steps,
                sampling=spec.sampling,
            )
        except PrivacyError:
            continue
        values.append(getattr(spec, setting))
        noise_multipliers.append(noise_multiplier)
    return NoiseCurve(tuple(values), tuple(noise_multipliers))
