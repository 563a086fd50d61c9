"""Embedding attacks: independence of samples, budget, best iterate, and what they leave untouched."""

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from securetune.adversarial.embedding import (
    attack_mode,
    default_step_size,
    mean_embedding_norm,
    perturb,
    perturb_until,
    random_starts,
    sample_seeds,
    surface_noise,
)

NORMS = ["l2_token", "linf", "l2_sample"]
B, T, D, V = 5, 9, 32, 50
LENGTHS = torch.tensor([9, 4, 7, 5, 8])


def ball_norm(delta: Tensor, norm: str) -> Tensor:
    """The largest norm per sample, in float64."""
    delta = delta.double()
    if norm == "l2_token":
        return delta.norm(dim=-1).amax(dim=-1)
    return delta.abs().amax(dim=(1, 2)) if norm == "linf" else delta.flatten(1).norm(dim=1)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=0.0,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20)
    return model


class Task:
    """A batch of labelled token sequences on the tiny Llama, with valid per-sample losses."""

    def __init__(self, model: LlamaForCausalLM, rows: Tensor | None = None) -> None:
        rows = torch.arange(B) if rows is None else rows
        generator = torch.Generator().manual_seed(7)
        self.ids = torch.randint(V, (B, T), generator=generator)[rows]
        self.labels = torch.randint(2, (B,), generator=generator)[rows]
        self.lengths = LENGTHS[rows]
        positions = torch.arange(T)
        # the first token (template head) and the last real one (template tail) may not be touched
        self.mask = (positions >= 1) & (positions < self.lengths[:, None] - 1)
        self.units = [f"record-{i}" for i in rows.tolist()]
        self.model = model
        self.embeds = model.get_input_embeddings()(self.ids).detach()

    def logits(self, embeds: Tensor) -> Tensor:
        attention_mask = (torch.arange(T) < self.lengths[:, None]).long()
        hidden = self.model.model(inputs_embeds=embeds, attention_mask=attention_mask).last_hidden_state
        return hidden[torch.arange(len(hidden)), self.lengths - 1] @ self.model.lm_head.weight[:2].T

    def losses(self, embeds: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.logits(embeds), self.labels, reduction="none")

    def margins(self, embeds: Tensor, rows: Tensor) -> Tensor:
        kept = Task.__new__(Task)
        kept.model, kept.lengths, kept.labels = self.model, self.lengths[rows], self.labels[rows]
        logits = kept.logits(embeds)
        index = torch.arange(len(rows))
        return logits[index, 1 - kept.labels] - logits[index, kept.labels]


def attack(task: Task, *, norm: str = "l2_token", steps: int = 3, radius: float = 2.0, **options):
    seeds = sample_seeds(task.units, seed=0, step=4)
    return perturb(
        task.losses,
        task.embeds,
        task.mask,
        norm=norm,
        radius=radius,
        steps=steps,
        random_start=seeds,
        **options,
    )


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("norm", NORMS)
def test_dropping_a_batch_mate_leaves_every_other_perturbation_bit_identical(model, norm, steps):
    whole = attack(Task(model), norm=norm, steps=steps)
    for dropped in range(B):
        rows = torch.tensor([i for i in range(B) if i != dropped])
        without = attack(Task(model, rows), norm=norm, steps=steps)
        assert torch.equal(without.delta, whole.delta[rows])


def test_neighbour_test_catches_a_delta_shared_by_the_batch(model):
    # negative control: a universal perturbation couples the samples, and the comparison above must see it
    def shared(task: Task) -> Tensor:
        result = perturb(
            lambda shift: task.losses(task.embeds + shift * task.mask[..., None]).mean()[None],
            torch.zeros(1, T, D, dtype=torch.float64),
            torch.ones(1, T, dtype=torch.bool),
            norm="linf",
            radius=0.5,
            steps=2,
        )
        return result.delta.expand(len(task.embeds), T, D)

    rows = torch.tensor([0, 1, 3, 4])
    assert not torch.equal(shared(Task(model, rows)), shared(Task(model))[rows])


def test_order_of_the_batch_does_not_matter(model):
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(
        attack(Task(model, order)).delta, attack(Task(model)).delta[order], rtol=0, atol=1e-12
    )


def test_attack_leaves_the_model_and_the_random_state_untouched():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    config.attention_dropout = 0.5
    model = LlamaForCausalLM(config).train()
    model.model.norm.eval()
    frozen = model.model.embed_tokens.weight.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0) if parameter.requires_grad else None
    calls: list[str] = []
    model.lm_head.register_full_backward_hook(lambda *_: calls.append("hook"))
    modes = [module.training for module in model.modules()]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    random_state = torch.get_rng_state()

    with attack_mode(model):
        attack(Task(model), steps=2)

    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == modes
    assert calls == []
    assert not frozen.requires_grad
    for parameter in model.parameters():
        assert parameter.requires_grad == (parameter is not frozen)
        assert parameter.grad is None if parameter is frozen else bool((parameter.grad == 3.0).all())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


def test_parameter_gradients_stay_none_without_attack_mode(model):
    attack(Task(model))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_attack_mode_restores_after_an_error(model):
    model.train()
    with pytest.raises(RuntimeError, match="inside"), attack_mode(model):
        raise RuntimeError("inside")
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("norm", NORMS)
def test_delta_is_zero_off_mask_and_within_the_radius_after_the_cast(norm, steps, dtype):
    torch.manual_seed(0)
    embeds = torch.randn(B, T, D).to(dtype)
    mask = torch.rand(B, T) < 0.6
    weights = torch.randn(T, D).to(dtype)
    result = perturb(
        lambda x: (x * weights).sum(dim=(1, 2)).square(),
        embeds,
        mask,
        norm=norm,
        radius=0.3,
        steps=steps,
        random_start=range(B),
    )
    assert result.delta.dtype == (torch.float32 if dtype == torch.float64 else dtype)
    assert not result.delta[~mask].any()
    assert (ball_norm(result.delta, norm) <= 0.3).all()
    assert (ball_norm(result.delta, norm) >= 0.2).all()


@pytest.mark.parametrize("norm", NORMS)
def test_best_loss_is_the_loss_of_the_returned_delta_and_the_best_seen(model, norm):
    task = Task(model)
    seen: list[Tensor] = []

    def losses(embeds: Tensor) -> Tensor:
        seen.append(task.losses(embeds))
        return seen[-1]

    # a step much longer than the radius makes the search overshoot, so the last iterate is often not the best
    result = perturb(
        losses, task.embeds, task.mask, norm=norm, radius=2.0, steps=6, step_size=20.0, random_start=range(B)
    )
    assert len(seen) == 7
    torch.testing.assert_close(result.best_loss, torch.stack(seen).amax(dim=0).float())
    torch.testing.assert_close(task.losses(task.embeds + result.delta).float(), result.best_loss)


def test_descent_returns_the_lowest_loss(model):
    task = Task(model)
    clean = task.losses(task.embeds).float()
    result = perturb(task.losses, task.embeds, task.mask, norm="l2_token", radius=2.0, steps=4, ascent=False)
    assert (result.best_loss < clean).all()
    torch.testing.assert_close(task.losses(task.embeds + result.delta).float(), result.best_loss)


def test_one_step_costs_one_forward_pass_and_says_that_the_loss_is_unknown(model):
    task = Task(model)
    calls: list[int] = []
    result = perturb(
        lambda x: (calls.append(1), task.losses(x))[1],
        task.embeds,
        task.mask,
        norm="linf",
        radius=0.5,
        steps=1,
    )
    assert len(calls) == 1
    assert result.best_loss.isnan().all()


def test_one_step_raises_the_loss_more_than_random_noise_of_the_same_radius(model):
    task = Task(model)
    result = attack(task, steps=1)
    noise = surface_noise(range(B), task.mask, D, norm="l2_token", radius=2.0)
    assert (task.losses(task.embeds + result.delta) > task.losses(task.embeds + noise)).all()


@pytest.mark.parametrize("norm", NORMS)
def test_surface_noise_has_the_full_radius_and_keeps_to_the_mask(model, norm):
    task = Task(model)
    noise = surface_noise(range(B), task.mask, D, norm=norm, radius=2.0)
    assert not noise[~task.mask].any()
    assert (ball_norm(noise, norm) <= 2.0).all()
    assert (ball_norm(noise, norm) >= 2.0 * (1 - 1e-4)).all()


def test_tie_keeps_the_earlier_iterate():
    result = perturb(
        lambda x: x.sum(dim=(1, 2)) * 0 + 1.0,
        torch.zeros(2, 3, 4),
        torch.ones(2, 3, dtype=torch.bool),
        norm="linf",
        radius=1.0,
        steps=3,
        random_start=[1, 2],
    )
    expected = random_starts([1, 2], torch.ones(2, 3, dtype=torch.bool), 4, norm="linf", radius=1.0)
    torch.testing.assert_close(result.delta, expected)


def test_sample_with_non_finite_loss_gets_zero_and_leaves_the_others_alone():
    embeds = torch.ones(3, 2, 4)
    mask = torch.ones(3, 2, dtype=torch.bool)
    broken = torch.tensor([1.0, math.nan, math.inf])
    result = perturb(
        lambda x: x.square().sum(dim=(1, 2)) * broken, embeds, mask, norm="linf", radius=0.1, steps=3
    )
    alone = perturb(
        lambda x: x.square().sum(dim=(1, 2)), embeds[:1], mask[:1], norm="linf", radius=0.1, steps=3
    )
    assert torch.equal(result.delta[:1], alone.delta)
    assert not result.delta[1:].any()
    assert result.best_loss.isfinite().tolist() == [True, False, False]


def test_loss_that_breaks_later_keeps_the_best_finite_iterate():
    def losses(x: Tensor) -> Tensor:
        size = x.sum(dim=(1, 2))
        return torch.where(size > 1.0, torch.full_like(size, math.nan), size)

    result = perturb(
        losses,
        torch.zeros(1, 1, 4),
        torch.ones(1, 1, dtype=torch.bool),
        norm="linf",
        radius=1.0,
        steps=4,
        step_size=0.2,
    )
    torch.testing.assert_close(result.best_loss, torch.tensor([0.8]))


def test_perturbation_does_not_depend_on_padding(model):
    short = Task(model, torch.tensor([1]))
    seeds = sample_seeds(short.units, seed=0, step=4)
    padded = random_starts(seeds, short.mask, D, norm="l2_token", radius=1.0)
    trimmed = random_starts(seeds, short.mask[:, :4], D, norm="l2_token", radius=1.0)
    assert torch.equal(padded[:, :4], trimmed)


@pytest.mark.parametrize("norm", NORMS)
def test_random_starts_fill_the_ball(norm):
    mask = torch.ones(64, 6, dtype=torch.bool)
    norms = ball_norm(random_starts(range(64), mask, D, norm=norm, radius=2.0), norm)
    assert (norms <= 2.0 + 1e-6).all()
    assert norms.unique().numel() == 64


def test_random_starts_do_not_touch_global_generators():
    state = torch.get_rng_state()
    random_starts([5], torch.ones(1, 3, dtype=torch.bool), D, norm="linf", radius=1.0)
    assert torch.equal(torch.get_rng_state(), state)


def test_sample_seeds_depend_on_each_unit_alone_and_on_step_and_seed():
    seeds = sample_seeds(["a", "b"], seed=1, step=2)
    assert seeds == [sample_seeds([unit], seed=1, step=2)[0] for unit in "ab"]
    assert len({*seeds, *sample_seeds(["a"], seed=1, step=3), *sample_seeds(["a"], seed=2, step=2)}) == 4
    assert all(0 <= seed < 2**128 for seed in seeds)


def test_huge_radius_breaks_every_sample_and_a_tiny_one_none(model):
    task = Task(model)
    task.mask = torch.arange(T) < task.lengths[:, None]
    task.labels = task.logits(task.embeds).argmax(dim=-1)
    broken = {
        radius: int((attack(task, radius=radius, steps=8).best_loss > math.log(2)).sum())
        for radius in (1e-6, 1.0, 1e3)
    }
    assert broken[1e-6] == 0
    assert broken[1e3] == B
    assert broken[1e-6] <= broken[1.0] <= broken[1e3]


@pytest.mark.parametrize("radius", [0.5, 2.0, 1e3])
def test_stopping_early_breaks_the_same_samples(model, radius):
    task = Task(model)
    task.labels = task.logits(task.embeds).argmax(dim=-1)
    everyone = torch.arange(B)
    options = {"norm": "l2_token", "radius": radius, "steps": 6, "random_start": range(B)}
    full = perturb(lambda x: task.margins(x, everyone), task.embeds, task.mask, **options)
    stopped = perturb_until(task.margins, task.embeds, task.mask, threshold=0.0, **options)
    assert torch.equal(stopped.best_loss > 0, full.best_loss > 0)
    torch.testing.assert_close(
        task.margins(task.embeds + stopped.delta, everyone).float(), stopped.best_loss, rtol=0, atol=1e-6
    )


def test_stopping_early_spends_nothing_on_broken_samples(model):
    task = Task(model)
    task.labels = 1 - task.logits(task.embeds).argmax(dim=-1)
    sizes: list[int] = []

    def margins(embeds: Tensor, rows: Tensor) -> Tensor:
        sizes.append(len(rows))
        return task.margins(embeds, rows)

    perturb_until(margins, task.embeds, task.mask, threshold=0.0, norm="linf", radius=1e-6, steps=5)
    assert sizes == [B]


def test_mean_embedding_norm_counts_the_embedding_scale(model):
    embedding = model.get_input_embeddings()
    expected = embedding.weight.norm(dim=-1).mean().item()
    assert mean_embedding_norm(model) == pytest.approx(expected)
    embedding.embed_scale = 3.0
    try:
        assert mean_embedding_norm(model) == pytest.approx(3 * expected)
    finally:
        del embedding.embed_scale


def test_default_step_sizes():
    assert default_step_size(2.0, 1) == 2.5
    assert default_step_size(2.0, 10) == 0.5


GOOD = {"norm": "linf", "radius": 1.0, "steps": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "l1"}, "norm must be one of l2_token, linf, l2_sample, got 'l1'"),
        ({"radius": 0.0}, "radius must be > 0 and finite, got 0.0"),
        ({"radius": math.nan}, "radius must be > 0 and finite, got nan"),
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"step_size": -1.0}, "step_size must be > 0 and finite, got -1.0"),
        ({"random_start": [1]}, r"one seed per sample \(2\), got 1"),
    ],
)
def test_bad_option_is_named_with_its_value(options, message):
    with pytest.raises(ValueError, match=message):
        perturb(
            lambda x: x.sum(dim=(1, 2)),
            torch.zeros(2, 3, 4),
            torch.ones(2, 3, dtype=torch.bool),
            **{**GOOD, **options},
        )


def test_batch_mean_loss_is_refused():
    with pytest.raises(ValueError, match="one loss per sample"):
        perturb(lambda x: x.mean(), torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool), **GOOD)


def test_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"attack_mask must be bool with shape \(2, 3\)"):
        perturb(lambda x: x.sum(dim=(1, 2)), torch.zeros(2, 3, 4), torch.ones(3, 2, dtype=torch.bool), **GOOD)
