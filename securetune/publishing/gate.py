"""The release gate: each rule of the recipe against the unfavourable end of the measured interval."""

from collections.abc import Sequence
from typing import Final

from securetune.config.schema import GateRule
from securetune.errors import GateFailed
from securetune.evidence import (
    BOUND_METRICS,
    Evidence,
    GateResult,
    RuleResult,
    describe_metric,
    public_params,
)

__all__ = ["GateRefusal", "check_gate", "require_passed"]

_DEFAULT_SUBJECT: Final = {
    "accuracy_difference": "hardened - base",
    "accuracy_pgd_difference": "hardened - plain",
    "accuracy_char_difference": "hardened - plain",
    "heldout_loss_difference": "hardened - base",
}
"""What a rule on a difference is about when it does not say: is the private model better than no training at
all, and is the hardened one more robust than the plain fine-tune."""


class GateRefusal(GateFailed):
    """The gate did not pass; ``result`` holds every rule and its reason."""

    def __init__(self, result: GateResult) -> None:
        """Describe the failed rules.

        Args:
            result: A gate result that did not pass.
        """
        failed = [rule for rule in result.rules if not rule.passed]
        lines = [f"  {rule.metric} ({rule.subject}): {rule.reason}" for rule in failed]
        super().__init__(
            f"{len(failed)} of {len(result.rules)} release rules failed, so nothing was published:\n"
            + "\n".join(lines)
            + "\nImprove the model, measure on more texts (intervals shrink), or change gate.rules."
        )
        self.result = result


def check_gate(rules: Sequence[GateRule], evidence: Sequence[Evidence]) -> GateResult:
    """Check every rule against the evidence.

    Guarantees:
        A rule passes only if matching evidence exists, each has status ``pass``, and the unfavourable end of
        each interval meets the threshold. Evidence that is missing, not run or invalid fails its rule. A rule
        that sets no threshold fails.

    Args:
        rules: The rules of the recipe; none means that nothing is demanded, and the gate passes.
        evidence: What was measured.

    Returns:
        One result per rule and matching evidence, in the order of the rules.
    """
    results: list[RuleResult] = []
    for rule in rules:
        subject = rule.subject or _DEFAULT_SUBJECT.get(rule.metric, "hardened")
        matching = [
            item
            for item in evidence
            if item.metric == rule.metric
            and item.subject == subject
            and (rule.radius is None or item.params.get("radius") == rule.radius)
        ]
        if matching:
            results += [_check_one(rule, item) for item in matching]
        else:
            results.append(_missing(rule, subject))
    return GateResult(passed=all(result.passed for result in results), rules=results)


def require_passed(result: GateResult) -> None:
    """Stop unless the gate passed.

    Args:
        result: The gate result.

    Raises:
        GateRefusal: If a rule failed; it is a ``GateFailed``.
    """
    if not result.passed:
        raise GateRefusal(result)


def _check_one(rule: GateRule, item: Evidence) -> RuleResult:
    reason = _reason_to_fail(rule, item)
    return RuleResult(
        metric=rule.metric,
        subject=item.subject,
        at_least=rule.at_least,
        at_most=rule.at_most,
        value=item.value,
        interval=item.interval,
        n=item.n,
        passed=reason is None,
        reason=reason or "met",
        private_statistic=item.private_statistic,
        params=public_params(item.params),
    )


def _reason_to_fail(rule: GateRule, item: Evidence) -> str | None:
    if rule.at_least is None and rule.at_most is None:
        return "the rule sets neither at_least nor at_most, so it demands nothing. Give it a threshold"
    if item.value is None:
        return (
            f"{describe_metric(item.metric)} was {item.status.replace('_', ' ')}; only a measurement can pass"
        )
    if item.status != "pass":
        return f"the measurement has status {item.status!r}, and only 'pass' counts"
    if item.interval is None:
        if item.metric not in BOUND_METRICS:
            return "the measurement has no interval"
        low = high = item.value
        which = "the value"
    else:
        low, high = item.interval.low, item.interval.high
        which = f"the {item.interval.level:.0%} interval"
    if rule.at_least is not None and not low >= rule.at_least:
        return f"{which} reaches down to {low:.4g}, below the required {rule.at_least:.4g}"
    if rule.at_most is not None and not high <= rule.at_most:
        return f"{which} reaches up to {high:.4g}, above the allowed {rule.at_most:.4g}"
    return None


def _missing(rule: GateRule, subject: str) -> RuleResult:
    where = "" if rule.radius is None else f" at radius {rule.radius:g}"
    return RuleResult(
        metric=rule.metric,
        subject=subject,
        at_least=rule.at_least,
        at_most=rule.at_most,
        value=None,
        interval=None,
        n=0,
        passed=False,
        reason=f"{describe_metric(rule.metric)} of {subject}{where} was not measured; "
        "missing evidence never passes",
        private_statistic=False,
        params={} if rule.radius is None else {"radius": rule.radius},
    )
