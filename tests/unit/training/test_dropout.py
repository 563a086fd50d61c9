"""Dropout masks belong to samples: exact gradients, whatever the batch, the pass and the attack."""

import copy

import pytest
import torch
from torch import nn

from securetune.config.schema import AdversarialConfig
from securetune.data.collate import Batch, collate
from securetune.errors import PrivacyError
from securetune.models.task import ClassifyHead, GenerateHead
from securetune.privacy.per_sample import PerSampleGradients
from securetune.privacy.sampling import PoissonSampler
from securetune.privacy.step import OrdinaryStep
from securetune.training.dropout import AdapterDropout
from securetune.training.loop import Adversary, Trainer, activate_dropout
from tests.unit.training.tiny_head import make_examples, make_head

P = 0.4


@pytest.fixture
def examples():
    return make_examples(5)


def dropped(head: ClassifyHead, *, seed: int = 0) -> AdapterDropout:
    dropout = AdapterDropout(head.model, seed=seed)
    activate_dropout(head.model)
    return dropout


def record_masks(model: nn.Module) -> dict[str, torch.Tensor]:
    """Keep the mask of every dropout module in the next forward pass."""
    masks: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(
                lambda _, inputs, output, key=name: masks.__setitem__(key, (output / inputs[0]).detach())
            )
    return masks


class FixedMask(nn.Module):
    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.mask


@pytest.mark.parametrize("task", ["classify", "generate"])
def test_gradients_are_those_of_each_sample_alone_under_its_own_masks(examples, task):
    head = make_head(dropout=P)
    plain = copy.deepcopy(head.model)  # peft's own forward
    dropout = AdapterDropout(head.model, seed=0)
    grads = PerSampleGradients(head.model)
    activate_dropout(head.model)
    masks = record_masks(head.model)
    if task == "generate":
        head = GenerateHead(head.model)
    batch = collate(examples)
    rows = torch.zeros(len(examples), grads.num_params, dtype=torch.float64)
    with dropout.masks(batch, step=3):
        losses = head.losses(head.embed(batch), batch, label_smoothing=0.1)
        recorded = grads.backward(losses)
        for index, row in enumerate(rows):  # one sample's gradient at a time, through the sum
            weights = torch.zeros(len(rows), 1, dtype=torch.float64)
            weights[index] = 1
            recorded.accumulate(weights, row)
    assert all(
        ((mask == 0) | (mask - 1 / (1 - P)).abs().lt(1e-9) | (mask == 1)).all() for mask in masks.values()
    )
    for index, example in enumerate(examples):
        length = len(example.input_ids)
        alone = copy.deepcopy(plain)
        own = GenerateHead(alone) if task == "generate" else make_head(model=alone)
        for name, holder in list(alone.named_modules()):
            if name.endswith("lora_dropout"):
                holder["default"] = FixedMask(masks[f"{name}.default"][index : index + 1, :length])
        single = collate([example])
        loss = own.losses(own.embed(single), single, label_smoothing=0.1)
        trainable = dict(alone.named_parameters())
        names = [place.name for place in grads.parameters]
        truth = torch.autograd.grad(loss.sum(), [trainable[name] for name in names])
        torch.testing.assert_close(losses[index], loss[0], rtol=0, atol=1e-12)
        expected = torch.cat([grad.flatten() for grad in truth])
        assert expected.norm() > 1e-3
        torch.testing.assert_close(rows[index], expected, rtol=0, atol=1e-10)


def test_masks_are_elementwise_coins_that_differ_between_layers_steps_samples_and_seeds(examples):
    head = make_head(dropout=P)
    x = torch.ones(5, 12, 400)
    long = Batch(**{**vars(collate(examples)), "lengths": torch.full((5,), 12)})
    dropout = AdapterDropout(head.model, seed=0)
    found = []
    for step, layer in ((1, 0), (1, 1), (2, 0)):
        with dropout.masks(long, step=step):
            found.append(dropout.draw(x, P, layer))
    other_seed = AdapterDropout(make_head(dropout=P).model, seed=1)
    with other_seed.masks(long, step=1):
        found.append(other_seed.draw(x, P, 0))
    draws = torch.stack(found).flatten(2).flatten(0, 1)  # [20, 4800]: one row per address
    kept = draws > 0
    assert (kept.double().mean(dim=1) - (1 - P)).abs().max() < 5 * (P * (1 - P) / 4800) ** 0.5
    correlations = torch.corrcoef(kept.double()) - torch.eye(len(kept))
    assert correlations.abs().max() < 5 / 4800**0.5


def test_a_mask_depends_on_neither_batch_mates_nor_padding(examples):
    dropout = AdapterDropout(make_head(dropout=P).model, seed=0)
    together, alone = collate(examples), collate(examples[2:3])
    with dropout.masks(together, step=1):
        wide = dropout.draw(torch.ones(5, together.input_ids.shape[1] + 3, 7), P, 0)
    with dropout.masks(alone, step=1):
        narrow = dropout.draw(torch.ones(1, alone.input_ids.shape[1], 7), P, 0)
    length = int(alone.lengths[0])
    assert torch.equal(wide[2, :length], narrow[0, :length])
    assert (wide[2, length:] == 1).all()
    assert (narrow == 0).any()


def test_attacks_run_without_dropout_and_leave_masks_and_random_state_alone(examples):
    batch = collate(examples)
    config = AdversarialConfig(method="pgd", radius=0.1, steps=2)
    plain, masked = make_head(), make_head(dropout=P)
    dropout = dropped(masked)
    expected = Adversary(plain, config, seed=1).perturb(plain.embed(batch), batch, step=1)
    state = torch.get_rng_state()
    with dropout.masks(batch, step=1):
        before = masked.losses(masked.embed(batch), batch)
        attacked = Adversary(masked, config, seed=1).perturb(masked.embed(batch), batch, step=1)
        after = masked.losses(masked.embed(batch), batch)
    assert torch.equal(attacked, expected)
    assert torch.equal(before, after)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(before, plain.losses(plain.embed(batch), batch))


@pytest.mark.parametrize("adversary", [None, AdversarialConfig(method="fgsm", radius=0.1)])
def test_micro_batches_do_not_change_a_step_with_dropout(adversary):
    results = []
    for micro in (20, 1000):
        head, examples = make_head(dropout=P), make_examples(12)
        dropout = AdapterDropout(head.model, seed=0)
        grads = PerSampleGradients(head.model)
        step = OrdinaryStep(grads, torch.optim.SGD([grads.flat_params], lr=1.0), expected_batch_size=8)
        training = Trainer(
            head,
            step,
            PoissonSampler(12, 0.5, key=bytes(32)),
            examples,
            micro_batch_tokens=micro,
            adversary=None if adversary is None else Adversary(head, adversary, seed=1),
            dropout=dropout,
        )
        activate_dropout(head.model)
        training.run_step(1)
        results.append(grads.flat_params.detach().clone())
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-9)


def test_training_mode_without_masks_is_refused(examples):
    head = make_head(dropout=P)
    dropped(head)
    batch = collate(examples)
    with pytest.raises(RuntimeError, match=r"outside AdapterDropout\.masks"):
        head.losses(head.embed(batch), batch)


def test_input_that_is_not_one_row_per_sample_is_refused(examples):
    dropout = AdapterDropout(make_head(dropout=P).model, seed=0)
    with (
        dropout.masks(collate(examples), step=1),
        pytest.raises(
            PrivacyError, match=r"shape \(60, 4\) where the batch has 5 samples.*lora\.dropout to 0"
        ),
    ):
        dropout.draw(torch.ones(60, 4), P, 0)


def test_a_model_without_dropout_computes_the_same_as_before(examples):
    head, batch = make_head(), collate(examples)
    before = head.losses(head.embed(batch), batch)
    dropout = dropped(head)
    with dropout.masks(batch, step=1):
        assert torch.equal(before, head.losses(head.embed(batch), batch))
