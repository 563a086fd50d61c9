"""Modules that multiply with a layer's weight beside calling it, against autograd on one sample at a time."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional

from securetune.errors import PrivacyError
from securetune.privacy.per_sample import PerSampleGradients
from tests.per_sample_oracle import assert_exact, one_by_one, random_parameters, relative_error, square_losses

IDS = torch.randint(1, 9, (4, 5), generator=torch.Generator().manual_seed(1))


class Language(nn.Module):
    """A causal model without an output layer of its own."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"table": nn.Embedding(9, 6), "positions": nn.Embedding(8, 6)})
        self.table, self.layer = self.parts["table"], nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.way = forward

    def hidden(self, ids):
        x = self.table(ids) + self.parts["positions"](torch.arange(ids.shape[1]))
        return self.norm(x + torch.tanh(self.layer(x)))


class Linear(Language):
    def forward(self, ids):
        return functional.linear(self.hidden(ids), self.table.weight)


class LinearOfAWholePath(Language):
    def forward(self, ids):
        return functional.linear(self.hidden(ids), self.parts.table.weight, torch.ones(9).double())


class Product(Language):
    def forward(self, ids):
        return self.hidden(ids) @ self.table.weight.T


class Matmul(Language):
    def forward(self, ids):
        return torch.matmul(self.hidden(ids), self.table.weight.transpose(0, 1)) * 0.5


class Whisper(Language):
    def forward(self, ids):
        x = self.hidden(ids)
        return (x @ torch.transpose(self.table.weight.to(x.dtype), 0, 1)).double()


class Alias(Language):
    def forward(self, ids):
        weight = self.table.weight
        return self.hidden(ids) @ weight.t()


class Several(Language):
    """The table's weight and a layer's, both ways, and inside of a list."""

    def forward(this, ids):
        x = this.hidden(ids)
        x = x + functional.linear(torch.tanh(x), this.layer.weight.t())
        x = x + functional.linear(x, this.layer.weight) + x @ this.layer.weight
        return x @ this.table.weight.T


KINDS = [Linear, LinearOfAWholePath, Product, Matmul, Whisper, Alias, Several]


def make(kind) -> nn.Module:
    return random_parameters(kind(None).double())


@pytest.mark.parametrize("shape", [(4, 5), (4, 4), (1, 3), (3, 1)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_products(kind, shape):
    ids = torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(1))
    assert_exact(make(kind), ids)


@pytest.mark.parametrize("kind", KINDS)
def test_products_in_two_passes_and_inside_of_another_module(kind):
    model = nn.Sequential(make(kind), nn.Linear(9, 3).double())
    expected = one_by_one(copy.deepcopy(model), IDS)
    engine = PerSampleGradients(model, passes=2)
    factors = torch.linspace(0.5, 2, 4)[:, None]
    for _ in range(2):
        grads = engine.backward(square_losses(model, IDS))
        torch.testing.assert_close(grads.squared_norms()[:, 0], expected.square().sum(dim=1))
        summed = torch.zeros(engine.num_params, dtype=torch.float64)
        grads.accumulate(factors, summed)
        assert relative_error(summed, (factors.double() * expected).sum(dim=0)) < 1e-12


@pytest.mark.parametrize("kind", [Linear, Several])
def test_products_next_to_an_output_layer_that_is_tied(kind):
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = kind(None)
            self.head = nn.Linear(6, 9)
            self.head.weight = self.inner.table.weight

        def forward(self, ids):
            return self.inner(ids) + self.head(self.inner.hidden(ids))

    assert_exact(random_parameters(Both().double()), IDS)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_products_under_checkpointing(use_reentrant):
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner, self.is_plain = nn.Embedding(9, 6), Tail(), False

        def forward(self, ids):
            x = self.first(ids)
            if self.is_plain:
                return self.inner(x)
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=use_reentrant)

    class Tail(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x):
            return functional.linear(torch.tanh(self.layer(x)), self.layer.weight.t())

    model = random_parameters(Checkpointed().double())
    model.is_plain = True
    expected = one_by_one(copy.deepcopy(model), IDS)
    model.is_plain = False
    engine = PerSampleGradients(model)
    found = engine.backward(square_losses(model, IDS)).materialize()
    assert relative_error(found, expected) < 1e-12


def test_products_under_compilation():
    model = make(Product)
    expected = one_by_one(copy.deepcopy(model), IDS)
    engine = PerSampleGradients(model)
    compiled = torch.compile(model, backend="aot_eager")
    assert relative_error(engine.backward(square_losses(compiled, IDS)).materialize(), expected) < 1e-12


def test_any_other_use_is_refused():
    class Norms(Language):
        def forward(self, ids):
            return functional.linear(self.hidden(ids), self.table.weight) + self.table.weight.norm(dim=1)

    model = make(Norms)
    engine = PerSampleGradients(model)
    with pytest.raises(PrivacyError, match=r"table\.weight got an ordinary gradient"):
        engine.backward(square_losses(model, IDS))


def test_layers_whose_weight_is_only_looked_at_are_left_alone():
    class Looking(Language):
        def forward(self, ids):
            return self.hidden(ids).to(self.table.weight.dtype) * self.table.weight.shape[1]

    modules = [make(Looking), nn.TransformerEncoderLayer(8, 2, batch_first=True).double()]
    for module in modules:
        engine = PerSampleGradients(module)
        assert "TiedUsesPath" not in [type(path).__name__ for path in engine.paths]


def trained_and_let_go() -> weakref.ref[nn.Module]:
    layer = random_parameters(nn.Linear(6, 6).double())

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x)

    model = Inner()
    engine = PerSampleGradients(model)
    engine.backward(square_losses(model, torch.ones(3, 6, dtype=torch.float64)))
    engine.detach()
    return weakref.ref(layer)


def test_a_model_of_a_class_made_in_a_function_is_freed():
    layer = trained_and_let_go()
    gc.collect()
    assert layer() is None
