"""What a report's numbers say, in plain words: shown, not shown, or the opposite."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from securetune.evidence import Evidence
from securetune.report.summary import Report

__all__ = ["Comparison", "Outcome", "compare_all", "headline", "judge"]

Outcome = Literal["better", "worse", "not shown"]


class Comparison(NamedTuple):
    """A paired difference and what it shows. ``place`` is its index in ``report.evidence``."""

    place: int
    evidence: Evidence
    outcome: Outcome


def judge(difference: Evidence) -> Outcome:
    """Say what a paired difference shows.

    Guarantees:
        ``better`` or ``worse`` only if the measurement is valid and its interval excludes zero.

    Args:
        difference: Evidence whose metric ends in ``_difference``.

    Returns:
        What it shows about the first model of the pair.
    """
    if difference.status != "pass" or difference.interval is None:
        return "not shown"
    sign = -1.0 if difference.metric.startswith("heldout_loss") else 1.0
    low, high = sorted((sign * difference.interval.low, sign * difference.interval.high))
    if low > 0:
        return "better"
    return "worse" if high < 0 else "not shown"


def compare_all(report: Report) -> list[Comparison]:
    """Collect every paired difference of a report.

    Args:
        report: The report.

    Returns:
        One comparison per evidence of a difference that has a value, in the report's order.
    """
    return [
        Comparison(index, item, judge(item))
        for index, item in enumerate(report.evidence)
        if item.metric.endswith("_difference") and item.value is not None
    ]


def headline(report: Report) -> str:
    """Say the result of a run in one line.

    Args:
        report: The report.

    Returns:
        A line without numbers other than counts of rules.
    """
    if report.gate is not None and not report.gate.passed:
        failed = sum(not rule.passed for rule in report.gate.rules)
        return f"Not ready to release: {failed} of {len(report.gate.rules)} release rules failed"
    comparisons = compare_all(report)
    useful = _outcomes(comparisons, "hardened - base", ("accuracy_difference", "heldout_loss_difference"))
    robust = _outcomes(
        comparisons, "hardened - plain", ("accuracy_pgd_difference", "accuracy_char_difference")
    )
    shown: list[str] = []
    doubts: list[str] = []
    if report.privacy is not None:
        kept = report.privacy.epsilon_spent <= report.privacy.epsilon_target
        (shown if kept else doubts).append("private within its budget" if kept else "over its privacy budget")
    if useful:
        _sort_in(
            useful,
            shown,
            doubts,
            ("better than the base model", "worse than the base model"),
            "gain in quality",
        )
    if robust:
        _sort_in(
            robust,
            shown,
            doubts,
            ("harder to attack than a plain fine-tune", "easier to attack than a plain fine-tune"),
            "gain in robustness",
        )
    parts = [_join(shown)] if shown else []
    parts += [_join(doubts)] if doubts else []
    if not parts:
        return "Measured, with nothing to compare"
    line = "; ".join(parts)
    return line[0].upper() + line[1:]


def _outcomes(comparisons: Sequence[Comparison], subject: str, metrics: Sequence[str]) -> set[Outcome]:
    return {
        item.outcome
        for item in comparisons
        if item.evidence.subject == subject and item.evidence.metric in metrics
    }


def _sort_in(
    outcomes: set[Outcome], shown: list[str], doubts: list[str], words: tuple[str, str], gain: str
) -> None:
    better, worse = words
    if "better" in outcomes and "worse" not in outcomes:
        shown.append(better)
    elif "worse" in outcomes:
        doubts.append(worse if "better" not in outcomes else f"{better} in one test and {worse} in another")
    else:
        doubts.append(f"{gain} not shown")


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
