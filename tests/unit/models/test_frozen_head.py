import pytest
import torch
from torch.nn import functional as F

from securetune.models import frozen_head
from securetune.models.frozen_head import frozen_head_losses


def inputs(rows, *, with_bias, dtype=torch.float64):
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 16, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(37, 16, generator=generator, dtype=dtype)
    bias = torch.randn(37, generator=generator, dtype=dtype) if with_bias else None
    return hidden, weight, bias, torch.randint(37, (rows,), generator=generator)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 127, 128, 129])
def test_losses_and_gradients_are_those_of_autograd(rows, with_bias, smoothing):
    hidden, weight, bias, targets = inputs(rows, with_bias=with_bias)
    upstream = torch.linspace(-1, 1, rows, dtype=torch.float64)
    logits = F.linear(hidden, weight, bias)
    expected = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    losses = frozen_head_losses(hidden, weight, bias, targets, label_smoothing=smoothing)
    torch.testing.assert_close(losses, expected)
    (grad,) = torch.autograd.grad(losses, hidden, upstream)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, hidden, upstream)[0])


@pytest.mark.parametrize(("block_words", "block_rows"), [(1, 1), (5, 64), (36, 7), (37, 50), (64, 49)])
def test_any_block_size_gives_the_same_result(monkeypatch, block_words, block_rows):
    monkeypatch.setattr(frozen_head, "_BLOCK_WORDS", block_words)
    monkeypatch.setattr(frozen_head, "_BLOCK_ROWS", block_rows)
    hidden, weight, bias, targets = inputs(50, with_bias=True)
    expected = F.cross_entropy(
        F.linear(hidden * 30, weight, bias), targets, reduction="none", label_smoothing=0.1
    )
    losses = frozen_head_losses(hidden * 30, weight, bias, targets, label_smoothing=0.1)
    torch.testing.assert_close(losses, expected)
    (grad,) = torch.autograd.grad(losses.sum(), hidden)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), hidden)[0])


def test_words_that_a_bias_rules_out_do_not_spoil_the_rest(monkeypatch):
    monkeypatch.setattr(frozen_head, "_BLOCK_WORDS", 5)
    hidden, weight, bias, _ = inputs(8, with_bias=True)
    bias[:10] = -torch.inf
    targets = torch.full((8,), 20)
    expected = F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="none")
    losses = frozen_head_losses(hidden, weight, bias, targets)
    torch.testing.assert_close(losses, expected)
    (grad,) = torch.autograd.grad(losses.sum(), hidden)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), hidden)[0])


def test_a_row_that_is_not_finite_leaves_the_others_alone():
    hidden, weight, bias, targets = inputs(6, with_bias=True)
    alone = frozen_head_losses(hidden[1:], weight, bias, targets[1:])
    spoiled = hidden.detach().clone()
    spoiled[0] = torch.nan
    losses = frozen_head_losses(spoiled, weight, bias, targets)
    assert losses[0].isnan()
    torch.testing.assert_close(losses[1:], alone)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_bfloat16_gives_float32_losses_close_to_the_truth(smoothing):
    hidden, weight, bias, targets = inputs(50, with_bias=True, dtype=torch.bfloat16)
    options = {"reduction": "none", "label_smoothing": smoothing}
    losses = frozen_head_losses(hidden, weight, bias, targets, label_smoothing=smoothing)
    truth = F.cross_entropy(F.linear(hidden.double(), weight.double(), bias.double()), targets, **options)
    plain = F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, **options)
    assert losses.dtype == torch.float32
    assert (losses - truth).abs().max() <= 1.5 * (plain - truth).abs().max()


def test_an_output_layer_that_learns_is_refused():
    hidden, weight, bias, targets = inputs(3, with_bias=True)
    with pytest.raises(ValueError, match="requires a gradient"):
        frozen_head_losses(hidden, weight.requires_grad_(), bias, targets)
    with pytest.raises(ValueError, match="requires a gradient"):
        frozen_head_losses(hidden, weight.detach(), bias.requires_grad_(), targets)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
def test_smoothing_out_of_range_is_refused(smoothing):
    hidden, weight, bias, targets = inputs(3, with_bias=True)
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\)"):
        frozen_head_losses(hidden, weight, bias, targets, label_smoothing=smoothing)
