"""torch's attention layer, and dropout in modules that run again, against ordinary autograd in float64."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.per_sample_oracle import (
    assert_exact,
    randn,
    random_parameters,
    relative_error,
    with_the_same_draws,
)


class Attention(nn.Module):
    """An attention layer whose weights are read too; ``mask``: none, one for all, or each sample's."""

    def __init__(self, *, mask: str = "none", needs_weights: bool = True, **options) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(6, 2, **{"batch_first": True, **options})
        self.mask, self.needs_weights = mask, needs_weights

    def forward(self, x: Tensor) -> Tensor:
        first = self.layer.batch_first
        padding = allowed = None
        tokens = x.shape[1]
        if self.mask == "alike":
            allowed = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        if self.mask == "each":
            allowed = x[:, :, 0].repeat_interleave(2, dim=0)[:, None].expand(-1, tokens, -1)
            padding = x[:, :, 1] > 1.5
        given = x if first else x.transpose(0, 1)
        y, weights = self.layer(given, given, given, padding, self.needs_weights, allowed)
        y = y if first else y.transpose(0, 1)
        return y if weights is None else y * weights.square().sum(dim=2, keepdim=True)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", ["none", "alike", "each"])
@pytest.mark.parametrize("needs_weights", [True, False])
@pytest.mark.parametrize("tokens", [5, 3])
def test_masks_and_layouts(tokens, needs_weights, mask, batch_first):
    model = Attention(mask=mask, needs_weights=needs_weights, batch_first=batch_first)
    assert_exact(random_parameters(model.double()), randn(3, tokens, 6))


@pytest.mark.parametrize("mask", ["none", "alike", "each"])
@pytest.mark.parametrize("needs_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_dropout_has_the_masks_that_torch_draws(batch_first, needs_weights, mask):
    model = Attention(mask=mask, needs_weights=needs_weights, batch_first=batch_first, dropout=0.4)
    for _ in range(2):
        found, expected = with_the_same_draws(random_parameters(model.double()).train(), randn(3, 5, 6))
        assert relative_error(found, expected) < 1e-12
    assert_exact(model.eval(), randn(3, 5, 6))


@pytest.mark.parametrize("kept", ["out_proj", "bias", "in_proj", "bias_k"])
def test_frozen_part(kept):
    model = random_parameters(Attention(add_bias_kv=True).double())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(kept in name)
    assert_exact(model, randn(3, 5, 6))


def test_keys_of_other_sizes():
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.MultiheadAttention(6, 2, kdim=4, vdim=3, batch_first=True)

        def forward(self, x):
            return self.layer(x, x[:, :2, :4], x[:, :2, 3:])[0]

    assert_exact(random_parameters(Cross().double()), randn(3, 5, 6))


def test_subclass_with_a_forward_of_its_own():
    class Own(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x, need_weights=False)[0]

    model = nn.Sequential(Own(6, 2, batch_first=True, dropout=0.3)).double()
    assert_exact(random_parameters(model).eval(), randn(3, 5, 6)).detach()
    found, expected = with_the_same_draws(model.train(), randn(3, 5, 6))
    assert relative_error(found, expected) < 1e-12


@pytest.mark.parametrize("is_causal", [True, False])
def test_transformer_of_torch_with_dropout(is_causal):
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.3, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2)

        def forward(self, x):
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
            return self.encoder(x, mask=mask if is_causal else None, is_causal=is_causal)

    found, expected = with_the_same_draws(random_parameters(Encoder().double()).train(), randn(3, 3, 6))
    assert relative_error(found, expected) < 1e-12


class Scaled(nn.Module):
    """Draws something in its own forward, and multiplies it with its own parameter."""

    def __init__(self, draw) -> None:
        super().__init__()
        self.scale, self.draw = nn.Parameter(torch.ones(6)), draw

    def forward(self, x):
        return self.draw(x * self.scale) + self.draw(x).sum(dim=1, keepdim=True) * self.scale


@pytest.mark.parametrize(
    "draw",
    [
        nn.Dropout(0.4),
        nn.Dropout1d(0.4),
        lambda x: x * (torch.rand(len(x), 1, 1) + 0.5).floor(),
        lambda x: x * x.new_empty(len(x), 1, 1).bernoulli_(0.5),
        lambda x: x + torch.empty_like(x).normal_(0.0, 0.1),
        lambda x: functional.scaled_dot_product_attention(x, x, x, dropout_p=0.4),
        lambda x: functional.scaled_dot_product_attention(
            x, x, x, dropout_p=0.4, is_causal=True, scale=0.3
        ),
        lambda x: functional.scaled_dot_product_attention(
            *(x[:, None].expand(-1, heads, -1, -1) for heads in (4, 2, 2)), dropout_p=0.4, enable_gqa=True
        ).sum(dim=1),
        lambda x: functional.scaled_dot_product_attention(
            x, x, x, (x[..., :1] < 1.0).expand(-1, -1, x.shape[1]), dropout_p=0.4
        ),
    ],
    ids=["dropout", "channels", "drop path", "drop path in place", "noise", "attention", "causal", "groups",
         "nothing to attend to"],
)  # fmt: skip
def test_module_that_runs_again_has_the_same_draws(draw):
    model = random_parameters(nn.Sequential(Scaled(draw)).double()).train()
    for _ in range(2):
        found, expected = with_the_same_draws(model, randn(3, 5, 6))
        assert relative_error(found, expected) < 1e-12


class TestWeightSharedByLayersOfDifferentKinds:
    def test_autoencoder_whose_decoder_is_the_transposed_encoder(self):
        class Decoder(nn.Module):
            def __init__(self, weight) -> None:
                super().__init__()
                self.weight, self.bias = weight, nn.Parameter(torch.zeros(6))

            def forward(self, x):
                return functional.linear(x, self.weight.t(), self.bias)

        encoder = nn.Linear(6, 4)
        model = nn.Sequential(encoder, nn.Tanh(), Decoder(encoder.weight)).double()
        assert_exact(random_parameters(model), randn(3, 5, 6))

    def test_table_that_is_also_multiplied(self):
        class Scores(nn.Module):
            def __init__(self, weight) -> None:
                super().__init__()
                self.weight = weight

            def forward(self, x):
                return x @ self.weight.t()

        table = nn.Embedding(9, 6)
        model = nn.Sequential(table, nn.Linear(6, 6), Scores(table.weight)).double()
        ids = torch.tensor([[1, 2, 2, 5], [0, 8, 1, 1], [3, 3, 3, 3]])
        assert_exact(random_parameters(model), ids)
