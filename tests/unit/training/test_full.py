"""Training in full: per-sample gradients of every weight, against autograd on one sample at a time."""

import copy

import pytest
import torch
from transformers import GPT2Config

from securetune.config.schema import AdversarialConfig
from securetune.data.collate import collate
from securetune.errors import PrivacyError
from securetune.models.base import BaseModel
from securetune.models.checkpointing import checkpoint_layers
from securetune.models.task import ClassifyHead, GenerateHead
from securetune.privacy.per_sample import PerSampleGradients
from securetune.privacy.sampling import PoissonSampler
from securetune.privacy.step import OrdinaryStep
from securetune.training.loop import Adversary, Trainer, check_gradients
from securetune.training.plan import make_plan
from tests.sample_recipe import sample_recipe
from tests.tiny import LABEL_WORDS, tiny_llama, tiny_model, tiny_tokenizer
from tests.unit.training.tiny_head import PROMPT, make_examples

EXAMPLES = make_examples(5)
ATTACK = AdversarialConfig(method="pgd", radius=0.2, steps=2)


def make_model(family="tied", *, dtype=torch.float64):
    if family == "gpt2":
        config = GPT2Config(vocab_size=len(tiny_tokenizer()), n_embd=32, n_layer=2, n_head=4, n_positions=64)
        return tiny_model(config, dtype=dtype)
    return tiny_llama(dtype=dtype, tie_word_embeddings=family == "tied")


def make_head(task, model, **options):
    if task == "generate":
        return GenerateHead(model, **options)
    return ClassifyHead(model, tiny_tokenizer(), LABEL_WORDS, prompt=PROMPT, **options)


def truth(task, model, perturbations, *, autocast=None):
    """Each sample's gradient alone, with ordinary modules: ``[B, P]``, float64."""
    head = make_head(task, model, autocast=autocast)
    rows = []
    for example, delta in zip(EXAMPLES, perturbations, strict=True):
        batch = collate([example])
        embeds = head.embed(batch) + delta[None, : batch.input_ids.shape[1]]
        (loss,) = head.losses(embeds, batch)
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        grads = [
            torch.zeros_like(p) if grad is None else grad
            for grad, p in zip(found, model.parameters(), strict=True)
        ]
        rows.append(torch.cat([grad.double().flatten() for grad in grads]))
    return torch.stack(rows)


@pytest.mark.parametrize("task", ["classify", "generate"])
@pytest.mark.parametrize("family", ["tied", "untied", "gpt2"])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("is_attacked", [True, False])
def test_every_weights_gradient_is_that_of_the_sample_alone(monkeypatch, task, family, passes, is_attacked):
    monkeypatch.setattr("securetune.models.task._HEAD_ROWS", 15)  # several calls of the output layer
    model = make_model(family)
    plain = copy.deepcopy(model)
    if passes == 2:
        checkpoint_layers(model)
    head, batch = make_head(task, model), collate(EXAMPLES)
    grads = PerSampleGradients(model, passes=passes)
    embeds = head.embed(batch)
    perturbed = Adversary(head, ATTACK, seed=1).perturb(embeds, batch, step=3) if is_attacked else embeds
    delta = (perturbed - embeds).detach()
    assert bool(delta.any()) == is_attacked
    found = grads.backward(head.losses(perturbed, batch)).materialize()
    expected = truth(task, plain, delta)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))
    table = next(place for place in grads.parameters if place.parameter.shape[0] == len(tiny_tokenizer()))
    in_inputs = found[:, table.start : table.stop].unflatten(1, table.parameter.shape)[0]
    assert in_inputs[list(EXAMPLES[0].input_ids[:-1])].any(dim=1).all()  # embeddings learn, attacked or not
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("task", ["classify", "generate"])
@pytest.mark.parametrize("family", ["tied", "untied"])
def test_bfloat16_arithmetic_is_as_exact_as_torchs_own(task, family):
    model = make_model(family, dtype=torch.float32)
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    head, batch = make_head(task, model, autocast=torch.bfloat16), collate(EXAMPLES)
    grads = PerSampleGradients(model)
    embeds = head.embed(batch)
    losses = head.losses(embeds, batch)
    assert (embeds.dtype, losses.dtype) == (torch.float32, torch.float32)
    found = grads.backward(losses).materialize()
    nothing = torch.zeros(embeds.shape)
    expected = truth(task, exact, nothing.double())
    own = truth(task, plain, nothing, autocast=torch.bfloat16)
    error, own_error = (found - expected).norm(dim=1), (own - expected).norm(dim=1)
    assert (own_error > 0).all()  # it was rounded indeed
    assert (error <= 1.25 * own_error).all()


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_the_check_before_training_looks_at_exact_arithmetic(autocast):
    model = make_model(dtype=torch.float32)
    head = make_head("generate", model, autocast=autocast)
    check_gradients(head, PerSampleGradients(model), EXAMPLES[:2])
    hidden = head.hidden_states(head.embed(collate(EXAMPLES)))
    assert head._logits(hidden).dtype == torch.float32
    assert (head._autocast is None) == (autocast is None)


def test_a_weight_that_is_read_instead_of_called_is_refused():
    model = make_model()
    head = make_head("classify", model.requires_grad_(False))  # takes the output layer to be frozen
    grads = PerSampleGradients(model.requires_grad_(True))
    batch = collate(EXAMPLES)
    with pytest.raises(PrivacyError, match="outside of its module's forward"):
        grads.backward(head.losses(head.embed(batch), batch))


@pytest.mark.parametrize("adversary", [False, True])
@pytest.mark.parametrize("passes", [1, 2])
def test_micro_batches_passes_and_attacks_leave_the_result_to_rounding(passes, adversary):
    results = []
    for micro in (12, 1000):
        model = make_model()
        checkpoint_layers(model)
        head = make_head("generate", model)
        attack = Adversary(head, ATTACK, seed=1) if adversary else None
        grads = PerSampleGradients(model, passes=passes)
        optimizer = torch.optim.SGD([grads.flat_params], lr=0.5)
        step = OrdinaryStep(grads, optimizer, expected_batch_size=5)
        sampler = PoissonSampler(len(EXAMPLES), 1.0, key=bytes(32))
        Trainer(head, step, sampler, EXAMPLES, micro_batch_tokens=micro, adversary=attack).run_step(1)
        results.append(grads.flat_params.detach().clone())
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-11)
    start = torch.cat([parameter.flatten() for parameter in make_model().parameters()])
    assert not torch.equal(results[0], start)


def plan_of(model, **training):
    base = BaseModel(
        model=model.requires_grad_(False),
        tokenizer=tiny_tokenizer(),
        name="tiny",
        digest="0" * 64,
        dtype=torch.float32,
        device=torch.device("cpu"),
        folder=None,
        description="tiny",
    )
    changes = {f"training.{name}": value for name, value in training.items()}
    return make_plan(sample_recipe(changes), base=base, tokens_per_record=20).estimate


def test_plan_counts_the_memory_of_all_weights_and_of_what_is_kept():
    model = tiny_llama(dtype=torch.float32, num_hidden_layers=6, hidden_size=64)
    lora = plan_of(model)
    assert lora.update_ms_per_step == 0
    full = plan_of(model, method="full")
    checkpointed = plan_of(model, method="full", gradient_checkpointing=True)
    twice = plan_of(model, method="full", gradient_checkpointing=True, passes=2)
    assert full.memory_bytes > checkpointed.memory_bytes > twice.memory_bytes
    assert plan_of(model, gradient_checkpointing=True).memory_bytes < lora.memory_bytes
    assert full.update_ms_per_step > 0
    assert full.seconds["hardened training"] > full.seconds["plain fine-tune"]
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.get_decoder().layers[0].mlp.down_proj.forward.__func__ is torch.nn.Linear.forward
