"""Subclasses of known layers that compute in their own way, against autograd on one sample at a time."""

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional

from securetune.privacy.per_sample import PerSampleGradients
from tests.per_sample_oracle import (
    assert_exact,
    one_by_one,
    randn,
    random_parameters,
    relative_error,
    square_losses,
)


def normalized(weight):
    return (weight - weight.mean(dim=1, keepdim=True)) / weight.std(dim=1, keepdim=True)


def ternary(weight):
    rounded = weight.detach().div(weight.detach().abs().mean()).round().clamp(-1, 1)
    return weight + (rounded - weight).detach()


LINEAR = {
    "changed weight": lambda layer, x: functional.linear(x, -layer.weight, layer.bias),
    "weight used twice": lambda layer, x: functional.linear(
        functional.linear(x, layer.weight, layer.bias), layer.weight.t()
    ),
    "own bias": lambda layer, x: 0.5 * functional.linear(x, layer.weight) + layer.bias,
    "changed bias": lambda layer, x: functional.linear(x, layer.weight, 2 * layer.bias),
    "masked": lambda layer, x: functional.linear(x, layer.weight * torch.ones(3, 6).tril(), layer.bias),
    "normalised": lambda layer, x: functional.linear(x, normalized(layer.weight), layer.bias),
    "unit rows": lambda layer, x: functional.normalize(x, dim=-1) @ functional.normalize(layer.weight).T,
    "ternary": lambda layer, x: functional.linear(x, ternary(layer.weight), layer.bias),
    "einsum": lambda layer, x: torch.einsum("...d,pd->...p", x, layer.weight) + layer.bias,
}


def linear(use) -> nn.Module:
    class Own(nn.Linear):
        def forward(self, x):
            return use(self, x)

    return random_parameters(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), Own(6, 3)).double())


@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 6), (4, 4, 6), (1, 5, 6)], ids=str)
@pytest.mark.parametrize("use", LINEAR.values(), ids=LINEAR)
def test_linear(use, shape):
    assert_exact(linear(use), randn(*shape))


@pytest.mark.parametrize("use", LINEAR.values(), ids=LINEAR)
def test_linear_with_a_frozen_bias_in_two_passes(use):
    model, x = linear(use), randn(4, 5, 6)
    model[2].bias.requires_grad_(False)
    engine = PerSampleGradients(model, passes=2)
    found = engine.backward(square_losses(model, x)).materialize()
    engine.detach()
    assert relative_error(found, one_by_one(model, x)) < 1e-12


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_linear_under_checkpointing_of_one_sample_at_first(use_reentrant):
    layers, x = linear(LINEAR["masked"]), randn(4, 5, 6)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.layers, self.is_plain = nn.Linear(6, 6).double(), layers, False

        def forward(self, x):
            y = self.first(x)
            if self.is_plain:
                return self.layers(y)
            return torch.utils.checkpoint.checkpoint(self.layers, y, use_reentrant=use_reentrant)

    model = Checkpointed()
    engine = PerSampleGradients(model)
    one = engine.backward(square_losses(model, x[:1])).materialize()
    found = engine.backward(square_losses(model, x)).materialize()
    engine.detach()
    model.is_plain = True
    expected = one_by_one(model, x)
    assert relative_error(found, expected) < 1e-12
    assert relative_error(one, expected[:1]) < 1e-12


TABLES = {
    "without the padding index": lambda table, ids: functional.embedding(ids, table.weight),
    "unit rows": lambda table, ids: functional.embedding(ids, functional.normalize(table.weight), 0),
    "one hot": lambda table, ids: functional.one_hot(ids, 9).double() @ table.weight,
}


@pytest.mark.parametrize("use", TABLES.values(), ids=TABLES)
def test_embedding(use):
    class Own(nn.Embedding):
        def forward(self, ids):
            return use(self, ids)

    model = random_parameters(nn.Sequential(Own(9, 6, padding_idx=0), nn.Linear(6, 3)).double())
    assert_exact(model, torch.tensor([[0, 1, 2], [3, 3, 0], [8, 7, 1], [2, 0, 0]]))


def test_weight_tied_to_a_known_layer():
    class Unit(nn.Embedding):
        def forward(self, ids):
            return functional.embedding(ids, functional.normalize(self.weight))

    model = nn.Sequential(Unit(9, 6), nn.LayerNorm(6), nn.Linear(6, 9, bias=False)).double()
    model[2].weight = model[0].weight
    assert_exact(random_parameters(model), torch.tensor([[0, 1, 2], [3, 3, 0], [8, 7, 1], [2, 0, 0]]))


@pytest.mark.parametrize(("use", "says"), [(LINEAR["masked"], True), (nn.Linear.forward, False)])
def test_only_what_is_written_out_is_said(use, says, caplog):
    model, x = linear(use), randn(4, 6)
    engine = PerSampleGradients(model)
    state = torch.get_rng_state()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            engine.backward(square_losses(model, x))
    assert [record.args[0] for record in caplog.records] == ["2"] * says
    assert torch.equal(torch.get_rng_state(), state)
