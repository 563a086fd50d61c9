"""Evidence from the per-text results of one model, or of two models against each other; touches no model.

Every number here is an un-noised statistic of private records: it is marked as such and stays in the run
folder.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from securetune.evaluation.heldout_loss import loss_per_token
from securetune.evaluation.membership import (
    FALSE_POSITIVE_RATE,
    MembershipResult,
    infer_membership,
    membership_scores,
)
from securetune.evaluation.memorisation import memorisation_gap
from securetune.evaluation.results import AttackRecord, ModelEvaluation, Params
from securetune.evaluation.statistics import Estimate, min_negatives, paired_difference, proportion
from securetune.evidence import Evidence, Status

_MIN_LOSSES = 2
_PROPORTION = "Clopper-Pearson interval"
_RATIO = "ratio of sums over texts, t interval"
_METHODS = {
    "accuracy": f"share of held-out texts whose label word scores highest; {_PROPORTION}",
    "accuracy_pgd": "held-out texts still right under PGD on the margin, from the smallest radius to this"
    f" one; radius in mean embedding norms; {_PROPORTION}",
    "accuracy_noise": "held-out texts still right under random noise of this radius, the control of the PGD"
    f" attack; {_PROPORTION}",
    "accuracy_char": "held-out texts still right under a black-box search for misspellings, re-checked on the"
    f" final text; {_PROPORTION}",
    "memorisation_gap": "mean loss of held-out texts minus that of texts trained on, without dropout and"
    " label smoothing; Welch t interval",
    "heldout_loss": f"loss of the supervised tokens of held-out texts; {_RATIO}",
}
_WEAK_ATTACK = " INVALID: random noise of the same radius breaks more texts than the attack."
_FAILED_CHECK = " INVALID: a blind attack that sees no model tells members apart, so the split is not random."


class _Pair(NamedTuple):
    """Per-text outcomes of two models under the same attack."""

    metric: str
    params: Params
    seed: int | None
    first: list[bool]
    second: list[bool]


def summarise(
    evaluation: ModelEvaluation, *, base: ModelEvaluation | None = None, blind: Estimate | None = None
) -> list[Evidence]:
    """Turn the results of one model into evidence.

    Args:
        evaluation: The results.
        base: The results of the model before fine-tuning, for the calibrated membership attack; None, or
            the same model, for the base model itself.
        blind: The blind baseline of the split (``EvaluationTexts.check_split``); None if it could not be run.

    Returns:
        One entry per metric and attack strength. A metric that cannot be trusted has status ``invalid``,
        one that could not be measured ``not_run``.
    """
    evidence: list[Evidence] = []
    if evaluation.is_correct is not None:
        broken = sum(loss is None for loss in evaluation.losses or [])
        evidence.append(
            _evidence(
                evaluation,
                "accuracy",
                proportion(evaluation.is_correct),
                n=len(evaluation.is_correct),
                params=_errors(broken),
            )
        )
    if evaluation.num_tokens is not None and evaluation.losses is not None:
        evidence.append(_heldout_loss(evaluation, evaluation.losses, evaluation.num_tokens))
    for record in evaluation.embedding or []:
        evidence.append(_attack(evaluation, "accuracy_pgd", record, control=evaluation.noise))
    if evaluation.noise is not None:
        evidence.append(_attack(evaluation, "accuracy_noise", evaluation.noise))
    if evaluation.characters is not None:
        evidence.append(_attack(evaluation, "accuracy_char", evaluation.characters))
    if evaluation.member_losses:
        evidence += _membership(evaluation, base, blind)
        evidence.append(_memorisation(evaluation, blind))
    return evidence


def compare(first: ModelEvaluation, second: ModelEvaluation) -> list[Evidence]:
    """Compare two models text by text.

    Args:
        first: The results of one model.
        second: The results of another on the same texts with the same settings.

    Returns:
        Differences, first minus second, of every metric that both hold. An interval above zero means that the
        first model's value is higher.

    Raises:
        ValueError: If texts or settings differ.
    """
    if first.fingerprint != second.fingerprint:
        raise ValueError(
            f"{first.subject} and {second.subject} were evaluated on different texts or with different"
            " settings, so they cannot be compared. Evaluate both again."
        )
    pairs: list[_Pair] = []
    if first.is_correct is not None and second.is_correct is not None:
        pairs.append(_Pair("accuracy_difference", {}, None, first.is_correct, second.is_correct))
    for a, b in zip(first.embedding or [], second.embedding or [], strict=False):
        pairs.append(_Pair("accuracy_pgd_difference", a.params, a.seed, a.is_robust, b.is_robust))
    if first.characters is not None and second.characters is not None:
        a, b = first.characters, second.characters
        pairs.append(_Pair("accuracy_char_difference", a.params, a.seed, a.is_robust, b.is_robust))
    evidence = [_difference(first, second, pair) for pair in pairs]
    if first.num_tokens is not None and first.losses is not None and second.losses is not None:
        evidence.append(_loss_difference(first, second, first.losses, second.losses, first.num_tokens))
    return evidence


def find_members(
    evaluation: ModelEvaluation, *, base: ModelEvaluation | None = None
) -> MembershipResult | None:
    """Run the membership attacks on the losses of an evaluation.

    Args:
        evaluation: The results of the model.
        base: The results of the model before fine-tuning on the same texts; None, or the same model, for
            the base model itself.

    Returns:
        The result with its ROC curve; None if a loss is missing or not finite.
    """
    members, non_members = _all_finite(evaluation.member_losses), _all_finite(evaluation.non_member_losses)
    if members is None or non_members is None:
        return None
    if base is None or base.artefact == evaluation.artefact:
        return infer_membership(membership_scores(members, non_members))
    base_members, base_non_members = _all_finite(base.member_losses), _all_finite(base.non_member_losses)
    if base_members is None or base_non_members is None or base.fingerprint != evaluation.fingerprint:
        return None
    return infer_membership(
        membership_scores(
            members, non_members, base_member_losses=base_members, base_non_member_losses=base_non_members
        )
    )


def _membership(
    evaluation: ModelEvaluation, base: ModelEvaluation | None, blind: Estimate | None
) -> list[Evidence]:
    result = find_members(evaluation, base=base)
    num_members, num_non_members = len(evaluation.member_losses or []), len(evaluation.non_member_losses)
    params: Params = {"members": num_members, "non_members": num_non_members}
    if blind is not None:
        params |= {"blind_auc": blind.value, "blind_auc_low": blind.interval.low}
    is_valid = _is_random(blind)
    status: Status = "pass" if is_valid else "invalid"
    caveat = "" if is_valid else _FAILED_CHECK
    if result is None:
        reason = "a loss is not finite, or fewer than two texts stand on a side"
        return [
            _evidence(evaluation, metric, None, n=num_members, params=params, method=reason, status="invalid")
            for metric in ("membership_auc", "membership_tpr_at_1pct_fpr")
        ]
    attacks = f"stronger of {len(result.aucs)} attacks" if len(result.aucs) > 1 else "loss attack"
    aucs: Params = {f"auc_{name}": value for name, value in result.aucs.items()}
    evidence = [
        _evidence(
            evaluation,
            "membership_auc",
            result.auc,
            n=num_members + num_non_members,
            params={"attack": result.auc_attack, **aucs, **params},
            method=f"{attacks}; DeLong interval{_bonferroni(result)}.{caveat}",
            status=status,
        )
    ]
    point = result.operating_point
    if point is None:
        needed = min_negatives(FALSE_POSITIVE_RATE)
        reason = f"a 1 % false-positive rate needs {needed} non-members, there are {num_non_members}"
        evidence.append(
            _evidence(
                evaluation,
                "membership_tpr_at_1pct_fpr",
                None,
                n=num_members,
                params=params,
                method=reason,
                status="not_run",
            )
        )
    else:
        false_rate = point.false_positive_rate
        rates: Params = {"fpr": false_rate.value, "fpr_high": false_rate.interval.high}
        evidence.append(
            _evidence(
                evaluation,
                "membership_tpr_at_1pct_fpr",
                point.true_positive_rate,
                n=num_members,
                params={"attack": result.operating_attack, **rates, **params},
                method=f"{attacks}, lowest threshold with a measured false-positive rate of at most 1 %;"
                f" {_PROPORTION}{_bonferroni(result)}.{caveat}",
                status=status,
            )
        )
    return evidence


def _memorisation(evaluation: ModelEvaluation, blind: Estimate | None) -> Evidence:
    members, others = _all_finite(evaluation.member_losses), _all_finite(evaluation.non_member_losses)
    num_members, num_others = len(evaluation.member_losses or []), len(evaluation.non_member_losses)
    params: Params = {"members": num_members, "non_members": num_others}
    if members is None or others is None:
        reason = "a loss is not finite, or fewer than two texts stand on a side"
        return _evidence(
            evaluation,
            "memorisation_gap",
            None,
            n=num_members + num_others,
            params=params,
            method=reason,
            status="invalid",
        )
    is_valid = _is_random(blind)
    return _evidence(
        evaluation,
        "memorisation_gap",
        memorisation_gap(members, others),
        n=num_members + num_others,
        params=params,
        method=_METHODS["memorisation_gap"] + ("" if is_valid else f".{_FAILED_CHECK}"),
        status="pass" if is_valid else "invalid",
    )


def _is_random(blind: Estimate | None) -> bool:
    """Whether the texts alone do not tell members apart, so that what a model tells was learnt."""
    return blind is None or blind.interval.low <= 0.5


def _bonferroni(result: MembershipResult) -> str:
    return ", widened for the choice" if len(result.aucs) > 1 else ""


def _attack(
    evaluation: ModelEvaluation,
    metric: Literal["accuracy_pgd", "accuracy_noise", "accuracy_char"],
    record: AttackRecord,
    *,
    control: AttackRecord | None = None,
) -> Evidence:
    is_weak = (
        control is not None
        and control.params["radius"] == record.params["radius"]
        and sum(control.is_robust) < sum(record.is_robust)
    )
    return _evidence(
        evaluation,
        metric,
        proportion(record.is_robust),
        n=len(record.is_robust),
        params={**record.params, "mean_queries": round(record.mean_queries, 2), **_errors(record.errors)},
        seed=record.seed,
        method=_METHODS[metric] + (f".{_WEAK_ATTACK}" if is_weak else ""),
        status="invalid" if is_weak else "pass",
    )


def _heldout_loss(
    evaluation: ModelEvaluation, losses: Sequence[float | None], num_tokens: Sequence[int]
) -> Evidence:
    finite = _all_finite(losses)
    if finite is None:
        broken = sum(loss is None for loss in losses)
        reason = (
            f"{broken} of {len(losses)} texts have a loss that is not finite, and at least two are needed"
        )
        return _evidence(
            evaluation, "heldout_loss", None, n=len(losses), params={}, method=reason, status="invalid"
        )
    return _evidence(evaluation, "heldout_loss", loss_per_token(finite, num_tokens), n=len(finite), params={})


def _difference(first: ModelEvaluation, second: ModelEvaluation, pair: _Pair) -> Evidence:
    return _evidence(
        first,
        pair.metric,
        paired_difference(pair.first, pair.second),
        n=len(pair.first),
        params=pair.params,
        subject=f"{first.subject} - {second.subject}",
        seed=pair.seed,
        method="paired difference on the same texts; Tango score interval",
    )


def _loss_difference(
    first: ModelEvaluation,
    second: ModelEvaluation,
    first_losses: Sequence[float | None],
    second_losses: Sequence[float | None],
    num_tokens: Sequence[int],
) -> Evidence:
    differences = [
        None if a is None or b is None else a - b for a, b in zip(first_losses, second_losses, strict=True)
    ]
    finite = _all_finite(differences)
    method = f"paired difference on the same texts; {_RATIO}"
    return _evidence(
        first,
        "heldout_loss_difference",
        None if finite is None else loss_per_token(finite, num_tokens),
        n=len(differences),
        params={},
        subject=f"{first.subject} - {second.subject}",
        method=method if finite is not None else "a loss is not finite, or there are fewer than two texts",
        status="pass" if finite is not None else "invalid",
    )


def _evidence(
    evaluation: ModelEvaluation,
    metric: str,
    estimate: Estimate | None,
    *,
    n: int,
    params: Params,
    subject: str | None = None,
    seed: int | None = None,
    method: str | None = None,
    status: Status = "pass",
) -> Evidence:
    return Evidence(
        metric=metric,
        subject=subject or evaluation.subject,
        value=None if estimate is None else estimate.value,
        interval=None if estimate is None else estimate.interval,
        n=n,
        method=method or _METHODS[metric],
        seed=seed,
        status=status,
        artefact=evaluation.artefact,
        private_statistic=True,
        params=params,
    )


def _errors(count: int) -> Params:
    """Name texts without a finite score; they count as wrong, so nothing is hidden in the value."""
    return {"errors": count} if count else {}


def _all_finite(losses: Sequence[float | None] | None) -> list[float] | None:
    finite = [loss for loss in losses or [] if loss is not None]
    return finite if len(finite) >= _MIN_LOSSES and len(finite) == len(losses or []) else None
