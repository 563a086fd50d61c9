"""Membership inference: memorised texts are found, untouched ones are not, and a shifted split is noticed."""

import numpy as np
import pytest
from scipy import stats

from securetune.data.encode import Example
from securetune.evaluation.membership import blind_baseline, infer_membership, membership_scores
from securetune.evaluation.statistics import auc


def example(ids) -> Example:
    ids = tuple(int(number) for number in ids)
    return Example("unit", ids, (True,) * len(ids), 0, (False,) * len(ids))


def random_texts(generator: np.random.Generator, n: int, *, vocabulary: int = 300) -> list[Example]:
    lengths = generator.integers(5, 25, n)
    return [example([1, *(generator.zipf(1.3, length) % vocabulary + 2)]) for length in lengths]


def test_calibration_finds_members_that_the_plain_loss_hides():
    generator = np.random.default_rng(0)
    hardness = generator.exponential(2.0, 2000)  # differs far more between texts than training changes it
    base = hardness + generator.normal(0, 0.02, 2000)
    tuned = hardness - np.repeat([0.1, 0.0], 1000)
    attacks = membership_scores(
        tuned[:1000], tuned[1000:], base_member_losses=base[:1000], base_non_member_losses=base[1000:]
    )
    result = infer_membership(attacks)
    assert result.auc_attack == "calibrated"
    assert result.auc.interval.low > 0.99
    assert result.aucs["loss"] < 0.6
    assert result.operating_point is not None
    assert result.operating_point.true_positive_rate.interval.low > 0.9
    assert result.operating_point.false_positive_rate.value <= 0.01


def test_untrained_model_gives_chance():
    generator = np.random.default_rng(1)
    losses = generator.exponential(1.0, 2000)
    result = infer_membership(membership_scores(losses[:1000], losses[1000:]))
    assert result.auc.interval.contains(0.5)
    assert result.auc_attack == "loss"


def test_base_model_has_no_calibrated_attack():
    assert [attack.name for attack in membership_scores([1.0, 2.0], [1.0, 2.0])] == ["loss"]


def test_interval_of_the_stronger_attack_pays_for_the_choice():
    generator = np.random.default_rng(2)
    losses, base = generator.normal(size=(2, 400))
    attacks = membership_scores(
        losses[:200], losses[200:], base_member_losses=base[:200], base_non_member_losses=base[200:]
    )
    result = infer_membership(attacks)
    best = max((auc(attack.members, attack.non_members) for attack in attacks), key=lambda area: area.value)
    assert result.auc.value == best.value
    assert result.auc.interval.high > best.interval.high
    assert result.auc.interval.level == 0.95


def test_maximum_of_two_chance_attacks_covers_one_half_at_its_level():
    generator = np.random.default_rng(3)
    misses = 0
    for _ in range(300):
        losses, base = generator.normal(size=(2, 300))
        attacks = membership_scores(
            losses[:150], losses[150:], base_member_losses=base[:150], base_non_member_losses=base[150:]
        )
        misses += infer_membership(attacks).auc.interval.low > 0.5
    assert stats.binomtest(misses, 300, 0.025, alternative="greater").pvalue > 0.01


def test_too_few_non_members_give_no_rate_at_low_false_positives():
    generator = np.random.default_rng(4)
    result = infer_membership(membership_scores(generator.normal(size=1500), generator.normal(size=999)))
    assert result.operating_point is None
    assert result.operating_attack == ""


def test_loss_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="not finite"):
        infer_membership(membership_scores([1.0, float("nan")], [1.0, 2.0]))


def test_blind_baseline_is_at_chance_on_a_fair_split():
    generator = np.random.default_rng(5)
    alarms, values = 0, []
    for seed in range(60):
        texts = random_texts(generator, 200)
        estimate = blind_baseline(texts[:100], texts[100:], seed=seed)
        alarms += estimate.interval.low > 0.5
        values.append(estimate.value)
    assert alarms <= 3
    assert np.mean(values) == pytest.approx(0.5, abs=0.02)


def test_token_that_marks_one_side_is_noticed():
    generator = np.random.default_rng(6)
    texts = random_texts(generator, 400)
    marked = [example([*text.input_ids, 999]) if row % 2 else text for row, text in enumerate(texts[200:])]
    assert blind_baseline(texts[:200], marked, seed=0).interval.low > 0.6


def test_difference_in_length_is_noticed():
    generator = np.random.default_rng(7)
    short = [example(generator.integers(0, 50, generator.integers(5, 15))) for _ in range(200)]
    long = [example(generator.integers(0, 50, generator.integers(10, 30))) for _ in range(200)]
    assert blind_baseline(short, long, seed=0).interval.low > 0.8


def test_blind_baseline_repeats_with_its_seed():
    texts = random_texts(np.random.default_rng(8), 100)
    assert blind_baseline(texts[:50], texts[50:], seed=1) == blind_baseline(texts[:50], texts[50:], seed=1)


def test_blind_baseline_of_too_few_texts_is_refused():
    texts = random_texts(np.random.default_rng(9), 8)
    with pytest.raises(ValueError, match="at least 5 texts on each side, got 4"):
        blind_baseline(texts[:4], texts[4:], seed=0)
