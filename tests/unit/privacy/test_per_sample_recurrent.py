"""Recurrent layers of torch, against ordinary autograd on one sample at a time in float64."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from securetune.errors import PrivacyError
from securetune.privacy.per_sample import PerSampleGradients
from tests.per_sample_oracle import (
    assert_exact,
    randn,
    random_parameters,
    relative_error,
    square_losses,
    with_the_same_draws,
)

KINDS = [nn.RNN, nn.GRU, nn.LSTM]
DEEP = {"num_layers": 3, "bidirectional": True}


class Recurrent(nn.Module):
    """A recurrent layer whose first state is a sample's own; ``read`` is what the loss sees of it."""

    def __init__(self, kind, read: str, *, batch_first: bool = True, **options) -> None:
        super().__init__()
        self.start, self.layer = nn.Linear(6, 3), kind(6, 3, batch_first=batch_first, **options)
        self.read, self.batch_first = read, batch_first

    def call(self, x: Tensor, state):
        y, last = self.layer(x if self.batch_first else x.transpose(0, 1), state)
        return y if self.batch_first else y.transpose(0, 1), last

    def forward(self, x: Tensor) -> Tensor:
        is_lstm = isinstance(self.layer, nn.LSTM)
        layers = self.layer.num_layers * (1 + self.layer.bidirectional)
        first = self.start(x[:, 0]).expand(layers, -1, -1).contiguous()
        y, last = self.call(x, (first, first.sin()) if is_lstm else first)
        state = torch.cat(last if is_lstm else (last,)).transpose(0, 1)
        if self.read == "output":
            return y
        return state if self.read == "state" else y.sum(dim=(1, 2))[:, None] * state.flatten(1)


class Packed(Recurrent):
    """Gives its layer a packed sequence; a sample's length follows from its first number."""

    def __init__(self, kind, read: str, *, is_sorted: bool = False, **options) -> None:
        super().__init__(kind, read, **options)
        self.is_sorted = is_sorted

    def call(self, x: Tensor, state):
        lengths = 2 + (x[:, 0, 0].abs() * 10).long() % 4
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=self.is_sorted)
        y, last = self.layer(packed, state)
        return pad_packed_sequence(y, batch_first=True, total_length=x.shape[1])[0], last


@pytest.mark.parametrize("read", ["output", "state", "both"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, DEEP], ids=["one", "deep"])
def test_outputs_and_states(kind, options, batch_first, read):
    model = Recurrent(kind, read, batch_first=batch_first, **options)
    assert_exact(random_parameters(model.double()), randn(3, 5, 6))


class Second(nn.Module):
    """A part of a model whose tensors are ``[T, B, d]``; ``inner`` calls its layer with ``[B, T, d]``."""

    def __init__(self, layer: nn.Module, *, inner: bool) -> None:
        super().__init__()
        self.layer, self.inner = layer, inner

    def forward(self, x: Tensor) -> Tensor:
        given = x.transpose(0, 1) if self.inner else x
        y = self.layer(*[given] * (3 if isinstance(self.layer, nn.MultiheadAttention) else 1))[0]
        return y.transpose(0, 1) if self.inner else y


@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", [*KINDS, nn.MultiheadAttention])
def test_positions_first(kind, batch, inner):
    sizes = (6, 2) if kind is nn.MultiheadAttention else (6, 3)
    part = random_parameters(Second(kind(*sizes, batch_first=inner), inner=inner).double())

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = part

        def forward(self, x: Tensor) -> Tensor:
            return self.part(x.transpose(0, 1)).transpose(0, 1)

    assert_exact(Whole(), randn(batch, 5, 6))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", [*KINDS, nn.MultiheadAttention])
def test_a_model_that_gets_its_positions_first(kind, batch):
    sizes = (6, 2) if kind is nn.MultiheadAttention else (6, 3)
    model = random_parameters(Second(kind(*sizes), inner=False).double())

    def losses(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x.transpose(0, 1)) + 0.3).square().sum(dim=(0, 2))

    assert_exact(model, randn(batch, 5, 6), losses)


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_dropout_between_layers_has_the_masks_that_torch_draws(kind, batch_first, packs):
    options = DEEP | {"dropout": 0.4, "batch_first": batch_first}
    model = random_parameters((Packed if packs else Recurrent)(kind, "both", **options).double()).train()
    for _ in range(2):
        found, expected = with_the_same_draws(model, randn(3, 5, 6))
        assert relative_error(found, expected) < 1e-12
    assert_exact(model.eval(), randn(3, 5, 6))


def test_dropout_of_an_lstm_with_projections():
    class First(nn.LSTM):
        def __call__(self, x):
            return super().__call__(x)[0]

    layer = First(6, 3, num_layers=2, dropout=0.4, proj_size=2, batch_first=True)
    model = random_parameters(nn.Sequential(layer).double()).train()
    found, expected = with_the_same_draws(model, randn(3, 5, 6))
    assert relative_error(found, expected) < 1e-12


@pytest.mark.parametrize("read", ["output", "state", "both"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, DEEP], ids=["one", "deep"])
def test_packed_sequences(kind, options, read):
    x = randn(4, 5, 6)
    x[:, 0, 0] = torch.tensor([0.1, 0.3, 0.0, 0.3])  # 3, 5, 2 and 5 positions
    assert_exact(random_parameters(Packed(kind, read, **options).double()), x)


def test_packed_sequences_that_are_sorted():
    x = randn(3, 5, 6)
    x[:, 0, 0] = torch.tensor([0.3, 0.1, 0.0])
    assert_exact(random_parameters(Packed(nn.LSTM, "both", is_sorted=True, **DEEP).double()), x)


def test_input_without_a_batch_dimension_is_refused():
    model = nn.Sequential(nn.GRU(6, 3)).double()
    PerSampleGradients(model)
    with pytest.raises(PrivacyError, match=r"layer 0 \(GRU\) got an input of shape \[5, 6\]"):
        square_losses(model, randn(5, 6))
