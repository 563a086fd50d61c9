"""Evidence from saved results: intervals, checks that make a number invalid, and what counts as measured."""

import dataclasses

import numpy as np
import pytest

from securetune.evaluation.findings import compare, find_members, summarise
from securetune.evaluation.memorisation import memorisation_gap
from securetune.evaluation.results import AttackRecord, ModelEvaluation
from securetune.evaluation.statistics import Estimate, clopper_pearson, paired_difference
from securetune.evidence import Evidence, Interval

GENERATOR = np.random.default_rng(0)
RADII = (0.1, 0.2)


def attack(robust: int, *, radius: float | None = None, errors: int = 0) -> AttackRecord:
    params = (
        {"queries": 25, "edits": 3} if radius is None else {"radius": radius, "steps": 5, "norm": "l2_token"}
    )
    return AttackRecord(params, 7, [row < robust for row in range(200)], errors, 3.14159)


def evaluation(
    subject: str = "plain", *, right: int = 800, robust: int = 50, n: int = 1000
) -> ModelEvaluation:
    losses = GENERATOR.exponential(size=2 * n)
    return ModelEvaluation(
        subject=subject,
        artefact={"base": "0", "plain": "1", "hardened": "2"}[subject] * 64,
        fingerprint="same",
        num_non_members=n,
        is_correct=[row < right for row in range(n)],
        losses=losses[:n].tolist(),
        member_losses=losses[n:].tolist(),
        embedding=[attack(robust + 40, radius=0.1), attack(robust, radius=0.2)],
        noise=attack(120, radius=0.2),
        characters=attack(robust + 10),
    )


def find(evidence: list[Evidence], metric: str, **params) -> Evidence:
    (found,) = [
        item
        for item in evidence
        if item.metric == metric and all(item.params.get(key) == value for key, value in params.items())
    ]
    return found


def test_accuracy_carries_its_exact_interval():
    item = find(summarise(evaluation()), "accuracy")
    assert (item.value, item.interval, item.n, item.status) == (0.8, clopper_pearson(800, 1000), 1000, "pass")
    assert item.params == {}


def test_attacks_carry_their_settings_and_seed():
    evidence = summarise(evaluation())
    pgd = find(evidence, "accuracy_pgd", radius=0.2)
    assert (pgd.value, pgd.seed, pgd.params["steps"], pgd.status) == (0.25, 7, 5, "pass")
    characters = find(evidence, "accuracy_char")
    assert (characters.value, characters.params["queries"], characters.params["edits"]) == (0.3, 25, 3)
    assert find(evidence, "accuracy_noise").value == 0.6


def test_every_number_is_a_private_statistic_of_its_model():
    evidence = summarise(evaluation(), base=evaluation("base"))
    evidence += compare(evaluation("hardened"), evaluation())
    assert all(item.private_statistic for item in evidence)
    assert {item.artefact for item in evidence} == {"1" * 64, "2" * 64}


def test_attack_weaker_than_noise_is_invalid():
    weak = dataclasses.replace(evaluation(), noise=attack(49, radius=0.2))
    evidence = summarise(weak)
    assert find(evidence, "accuracy_pgd", radius=0.2).status == "invalid"
    assert "random noise" in find(evidence, "accuracy_pgd", radius=0.2).method
    assert find(evidence, "accuracy_pgd", radius=0.1).status == "pass"  # the control is of the other radius


def test_errors_are_named():
    broken = dataclasses.replace(
        evaluation(), losses=[None] * 3 + [1.0] * 997, characters=attack(20, errors=4)
    )
    evidence = summarise(broken)
    assert find(evidence, "accuracy").params == {"errors": 3}
    assert find(evidence, "accuracy_char").params["errors"] == 4


def test_split_that_a_blind_attack_sees_through_makes_membership_invalid():
    seen = Estimate(0.7, Interval(low=0.65, high=0.75, level=0.99))
    fair = Estimate(0.52, Interval(low=0.48, high=0.56, level=0.99))
    for metric in ("membership_auc", "membership_tpr_at_1pct_fpr"):
        assert find(summarise(evaluation(), blind=seen), metric).status == "invalid"
        item = find(summarise(evaluation(), blind=fair), metric)
        assert (item.status, item.params["blind_auc"]) == ("pass", 0.52)


def test_membership_uses_the_base_model_for_calibration():
    base, tuned = evaluation("base"), evaluation()
    shift = np.asarray(base.member_losses) - 0.3
    tuned = dataclasses.replace(tuned, member_losses=shift.tolist(), losses=base.losses)
    item = find(summarise(tuned, base=base), "membership_auc")
    assert (item.value, item.params["attack"], item.n) == (1.0, "calibrated", 2000)
    assert item.params["auc_loss"] < 1
    rate = find(summarise(tuned, base=base), "membership_tpr_at_1pct_fpr")
    assert (rate.value, rate.n) == (1.0, 1000)


def test_base_model_is_not_calibrated_by_itself():
    base = evaluation("base")
    assert find(summarise(base, base=base), "membership_auc").params["attack"] == "loss"


def test_membership_with_a_broken_loss_is_invalid_without_a_value():
    broken = evaluation()
    broken = dataclasses.replace(broken, member_losses=[None, *(broken.member_losses or [])[1:]])
    item = find(summarise(broken), "membership_auc")
    assert (item.value, item.status) == (None, "invalid")
    assert find_members(broken) is None


def test_low_false_positive_rate_is_not_run_with_few_non_members():
    item = find(summarise(evaluation(n=400, right=300)), "membership_tpr_at_1pct_fpr")
    assert (item.value, item.status) == (None, "not_run")
    assert "1000 non-members" in item.method


def test_comparison_is_paired_text_by_text():
    hardened, plain = evaluation("hardened", right=820, robust=70), evaluation(right=800, robust=50)
    evidence = compare(hardened, plain)
    assert {item.subject for item in evidence} == {"hardened - plain"}
    expected = paired_difference(hardened.is_correct, plain.is_correct)
    item = find(evidence, "accuracy_difference")
    assert (item.value, item.interval) == (expected.value, expected.interval)
    assert item.value == pytest.approx(0.02)
    for radius in RADII:
        gain = find(evidence, "accuracy_pgd_difference", radius=radius)
        assert gain.value == pytest.approx(0.1)
        assert gain.interval.low > 0
        assert gain.n == 200
    assert find(evidence, "accuracy_char_difference").value == pytest.approx(0.1)


def test_models_evaluated_on_other_texts_are_not_compared():
    other = dataclasses.replace(evaluation("base"), fingerprint="other")
    with pytest.raises(ValueError, match="plain and base were evaluated on different texts"):
        compare(evaluation(), other)


def test_loss_of_a_generating_model_is_per_token():
    model = ModelEvaluation("plain", "1" * 64, "same", 0, losses=[1.0, 3.0, 2.0], num_tokens=[1, 2, 1])
    item = find(summarise(model), "heldout_loss")
    assert (item.value, item.n, item.status) == (2.25, 3, "pass")
    other = dataclasses.replace(model, subject="base", artefact="0" * 64, losses=[2.0, 3.5, 2.0])
    assert find(compare(model, other), "heldout_loss_difference").value == -0.5


def test_held_out_loss_that_is_not_finite_is_invalid():
    model = ModelEvaluation("plain", "1" * 64, "same", 0, losses=[1.0, None, 2.0], num_tokens=[1, 2, 1])
    item = find(summarise(model), "heldout_loss")
    assert (item.value, item.status) == (None, "invalid")
    assert "1 of 3 texts" in item.method


def test_the_memorisation_gap_stands_beside_membership_with_its_interval():
    measured = evaluation("hardened")
    item = find(summarise(measured), "memorisation_gap")
    expected = memorisation_gap(measured.member_losses or [], measured.losses or [])
    assert (item.value, item.interval, item.n) == (expected.value, expected.interval, 2000)
    assert item.status == "pass"
    assert item.private_statistic
    assert "minus that of texts trained on" in item.method


def test_a_memorisation_gap_of_a_split_that_is_not_random_is_invalid():
    blind = Estimate(0.7, Interval(low=0.6, high=0.8))
    assert find(summarise(evaluation(), blind=blind), "memorisation_gap").status == "invalid"
    broken = dataclasses.replace(evaluation(), member_losses=[None, 1.0])
    item = find(summarise(broken), "memorisation_gap")
    assert (item.value, item.status, item.n) == (None, "invalid", 1002)


def test_texts_that_are_left_out_are_no_non_members():
    whole = evaluation()
    fewer = dataclasses.replace(whole, left_out=[0, 3])
    losses = whole.losses or []
    assert fewer.non_member_losses == [losses[1], losses[2], *losses[4:]]
    assert find(summarise(fewer), "membership_auc").n == 1998
