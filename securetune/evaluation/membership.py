"""Membership inference: can someone with the model tell which texts it was trained on?

Members and non-members come from one de-duplicated pool, split by an independent coin per text; anything else
measures the difference between two collections. Whether the split is as random as it should be is checked
by a blind attack that sees the texts and no model: if it does better than chance, every number here is
invalid.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, sparse

from securetune.data.encode import Example
from securetune.evaluation.statistics import (
    LEVEL,
    Estimate,
    OperatingPoint,
    RocCurve,
    auc,
    min_negatives,
    roc_curve,
    tpr_at_fpr,
)
from securetune.evidence import Interval

FALSE_POSITIVE_RATE = 0.01
BLIND_LEVEL = 0.99  # the check is one of many numbers in a report: a false alarm in 200 runs, not in 40

_FOLDS = 5
_MIN_TEXTS_WITH_TOKEN = 3
_WEIGHT_DECAY = 1e-2


class MembershipScores(NamedTuple):
    """One attack's scores; higher means more likely a member.

    Attributes:
        name: ``"loss"`` or ``"calibrated"``.
        members: ``[m]``, float64.
        non_members: ``[n]``, float64.
    """

    name: str
    members: NDArray[np.float64]
    non_members: NDArray[np.float64]


class MembershipResult(NamedTuple):
    """How well the stronger of the attacks tells members apart.

    Attributes:
        auc: The highest area under the ROC curve, with an interval that holds for the maximum.
        auc_attack: The attack that reached it.
        aucs: The area of every attack.
        operating_point: The highest true-positive rate at 1 % false positives, with intervals that hold for
            the maximum; None with too few non-members to measure it.
        operating_attack: The attack that reached it; empty without one.
        roc: The curve of ``auc_attack``.
    """

    auc: Estimate
    auc_attack: str
    aucs: dict[str, float]
    operating_point: OperatingPoint | None
    operating_attack: str
    roc: RocCurve


def membership_scores(
    member_losses: Sequence[float],
    non_member_losses: Sequence[float],
    *,
    base_member_losses: Sequence[float] | None = None,
    base_non_member_losses: Sequence[float] | None = None,
) -> list[MembershipScores]:
    """Score texts by their loss, and by how much fine-tuning lowered it.

    The second, calibrated by the model before fine-tuning, removes what makes a text easy for any model; it
    is the stronger attack on fine-tuned models and costs an attacker one more forward pass of a public
    model.

    Args:
        member_losses: ``[m]``, finite: the model's loss on texts it was trained on.
        non_member_losses: ``[n]``, finite: its loss on held-out texts.
        base_member_losses: ``[m]``: the base model's loss on the same members; None for the base model
            itself.
        base_non_member_losses: ``[n]``: the base model's loss on the same non-members.

    Returns:
        The scores of each attack that can be made.
    """
    members, non_members = np.asarray(member_losses, float), np.asarray(non_member_losses, float)
    attacks = [MembershipScores("loss", -members, -non_members)]
    if base_member_losses is not None and base_non_member_losses is not None:
        gained = np.asarray(base_member_losses, float) - members
        gained_outside = np.asarray(base_non_member_losses, float) - non_members
        attacks.append(MembershipScores("calibrated", gained, gained_outside))
    return attacks


def infer_membership(attacks: Sequence[MembershipScores]) -> MembershipResult:
    """Report the stronger attack, and pay for having looked at several.

    Guarantees:
        The intervals of the maximum hold at 95 % for any number of attacks (Bonferroni): each attack's own
        interval is wider, and the maximum lies between the highest low end and the highest high end.

    Args:
        attacks: At least one attack's scores, all on the same texts.

    Returns:
        The result.

    Raises:
        ValueError: If a score is not finite, or there are fewer than two texts on a side.
    """
    level = 1 - (1 - LEVEL) / len(attacks)
    areas = [auc(attack.members, attack.non_members, level=level) for attack in attacks]
    best = int(np.argmax([area.value for area in areas]))
    point, point_attack = None, ""
    if attacks[0].non_members.size >= min_negatives(FALSE_POSITIVE_RATE):
        points = [
            tpr_at_fpr(
                attack.members, attack.non_members, false_positive_rate=FALSE_POSITIVE_RATE, level=level
            )
            for attack in attacks
        ]
        rates = [point.true_positive_rate for point in points]
        chosen = int(np.argmax([rate.value for rate in rates]))
        point = points[chosen]._replace(true_positive_rate=_maximum(rates))
        point_attack = attacks[chosen].name
    return MembershipResult(
        auc=_maximum(areas),
        auc_attack=attacks[best].name,
        aucs={attack.name: area.value for attack, area in zip(attacks, areas, strict=True)},
        operating_point=point,
        operating_attack=point_attack,
        roc=roc_curve(attacks[best].members, attacks[best].non_members, max_points=200),
    )


def blind_baseline(members: Sequence[Example], non_members: Sequence[Example], *, seed: int) -> Estimate:
    """Measure how well the texts alone, without any model, give their membership away.

    Logistic regression on which tokens occur and on the length, scored by 5-fold cross-validation: on texts
    split by a fair coin the area is one half; a date, a template or a length that differs between the sides
    raises it.

    Args:
        members: At least five examples the model was trained on.
        non_members: At least five held-out examples.
        seed: Seed of the folds.

    Returns:
        The area under the cross-validated ROC curve, with a 99 % interval. Membership numbers are invalid
        if the interval lies above one half.

    Raises:
        ValueError: If there are fewer than five examples on a side.
    """
    smaller = min(len(members), len(non_members))
    if smaller < _FOLDS:
        raise ValueError(f"the blind baseline needs at least {_FOLDS} texts on each side, got {smaller}.")
    features = _count_features([*members, *non_members])
    is_member = np.repeat([True, False], [len(members), len(non_members)])
    folds = np.empty(is_member.size, dtype=int)
    generator = np.random.default_rng(seed)
    for side in (True, False):  # the same mix in every fold, so that folds can be pooled into one curve
        rows = generator.permutation(np.flatnonzero(is_member == side))
        folds[rows] = np.arange(rows.size) % _FOLDS
    scores = np.empty(is_member.size)
    for fold in range(_FOLDS):
        test = folds == fold
        weights = _fit_logistic(features[~test], is_member[~test])
        scores[test] = features[test] @ weights[:-1] + weights[-1]
    return auc(scores[is_member], scores[~is_member], level=BLIND_LEVEL)


def _maximum(estimates: Sequence[Estimate]) -> Estimate:
    return Estimate(
        max(estimate.value for estimate in estimates),
        Interval(
            low=max(estimate.interval.low for estimate in estimates),
            high=max(estimate.interval.high for estimate in estimates),
            level=LEVEL,
        ),
    )


def _count_features(examples: Sequence[Example]) -> sparse.csr_array:
    """Return ``[N, F]``: which tokens occur (rows of unit length), and the standardised log length."""
    rows, columns = [], []
    vocabulary: dict[int, int] = {}
    for row, example in enumerate(examples):
        for token in set(example.input_ids):
            rows.append(row)
            columns.append(vocabulary.setdefault(token, len(vocabulary)))
    ones = np.ones(len(rows))
    occurs = sparse.csr_array((ones, (rows, columns)), shape=(len(examples), len(vocabulary)))
    texts_with = occurs.sum(axis=0)
    # tokens of the prompt template occur everywhere and would only dilute the rest
    occurs = occurs[:, (texts_with >= _MIN_TEXTS_WITH_TOKEN) & (texts_with < len(examples))]
    length = np.sqrt(np.maximum(occurs.multiply(occurs).sum(axis=1), 1.0))
    log_tokens = np.log([len(example.input_ids) for example in examples])
    spread = log_tokens.std()
    standardised = (log_tokens - log_tokens.mean()) / (spread if spread > 0 else 1.0)
    return sparse.csr_array(
        sparse.hstack([sparse.diags_array(1 / length) @ occurs, sparse.csr_array(standardised[:, None])])
    )


def _fit_logistic(features: sparse.csr_array, is_positive: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the weights and, last, the bias that minimise the mean log-loss plus a weight decay."""
    signs = np.where(is_positive, 1.0, -1.0)

    def objective(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        agreement = signs * (features @ weights[:-1] + weights[-1])
        pull = -signs / (1 + np.exp(np.minimum(agreement, 500))) / signs.size
        loss = np.logaddexp(0, -agreement).mean() + _WEIGHT_DECAY / 2 * np.square(weights[:-1]).sum()
        gradient = np.append(features.T @ pull + _WEIGHT_DECAY * weights[:-1], pull.sum())
        return float(loss), gradient

    num_weights = features.T.shape[0] + 1
    fitted = optimize.minimize(
        objective, np.zeros(num_weights), jac=True, method="L-BFGS-B", options={"maxiter": 100}
    )
    return fitted.x
