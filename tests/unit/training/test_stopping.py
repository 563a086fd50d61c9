"""Early stopping: when it stops, what it keeps, and what its scores look at."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from securetune.config.schema import EarlyStoppingConfig
from securetune.data.collate import collate
from securetune.models.task import GenerateHead
from securetune.privacy.per_sample import PerSampleGradients
from securetune.training.dropout import AdapterDropout
from securetune.training.loop import activate_dropout
from securetune.training.stopping import EarlyStopping, make_score, num_checks
from tests.sample_recipe import sample_recipe
from tests.unit.training.tiny_head import make_examples, make_head

NOISY = {
    "training.early_stopping": {"method": "noisy_test", "epsilon": 2.0, "every": 4, "num_texts": 50},
    "data.min_held_out": 1050,
}


def run(scores: list[float], *, steps: int = 100, **settings) -> tuple[EarlyStopping, int, torch.Tensor]:
    """Train until stopped, each step adding one to the only parameter."""
    params = torch.zeros(1)
    remaining = iter(scores)
    config = EarlyStoppingConfig(method="public_validation", **settings)
    stopping = EarlyStopping(config, [params], lambda: next(remaining), steps=steps)
    for step in range(1, steps + 1):
        params += 1
        stopping.check(step)
        if stopping.has_stopped:
            break
    return stopping, step, params


def test_stops_after_patience_checks_without_gain_and_keeps_the_best():
    stopping, step, params = run([1, 3, 2, 2.9, 3], every=5, patience=3)
    assert (step, stopping.best_step) == (25, 10)
    stopping.restore_best()
    assert params.item() == 10


def test_a_gain_starts_the_patience_anew():
    stopping, step, _ = run([1, 0, 2, 0, 3, 0, 0], every=1, patience=2)
    assert (step, stopping.best_step) == (7, 5)


def test_a_gain_of_min_delta_does_not_count():
    assert run([1, 1.5, 1.5], every=1, patience=2, min_delta=0.5)[0].best_step == 1
    assert run([1, 1.51, 1.51, 1.51], every=1, patience=2, min_delta=0.5)[0].best_step == 2


def test_the_last_step_is_checked():
    stopping, step, _ = run([1, 2, 3], every=5, patience=3, steps=12)
    assert (step, stopping.best_step) == (12, 12)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_never_the_best(broken):
    assert run([broken, 1, broken, broken], every=1, patience=2)[0].best_step == 2
    stopping, step, params = run([broken, broken], every=1, patience=2)
    stopping.restore_best()
    assert (step, stopping.best_step, params.item()) == (2, None, 2)


@given(
    scores=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    killed=st.integers(0, 12),
    patience=st.integers(1, 4),
)
def test_a_resumed_run_decides_as_one_that_was_never_killed(scores, killed, patience):
    config = EarlyStoppingConfig(method="public_validation", every=1, patience=patience)
    results = []
    for kill in (False, True):
        params, remaining = torch.zeros(1), iter(map(float, scores))
        stopping = EarlyStopping(config, [params], lambda r=remaining: next(r), steps=len(scores))
        for step in range(1, len(scores) + 1):
            if kill and step == killed:
                saved = stopping.state(), stopping.best_params
                stopping = EarlyStopping(config, [params], lambda r=remaining: next(r), steps=len(scores))
                stopping.load(*saved)
            params += 1
            stopping.check(step)
            if stopping.has_stopped:
                break
        stopping.restore_best()
        results.append((step, stopping.best_step, params.item()))
    assert results[0] == results[1]


@pytest.mark.parametrize(("steps", "every", "checks"), [(10, 4, 3), (12, 4, 3), (13, 4, 4), (5, 1, 5)])
def test_number_of_checks_is_what_a_whole_run_makes(steps, every, checks):
    recipe = sample_recipe(
        {
            "privacy.steps": steps,
            "training.early_stopping": {"method": "public_validation", "every": every},
            "data.public_validation": {"path": "p.jsonl"},
        }
    )
    stopping = EarlyStopping(recipe.training.early_stopping, [torch.zeros(1)], lambda: 0.0, steps=steps)
    made = sum(stopping.check(step) is not None for step in range(1, steps + 1))
    assert made == num_checks(recipe) == checks


@pytest.mark.parametrize("task", ["classify", "generate"])
def test_public_score_is_the_plain_loss_and_changes_nothing(task):
    classify, examples = make_head(dropout=0.5), make_examples(7)
    head = classify if task == "classify" else GenerateHead(classify.model)
    batch = collate(examples)
    expected = -float(head.losses(head.embed(batch), batch).detach().mean())
    AdapterDropout(head.model, seed=0)
    activate_dropout(head.model)
    PerSampleGradients(head.model)
    changes = {
        "training.early_stopping": {"method": "public_validation"},
        "training.label_smoothing": 0.3,
        "data.public_validation": {"path": "p.jsonl"},
        **({} if task == "classify" else {"task": "generate", "data.labels": []}),
    }
    modes = {name: module.training for name, module in head.model.named_modules()}
    random_state = torch.get_rng_state()
    assert make_score(sample_recipe(changes), head, examples)() == pytest.approx(expected, rel=1e-12)
    assert modes == {name: module.training for name, module in head.model.named_modules()}
    assert torch.equal(random_state, torch.get_rng_state())


def test_noisy_score_is_the_count_with_noise_of_one_tests_share(monkeypatch):
    head, examples = make_head(), make_examples(30)
    with torch.no_grad():
        batch = collate(examples)
        logits = head.logits(head.embed(batch), batch)
    right = int((logits.argmax(dim=1) == batch.labels).sum())
    drawn = []

    def noise(epsilon):
        drawn.append(float(epsilon))
        return (3, -4)[len(drawn) - 1]

    monkeypatch.setattr("securetune.privacy.release.two_sided_geometric", noise)
    recipe = sample_recipe(NOISY)
    score = make_score(recipe, head, examples)
    assert [score(), score()] == [(right + 3) / 50, (right - 4) / 50]
    assert drawn == pytest.approx([2.0 / 3, 2.0 / 3])
    assert num_checks(recipe) == 3
