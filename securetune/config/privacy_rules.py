"""Rules between options of the section ``privacy``, and between them and the rest of a recipe."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from securetune.config.schema import PrivacyConfig

Problem = tuple[str, str]
"""A dotted path and what is wrong there."""

Rule = tuple[tuple[str, ...], Callable[..., Iterator[Problem]]]
"""The sections that a rule needs, and the rule."""

_CLIPPING_MODES = {
    "groups": "groups",
    "stability": "automatic",
    "target_quantile": "adaptive",
    "threshold_learning_rate": "adaptive",
    "count_noise_multiplier": "adaptive",
    "per_layer": "adaptive",
}


def _delta(privacy: "PrivacyConfig") -> Iterator[Problem]:
    largest = 1 / privacy.expected_records
    if privacy.enabled and privacy.delta > largest:
        yield (
            "privacy.delta",
            f"must be at most 1/N = {largest:.3g}, got {privacy.delta:g}. "
            f"N = expected_batch_size / sample_rate = {privacy.expected_records:,.0f} records.",
        )


def _clipping(privacy: "PrivacyConfig") -> Iterator[Problem]:
    clipping, path = privacy.clipping, "privacy.clipping"
    if not privacy.enabled and clipping != type(clipping)():
        yield path, "has no effect with privacy.enabled = false: nothing is clipped. Remove it."
        return
    default = type(clipping)()
    for option, mode in _CLIPPING_MODES.items():
        if clipping.mode != mode and getattr(clipping, option) != getattr(default, option):
            remedy = (
                "For adaptive thresholds set mode to 'adaptive' too; for fixed ones set mode to 'per_layer' "
                "and remove it."
                if option == "per_layer"
                else f"Remove it, or set mode to {mode!r}."
            )
            yield f"{path}.{option}", f"has no effect with mode = {clipping.mode!r}. {remedy}"
    if clipping.mode == "groups" and not clipping.groups:
        yield (
            f"{path}.groups",
            "required for mode = 'groups': a weight for each pattern of parameter names, such as "
            "{'*.q_proj.*': 2.0, '*.v_proj.*': 1.0}.",
        )


PRIVACY_RULES: list[Rule] = [
    (("privacy",), _delta),
    (("privacy",), _clipping),
]
