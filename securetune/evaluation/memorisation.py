"""The memorisation gap: how much better a model does on texts it was trained on than on others like them."""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from securetune.evaluation.statistics import LEVEL, Estimate
from securetune.evidence import Interval


def memorisation_gap(member_losses: Sequence[float], non_member_losses: Sequence[float]) -> Estimate:
    """Estimate the mean held-out loss minus the mean training loss of one model.

    Members and non-members must come from one pool, split by a coin per text; then the gap of a model that
    saw neither is zero on average, and what exceeds it was learnt by heart. The losses are the plain ones,
    without label smoothing or dropout, so that the gaps of models trained with and without them can be
    compared. The interval is that of Welch's unequal-variances t-test.

    Args:
        member_losses: ``[m]``, finite, m >= 2: losses of texts the model was trained on, in nats.
        non_member_losses: ``[n]``, finite, n >= 2: losses of held-out texts.

    Returns:
        The gap in nats, with its interval.

    Raises:
        ValueError: If there are fewer than two losses on a side, or one is not finite.
    """
    members = np.asarray(member_losses, dtype=np.float64)
    others = np.asarray(non_member_losses, dtype=np.float64)
    if min(members.size, others.size) < 2 or not (np.isfinite(members).all() and np.isfinite(others).all()):
        finite = [f"{np.isfinite(values).sum()} of {values.size}" for values in (members, others)]
        raise ValueError(
            f"a memorisation gap needs at least two losses a side, all finite, got {' and '.join(finite)}."
        )
    gap = float(others.mean() - members.mean())
    parts = [values.var(ddof=1) / values.size for values in (members, others)]
    variance = sum(parts)
    if variance == 0:
        return Estimate(gap, Interval(low=gap, high=gap, level=LEVEL))
    freedom = variance**2 / sum(
        part**2 / (values.size - 1) for part, values in zip(parts, (members, others), strict=True)
    )
    half_width = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * math.sqrt(variance)
    return Estimate(gap, Interval(low=gap - half_width, high=gap + half_width, level=LEVEL))
