"""Rules between options of the section ``privacy``, and between them and the rest of a recipe."""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from securetune.config.schema import DataConfig, PrivacyConfig, PublishConfig, TrainingConfig

Problem = tuple[str, str]
"""A dotted path and what is wrong there."""

Rule = tuple[tuple[str, ...], Callable[..., Iterator[Problem]]]
"""The sections that a rule needs, and the rule."""

_RATE_TOLERANCE = 0.01  # of a rate that somebody typed; the accountant takes the exact one

_PRIVATE_SIZE = ("poisson", "fixed_order")
_RECORD_COLUMNS = ("text", "label", "prompt", "completion", "messages")
_CLIPPING_MODES = {
    "groups": "groups",
    "stability": "automatic",
    "target_quantile": "adaptive",
    "threshold_learning_rate": "adaptive",
    "count_noise_multiplier": "adaptive",
    "per_layer": "adaptive",
}


def _delta(privacy: "PrivacyConfig") -> Iterator[Problem]:
    largest = 1 / privacy.most_records
    if privacy.enabled and privacy.delta > largest:
        yield (
            "privacy.delta",
            f"must be at most 1/N = {largest:.3g}, got {privacy.delta:g}. "
            + (
                f"N = num_units = {privacy.num_units:,}."
                if privacy.most_records > privacy.expected_records
                else "N = expected_batch_size / sample_rate = "
                f"{privacy.expected_records:,.0f} {privacy.unit}s."
            ),
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


def _sampling(privacy: "PrivacyConfig") -> Iterator[Problem]:
    kind, num_units, largest = privacy.sampling, privacy.num_units, privacy.max_batch_size
    batch = privacy.expected_batch_size
    if kind in _PRIVATE_SIZE and num_units is not None:
        yield (
            "privacy.num_units",
            f"has no effect with sampling = {kind!r}, where the number of records is private. Remove it.",
        )
    if kind not in _PRIVATE_SIZE and num_units is None:
        yield (
            "privacy.num_units",
            f"required for sampling = {kind!r}: a public constant, at least the number of training records "
            "(what is left once some are held out). Set it, with room to spare.",
        )
    if kind != "truncated_poisson" and largest is not None:
        yield (
            "privacy.max_batch_size",
            f"has no effect with sampling = {kind!r}. Remove it, or set sampling to 'truncated_poisson'.",
        )
    if kind == "truncated_poisson" and largest is None:
        yield (
            "privacy.max_batch_size",
            "required for sampling = 'truncated_poisson': the most records in one step, such as "
            f"{batch + 4 * math.isqrt(batch) + 1}.",
        )
    if kind == "truncated_poisson" and largest is not None and largest < batch:
        yield (
            "privacy.max_batch_size",
            f"must be at least expected_batch_size ({batch}), got {largest}: most steps would be cut.",
        )
    if num_units is not None and num_units < max(batch, largest or 0):
        yield (
            "privacy.num_units",
            f"must be at least the largest batch ({max(batch, largest or 0)}), got {num_units}. Raise it to "
            "at least the number of training records, or lower the batch.",
        )
    elif kind == "fixed_size" and num_units is not None:
        rate = batch / num_units
        if not math.isclose(privacy.sample_rate, rate, rel_tol=_RATE_TOLERANCE):
            yield (
                "privacy.sample_rate",
                f"must be expected_batch_size / num_units = {rate:.4g} with sampling = 'fixed_size', got "
                f"{privacy.sample_rate:g}.",
            )


def _unit(privacy: "PrivacyConfig", data: "DataConfig") -> Iterator[Problem]:
    is_user = privacy.unit == "user"
    if not is_user:
        remedy = "Remove it, or set privacy.unit to 'user'."
        if data.user_field is not None:
            yield "data.user_field", f"has no effect with privacy.unit = 'record'. {remedy}"
        if privacy.max_records_per_user is not None:
            yield "privacy.max_records_per_user", f"has no effect with unit = 'record'. {remedy}"
        return
    if data.private.source is not None:
        yield (
            "privacy.unit",
            f"cannot be 'user' with data.private.source = {data.private.source!r}, which names no users. Set "
            "it to 'record', or give a file with a column of users in data.private.path.",
        )
    elif data.user_field is None:
        yield (
            "data.user_field",
            "required for privacy.unit = 'user': the column that names the user of each record.",
        )
    if data.user_field in _RECORD_COLUMNS:
        yield (
            "data.user_field",
            f"must be a column of its own, got {data.user_field!r}, which holds the record itself.",
        )
    if privacy.max_records_per_user is None:
        yield (
            "privacy.max_records_per_user",
            "required for unit = 'user': the most records of one user in one step, such as 8.",
        )


def _micro_batch_of_users(
    privacy: "PrivacyConfig", data: "DataConfig", training: "TrainingConfig"
) -> Iterator[Problem]:
    tokens = (privacy.max_records_per_user or 1) * data.max_length
    if privacy.unit == "user" and data.max_length <= training.micro_batch_tokens < tokens:
        yield (
            "training.micro_batch_tokens",
            f"must be at least privacy.max_records_per_user * data.max_length = {tokens:,} with privacy.unit "
            f"= 'user', got {training.micro_batch_tokens:,}: all records of a user are clipped in one pass. "
            "Raise it, or lower one of the two.",
        )


def _noise(privacy: "PrivacyConfig") -> Iterator[Problem]:
    if privacy.noise == "gaussian":
        remedy = "Remove it, or set noise to 'matrix_factorization'."
        if privacy.sampling == "fixed_order":
            yield (
                "privacy.sampling",
                "cannot be 'fixed_order' with noise = 'gaussian': without amplification by sampling, "
                "independent noise costs far more. Set noise to 'matrix_factorization', or sampling to "
                "'poisson'.",
            )
        if privacy.noise_bands is not None:
            yield "privacy.noise_bands", f"has no effect with noise = 'gaussian'. {remedy}"
        if privacy.planned_resumptions:
            yield (
                "privacy.planned_resumptions",
                f"has no effect with noise = 'gaussian': such a run always resumes. {remedy}",
            )
        return
    path = "privacy.noise"
    if not privacy.enabled:
        yield path, "has no effect with privacy.enabled = false: no noise is added. Remove it."
    if privacy.clipping.mode == "adaptive":
        yield (
            "privacy.clipping.mode",
            "cannot be 'adaptive' with noise = 'matrix_factorization': all steps are one mechanism with one "
            "threshold. Set it to 'flat', or noise to 'gaussian'.",
        )
    if privacy.sampling != "fixed_order":
        yield (
            "privacy.sampling",
            f"must be 'fixed_order' with noise = 'matrix_factorization', got {privacy.sampling!r}: its "
            "epsilon gains nothing from sampling.",
        )
    elif abs(privacy.sample_rate * round(1 / privacy.sample_rate) - 1) > _RATE_TOLERANCE:
        whole = round(1 / privacy.sample_rate)
        yield (
            "privacy.sample_rate",
            f"must be 1 over a whole number of batches with sampling = 'fixed_order', got "
            f"{privacy.sample_rate:g}. Try {1 / whole:.4g}, for {whole} batches.",
        )
    if privacy.noise_bands is not None and privacy.noise_bands > privacy.steps:
        yield (
            "privacy.noise_bands",
            f"must be at most steps ({privacy.steps}), got {privacy.noise_bands}.",
        )


def _releases_of_fixed_size(
    privacy: "PrivacyConfig", publish: "PublishConfig", training: "TrainingConfig"
) -> Iterator[Problem]:
    if not privacy.enabled or privacy.sampling != "fixed_size":
        return
    why = (
        "with privacy.sampling = 'fixed_size': a record that is replaced by another may change sides, and "
        "then both budgets are paid. Remove it, or set privacy.sampling to 'poisson' or 'truncated_poisson'."
    )
    if publish.release_epsilon is not None:
        yield "publish.release_epsilon", f"cannot be set {why}"
    if training.early_stopping.method == "noisy_test":
        yield "training.early_stopping.method", f"cannot be 'noisy_test' {why}"


PRIVACY_RULES: list[Rule] = [
    (("privacy", "publish", "training"), _releases_of_fixed_size),
    (("privacy",), _noise),
    (("privacy", "data"), _unit),
    (("privacy", "data", "training"), _micro_batch_of_users),
    (("privacy",), _delta),
    (("privacy",), _sampling),
    (("privacy",), _clipping),
]
