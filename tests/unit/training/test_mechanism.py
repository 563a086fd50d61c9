"""The private mechanism of a recipe: every clipping mode has the planned sensitivity and is told in words."""

import math

import pytest
import torch

from securetune.errors import DataError, PrivacyError
from securetune.privacy.accounting import Phase, epsilon_of_phases, plan_privacy
from securetune.privacy.clipping import ROUNDING_EXCESS
from securetune.privacy.ledger import read_ledger
from securetune.privacy.noise import NoiseSource
from securetune.privacy.per_sample import PerSampleGradients
from securetune.privacy.sampling import FixedSizeSampler, PoissonSampler
from securetune.privacy.statements import noise_statement, sampling_statement
from securetune.privacy.step import OrdinaryStep
from securetune.privacy.units import UserSampler
from securetune.training.drawing import make_sampler, make_unit_sampler
from securetune.training.folder import RunFolder
from securetune.training.loop import Trainer, make_optimizer
from securetune.training.mechanism import (
    gradient_noise_multiplier,
    make_clipping,
    make_mechanism,
    make_private_step,
    planned_header,
    privacy_spec,
)
from tests.sample_recipe import sample_recipe
from tests.unit.training.tiny_head import make_examples, make_head

MODES = {
    "flat": {},
    "per_layer": {"mode": "per_layer"},
    "groups": {"mode": "groups", "groups": {"*lora_A*": 2.0, "*lora_B*": 1.0}},
    "automatic": {"mode": "automatic", "stability": 0.1},
    "normalized": {"mode": "normalized"},
    "adaptive": {"mode": "adaptive"},
    "adaptive per layer": {"mode": "adaptive", "per_layer": True, "count_noise_multiplier": 40.0},
}
NAMES = ("a.lora_A.default.weight", "a.lora_B.default.weight", "b.lora_A.default.weight")


def recipe_of(clipping, **changes):
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return sample_recipe({"privacy.clipping": clipping, "privacy.max_grad_norm": 0.5, **dotted})


@pytest.mark.parametrize("clipping", MODES.values(), ids=MODES)
def test_sensitivity_is_max_grad_norm_in_every_mode(clipping):
    made = make_clipping(recipe_of(clipping), noise_multiplier=1.0)
    made.assign(NAMES)
    assert made.sensitivity == pytest.approx(0.5 * (1 + ROUNDING_EXCESS), rel=1e-12)


def test_weights_of_groups_set_the_ratio_of_thresholds():
    made = make_clipping(recipe_of(MODES["groups"]), noise_multiplier=1.0)
    made.assign(NAMES)
    assert made.thresholds["*lora_A*"] == pytest.approx(2 * made.thresholds["*lora_B*"])


def test_count_noise_is_a_tenth_of_the_batch_or_five_times_the_runs():
    recipe = recipe_of(MODES["adaptive"], privacy__expected_batch_size=100, privacy__sample_rate=0.1)
    assert make_clipping(recipe, noise_multiplier=1.0).describe()["count_noise_multiplier"] == 10.0
    assert make_clipping(recipe, noise_multiplier=3.0).describe()["count_noise_multiplier"] == 15.0


def test_threshold_and_gradient_together_cost_what_is_charged():
    """Two Gaussian releases of one sample, z_g and z_c, are one of ``(z_g^-2 + z_c^-2)^(-1/2)``."""
    recipe = recipe_of({"mode": "adaptive", "count_noise_multiplier": 4.0})
    plan = plan_privacy(privacy_spec(recipe))
    of_gradient = gradient_noise_multiplier(recipe, noise_multiplier=plan.noise_multiplier)
    assert of_gradient > plan.noise_multiplier
    both = 1 / math.sqrt(of_gradient**-2 + 4.0**-2)
    assert both == pytest.approx(plan.noise_multiplier, rel=1e-9)
    assert epsilon_of_phases([Phase(both, 0.032, 10)], 1e-5) <= recipe.privacy.target_epsilon * (1 + 1e-4)


def test_fixed_thresholds_leave_all_noise_to_the_gradient():
    assert gradient_noise_multiplier(recipe_of(MODES["per_layer"]), noise_multiplier=1.5) == 1.5


def test_count_noise_that_costs_the_whole_step_is_refused():
    recipe = recipe_of({"mode": "adaptive", "count_noise_multiplier": 0.5})
    with pytest.raises(PrivacyError, match=r"count_noise_multiplier=0\.5 must be above noise_multiplier=1"):
        gradient_noise_multiplier(recipe, noise_multiplier=1.0)


TRUNCATED = {
    "privacy.sampling": "truncated_poisson",
    "privacy.num_units": 1000,
    "privacy.max_batch_size": 56,
}
FACTORED = {
    "privacy.noise": "matrix_factorization",
    "privacy.sampling": "fixed_order",
    "privacy.sample_rate": 0.25,
    "privacy.planned_resumptions": 2,
    "privacy.delta": 1e-5,
}
FIXED = {"privacy.sampling": "fixed_size", "privacy.num_units": 1010}


@pytest.mark.parametrize(
    ("changes", "kind", "rate", "largest"),
    [
        ({}, "Poisson", 0.032, None),
        (TRUNCATED, "truncated Poisson", 0.032, 56),
        (FIXED, "fixed size", 32 / 1010, 32),
    ],
)
def test_the_sampler_that_draws_is_the_one_that_is_planned(changes, kind, rate, largest):
    recipe = sample_recipe(changes)
    spec, sampler = privacy_spec(recipe), make_sampler(recipe, 990)
    assert (spec.sampler, spec.sample_rate, spec.max_batch_size) == (kind, rate, largest)
    assert spec.num_records == recipe.privacy.num_units
    plan = plan_privacy(spec)
    assert plan.phase == sampler.phase(plan.noise_multiplier, 10)
    assert sampler.reportable_epsilon


@pytest.mark.parametrize("changes", [TRUNCATED, FIXED])
def test_more_records_than_places_are_refused(changes):
    with pytest.raises(DataError, match=r"there are 1,011 training records, more than the privacy.num_units"):
        make_sampler(sample_recipe(changes), 1011)


def test_empty_places_are_drawn_and_weigh_nothing(tmp_path):
    """Of 40 places 28 are empty: a fixed-size sample of 30 holds fewer records than that."""
    head, examples = make_head(), make_examples(12)
    grads = PerSampleGradients(head.model)
    step = OrdinaryStep(grads, torch.optim.SGD([grads.flat_params], lr=0.1), expected_batch_size=30)
    sampler = FixedSizeSampler(40, 30, key=bytes(32))
    trainer = Trainer(head, step, sampler, examples, micro_batch_tokens=64)
    real = [sum(place < 12 for place in sampler.draw(number)) for number in (0, 1, 2)]
    assert [trainer.run_step(number).num_samples for number in (1, 2, 3)] == real
    assert max(real) <= 12


def test_correlated_noise_is_one_mechanism_and_one_more_for_each_resumption():
    recipe = sample_recipe(FACTORED)
    spec = privacy_spec(recipe)
    assert (spec.sampler, spec.sample_rate, spec.steps) == ("fixed order", 1.0, 3)
    plan = plan_privacy(spec)
    mechanism = make_mechanism(recipe, steps_done=0)
    assert plan.phase == mechanism.phase(plan.noise_multiplier, runs=3)
    assert (mechanism.bands, mechanism.participation.min_separation) == (10, 4)
    assert mechanism.participation.max_participations == 3  # of ten steps the first, fifth and ninth
    assert make_mechanism(recipe, steps_done=7).participation.steps == 3
    header = planned_header(recipe, plan)
    assert (header.sampler, header.sample_rate, header.planned_steps) == ("fixed order", 1.0, 3)
    assert header.noise == {
        "kind": "matrix_factorization",
        "bands": 10,
        "batches_per_epoch": 4,
        "max_participations": 3,
        "steps": 10,
    }
    assert "Poisson" not in sampling_statement(header) + noise_statement(header)
    assert "without amplification by sampling; add or remove one record" in sampling_statement(header)
    assert "a record takes part every 4 steps, 3 times at most" in noise_statement(header)


def test_correlated_noise_for_users_has_the_mechanism_of_records_and_says_whom_it_protects():
    users = {"privacy.unit": "user", "privacy.max_records_per_user": 4, "data.user_field": "author"}
    recipe = sample_recipe({**FACTORED, **users, "data.private": {"path": "notes.jsonl"}})
    for_records = sample_recipe(FACTORED)
    assert make_mechanism(recipe, steps_done=7) == make_mechanism(for_records, steps_done=7)
    assert privacy_spec(recipe) == privacy_spec(for_records)
    header = planned_header(recipe, plan_privacy(privacy_spec(recipe)))
    assert (header.unit, header.max_records_per_unit) == ("user", 4)
    assert sampling_statement(header) == (
        "batches in a secret fixed order, without amplification by sampling, up to 4 records of each; add or "
        "remove one user; the number of users is private"
    )
    assert "a user takes part every 4 steps, 3 times at most" in noise_statement(header)
    sampler = make_unit_sampler(recipe, ["anna", "berta", "anna"], steps_done=7)
    assert isinstance(sampler, UserSampler)
    assert sampler.participation == make_mechanism(recipe, steps_done=7).participation


def private_run(folder, recipe, *, sample_rate=1.0):
    head, examples = make_head(), make_examples(12)
    recipe = recipe.model_copy(update={"run_dir": str(folder)})
    with RunFolder.open(recipe, resume=True) as run:
        plan = plan_privacy(privacy_spec(recipe))
        grads = PerSampleGradients(head.model)
        sampler = PoissonSampler(len(examples), recipe.privacy.sample_rate)
        ledger, step = make_private_step(
            recipe, run, plan, grads, make_optimizer(recipe, [grads.flat_params]), sampler
        )
        with ledger:
            drawing = PoissonSampler(len(examples), sample_rate, key=bytes(32))
            trainer = Trainer(head, step, drawing, examples, micro_batch_tokens=48)
            return trainer.run_step(1), step, read_ledger(run.ledger).header


@pytest.mark.parametrize(("name", "clipping"), MODES.items())
def test_clipped_fraction_and_ledger_fit_the_mode(tmp_path, name, clipping):
    result, step, header = private_run(tmp_path / "run", recipe_of(clipping, privacy__max_grad_norm=1e-3))
    fractions = step.clipping.clipped_fraction
    assert result.clipped_fraction == pytest.approx(sum(fractions) / len(fractions))
    assert result.clipped_fraction == 1.0  # all gradients are far longer than the threshold
    assert (len(fractions) == 1) == (name in ("flat", "automatic", "normalized", "adaptive"))
    assert header.clipping == clipping.get("mode", "flat")
    assert header.clipping_statement.startswith(f"{header.clipping}: ")
    assert "sensitivity 0.001" in header.clipping_statement


def test_nobody_is_clipped_by_a_large_threshold_and_nobody_drawn_is_no_fraction(tmp_path):
    recipe = recipe_of({"mode": "per_layer"}, privacy__max_grad_norm=1e6)
    assert private_run(tmp_path / "run", recipe)[0].clipped_fraction == 0.0
    assert private_run(tmp_path / "none", recipe, sample_rate=1e-12)[0].clipped_fraction is None


def test_patterns_that_fit_no_parameter_leave_no_ledger_behind(tmp_path):
    recipe = recipe_of({"mode": "groups", "groups": {"*.lora_A.*": 1.0}})
    with pytest.raises(PrivacyError, match="must match exactly one pattern of groups"):
        private_run(tmp_path / "run", recipe)
    assert not (tmp_path / "run" / "ledger.jsonl").exists()


def test_noise_of_adaptive_clipping_follows_the_moved_threshold(tmp_path):
    _, step, _ = private_run(tmp_path / "run", recipe_of(MODES["adaptive"]))
    (threshold,) = step.clipping.thresholds.values()
    assert threshold != 0.5
    ratio = step.clipping.noise_stddev(step.noise_multiplier) / (threshold * (1 + ROUNDING_EXCESS))
    assert ratio == pytest.approx(
        gradient_noise_multiplier(recipe_of(MODES["adaptive"]), noise_multiplier=step.noise_multiplier)
    )
    assert isinstance(step._noise, NoiseSource)
    assert torch.isfinite(step.grads.flat_params).all()
