"""What was measured about one artefact: the value, how sure we are, on how many texts, by which method."""

import math
from collections.abc import Mapping
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "BOUND_METRICS",
    "METRICS",
    "PUBLIC_PARAMS",
    "Evidence",
    "GateResult",
    "Interval",
    "RuleResult",
    "Status",
    "describe_metric",
    "public_params",
]

Status = Literal["pass", "fail", "invalid", "not_run"]
"""``pass``: measured, and the method's own checks held. ``fail``: measured, and a check failed. ``invalid``:
a number exists but means nothing (say, the blind baseline also tells members apart). ``not_run``: no number.
Only ``pass`` ever satisfies a gate."""

METRICS: Final[dict[str, str]] = {
    "accuracy": "accuracy",
    "accuracy_pgd": "accuracy under an embedding PGD attack",
    "accuracy_char": "accuracy under a black-box character attack",
    "heldout_loss": "held-out loss (nats per supervised token)",
    "membership_auc": "membership inference AUC",
    "membership_tpr_at_1pct_fpr": "membership true-positive rate at 1 % false positives",
    "memorisation_gap": "memorisation gap (nats per text)",
    "epsilon": "privacy loss epsilon",
    "accuracy_difference": "difference in accuracy",
    "accuracy_pgd_difference": "difference in accuracy under an embedding PGD attack",
    "accuracy_char_difference": "difference in accuracy under a black-box character attack",
    "heldout_loss_difference": "difference in held-out loss (nats per supervised token)",
}
"""The metrics this version writes, with their names in plain words. Readers accept others."""

BOUND_METRICS: Final = frozenset({"epsilon"})
"""Metrics that are computed upper bounds, not estimates: they carry no confidence interval."""

PUBLIC_PARAMS: Final = frozenset({"delta", "edits", "noise_multiplier", "norm", "queries", "radius", "steps"})
"""The params that follow from the recipe alone. Every other one may be measured on private data, and stays in
the run folder with the value it belongs to."""


class Interval(BaseModel):
    """A two-sided confidence interval."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    low: float
    high: float
    level: float = Field(default=0.95, gt=0, lt=1)

    @model_validator(mode="after")
    def _check_order(self) -> "Interval":
        if self.low > self.high:
            raise ValueError(f"interval: low must be <= high, got low={self.low}, high={self.high}.")
        return self

    def contains(self, value: float) -> bool:
        """Say whether ``value`` lies in the interval, its ends included."""
        return self.low <= value <= self.high


class Evidence(BaseModel):
    """One measurement of one artefact.

    Guarantees:
        A value comes with ``n`` >= 1 and an interval (an upper bound such as epsilon needs no interval), or
        it is refused. An evidence without a value is never ``pass``. A private statistic cannot also be a
        released one.

    Attributes:
        metric: What was measured: a key of ``METRICS``, or another name in ``snake_case``.
        subject: Which model: ``base``, ``plain``, ``hardened``, or a pair such as ``hardened - plain``.
        value: The measured value, or None when there is none.
        interval: Two-sided confidence interval of ``value``.
        n: Number of independent units behind the value (texts, pairs, or steps for epsilon).
        method: How it was measured and how the interval was made, in words.
        seed: Seed of the measurement's own randomness, when it has one.
        status: See ``Status``.
        artefact: SHA-256 hex digest of what was measured.
        private_statistic: True for an un-noised statistic of private data: epsilon does not cover it, and it
            must not leave the run folder.
        release_epsilon: Set on a private statistic that was noised for release: the epsilon paid for the
            whole release it belongs to.
        params: Settings of the measurement (``radius``, ``steps``, ``queries``...), and what else was
            measured with it (``mean_queries``, ``errors``...); see ``PUBLIC_PARAMS``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    metric: str = Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=100)
    subject: str = Field(min_length=1, max_length=100)
    value: float | None
    interval: Interval | None
    n: int = Field(ge=0)
    method: str = Field(min_length=1)
    seed: int | None = None
    status: Status = "not_run"
    artefact: str = Field(pattern=r"^[0-9a-f]{64}$")
    private_statistic: bool
    release_epsilon: float | None = Field(default=None, gt=0)
    params: dict[str, float | int | str] = {}

    @model_validator(mode="after")
    def _check_meaning(self) -> "Evidence":
        name = f"evidence {self.metric} of {self.subject}"
        if self.value is None:
            if self.status in ("pass", "fail"):
                raise ValueError(f"{name}: status {self.status!r} needs a value. Use 'not_run' or 'invalid'.")
            if self.interval is not None:
                raise ValueError(f"{name}: has an interval but no value.")
        else:
            if self.status == "not_run":
                raise ValueError(f"{name}: status 'not_run' cannot carry a value, got {self.value}.")
            if self.n < 1:
                raise ValueError(f"{name}: a value needs n >= 1, got n={self.n}.")
            if self.interval is None and self.metric not in BOUND_METRICS:
                raise ValueError(f"{name}: a value needs its confidence interval.")
        if self.private_statistic and self.release_epsilon is not None:
            raise ValueError(
                f"{name}: cannot be both an un-noised private statistic and released at "
                f"epsilon {self.release_epsilon}."
            )
        if any(isinstance(value, float) and not math.isfinite(value) for value in self.params.values()):
            raise ValueError(f"{name}: params must be finite, got {self.params}.")
        return self


class RuleResult(BaseModel):
    """One rule of the release gate, and how it came out.

    Attributes:
        metric: The metric the rule is about.
        subject: The model it was checked on.
        at_least: The conservative end of the interval must be at least this, if set.
        at_most: The conservative end of the interval must be at most this, if set.
        value: The measured value, or None when nothing was measured.
        interval: Its interval.
        n: Number of independent units behind the value.
        passed: Whether the rule holds.
        reason: Why, in words.
        private_statistic: True when ``value`` is an un-noised statistic of private data.
        params: Settings of the measurement, of ``PUBLIC_PARAMS`` only.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    metric: str
    subject: str
    at_least: float | None
    at_most: float | None
    value: float | None
    interval: Interval | None
    n: int
    passed: bool
    reason: str
    private_statistic: bool
    params: dict[str, float | int | str] = {}


class GateResult(BaseModel):
    """The release gate: every rule of the recipe, checked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    passed: bool
    rules: list[RuleResult]

    @model_validator(mode="after")
    def _check_verdict(self) -> "GateResult":
        if self.passed != all(rule.passed for rule in self.rules):
            raise ValueError(f"gate: passed={self.passed} does not follow from its rules.")
        return self


def describe_metric(metric: str) -> str:
    """Name a metric in plain words.

    Args:
        metric: A metric name.

    Returns:
        Its entry in ``METRICS``, or the name with spaces for one this version does not know.
    """
    return METRICS.get(metric, metric.replace("_", " "))


def public_params(params: Mapping[str, float | int | str]) -> dict[str, float | int | str]:
    """Keep the params that may leave the run folder.

    Args:
        params: The params of an evidence.

    Returns:
        Those named in ``PUBLIC_PARAMS``.
    """
    return {name: value for name, value in params.items() if name in PUBLIC_PARAMS}
