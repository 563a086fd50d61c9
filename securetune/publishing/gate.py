"""The release gate: each rule of the recipe against the unfavourable end of the measured interval."""

import difflib
from collections.abc import Sequence
from typing import Final, Protocol

from securetune.errors import GateFailed
from securetune.evidence import BOUND_METRICS, Evidence, GateResult, RuleResult, describe_metric

__all__ = ["GateRefusal", "Rule", "check_gate", "require_passed"]

_DEFAULT_SUBJECT: Final = {
    "accuracy_difference": "hardened - base",
    "accuracy_pgd_difference": "hardened - plain",
    "accuracy_char_difference": "hardened - plain",
    "heldout_loss_difference": "hardened - base",
}
"""What a rule on a difference is about when it does not say: is the private model better than no training at
all, and is the hardened one more robust than the plain fine-tune."""


class Rule(Protocol):
    """A rule of the recipe (``gate.rules``).

    A rule may also have ``subject`` (which model or pair) and ``radius`` (which attack strength). Without
    them it is about the hardened model, or the pair its metric is usually asked of, at every strength that
    was measured.
    """

    @property
    def metric(self) -> str:
        """The metric the rule is about."""
        ...

    @property
    def at_least(self) -> float | None:
        """The low end of the interval must reach this."""
        ...

    @property
    def at_most(self) -> float | None:
        """The high end of the interval must not exceed this."""
        ...


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


def check_gate(rules: Sequence[Rule], evidence: Sequence[Evidence]) -> GateResult:
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
        subject = getattr(rule, "subject", None) or _DEFAULT_SUBJECT.get(rule.metric, "hardened")
        radius = getattr(rule, "radius", None)
        matching = [
            item
            for item in evidence
            if item.metric == rule.metric
            and item.subject == subject
            and (radius is None or item.params.get("radius") == radius)
        ]
        if matching:
            results += [_check_one(rule, item) for item in matching]
        else:
            results.append(_missing(rule, subject, radius, evidence))
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


def _check_one(rule: Rule, item: Evidence) -> RuleResult:
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
        params=item.params,
    )


def _reason_to_fail(rule: Rule, item: Evidence) -> str | None:
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


def _missing(rule: Rule, subject: str, radius: float | None, evidence: Sequence[Evidence]) -> RuleResult:
    where = "" if radius is None else f" at radius {radius:g}"
    reason = (
        f"{describe_metric(rule.metric)} of {subject}{where} was not measured; missing evidence never passes"
    )
    close = difflib.get_close_matches(rule.metric, {item.metric for item in evidence} - {rule.metric}, n=1)
    if close and all(item.metric != rule.metric for item in evidence):
        reason += f". Did you mean {close[0]!r}?"
    return RuleResult(
        metric=rule.metric,
        subject=subject,
        at_least=rule.at_least,
        at_most=rule.at_most,
        value=None,
        interval=None,
        n=0,
        passed=False,
        reason=reason,
        private_statistic=False,
        params={} if radius is None else {"radius": radius},
    )
