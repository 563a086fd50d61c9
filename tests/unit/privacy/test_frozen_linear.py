"""Products with frozen weights: right whatever library computes them, and seen through by gradients."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from securetune.privacy.per_sample import PerSampleGradients, frozen
from securetune.privacy.per_sample.frozen import FrozenLinearPath, frozen_linear, onednn_speedup

needs_onednn = pytest.mark.skipif(
    onednn_speedup(torch.get_num_threads()) == 0, reason="this build of torch has no oneDNN operator"
)


@pytest.fixture(params=["own", "onednn"])
def library(request, monkeypatch):
    """Take torch's own products, or oneDNN's for any size."""
    is_onednn = request.param == "onednn"
    if is_onednn and onednn_speedup(torch.get_num_threads()) == 0:
        pytest.skip("this build of torch has no oneDNN operator")
    monkeypatch.setattr(frozen, "onednn_speedup", lambda _: 2.0 if is_onednn else 0.0)
    monkeypatch.setattr(frozen, "_WORTHWHILE", 0)
    return request.param


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


@pytest.mark.parametrize("leading", [(), (1,), (7,), (2, 3), (3, 1, 65)])
@pytest.mark.parametrize(("d", "p"), [(1, 1), (17, 5), (64, 129)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_product_is_as_close_to_the_truth_as_torchs(library, leading, d, p, with_bias):
    x, weight, bias = random(*leading, d), random(p, d), random(p) if with_bias else None
    truth = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    plain = functional.linear(x, weight, bias)
    actual = frozen_linear(x, weight, bias)
    scale = truth.abs().max()
    assert actual.shape == truth.shape
    assert (actual - truth).abs().max() <= (plain - truth).abs().max() + 1e-6 * scale


def test_transposed_weight_gives_the_input_gradient(library):
    g, weight = random(2, 33, 48), random(48, 20)
    torch.testing.assert_close(frozen_linear(g, weight.t()), g @ weight)


def test_input_that_is_not_contiguous(library):
    x, weight = random(20, 33).t(), random(12, 20)
    torch.testing.assert_close(frozen_linear(x, weight), x.contiguous() @ weight.t())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_take_torchs_own_product(library, dtype):
    x, weight = random(4, 6).to(dtype), random(5, 6).to(dtype)
    assert torch.equal(frozen_linear(x, weight), functional.linear(x, weight))


def test_small_products_take_torchs_own(monkeypatch):
    monkeypatch.setattr(frozen, "_by_onednn", lambda *_: pytest.fail("too small to pay"))
    frozen_linear(random(4, 8), random(8, 8))


@pytest.mark.parametrize("problem", ["missing", "wrong", "of another shape", "refused"])
def test_an_operator_that_is_not_as_expected_is_not_used(monkeypatch, problem):
    def replacement(x, weight, bias):
        if problem == "missing":
            return torch.ops.mkldnn._there_is_no_such_operator(x, weight, bias)
        if problem == "refused":
            raise RuntimeError("unsupported")
        y = functional.linear(x, weight, bias)
        return y * 1.001 if problem == "wrong" else y[None]

    monkeypatch.setattr(frozen, "_by_onednn", replacement)
    assert onednn_speedup.__wrapped__(1) == 0.0


class Adapted(nn.Module):
    """A frozen layer on both sides of one that trains."""

    def __init__(self):
        super().__init__()
        self.below, self.trained, self.above = nn.Linear(6, 7), nn.Linear(7, 8, bias=False), nn.Linear(8, 3)
        self.below.requires_grad_(False)
        self.above.requires_grad_(False)

    def forward(self, x):
        return self.above(torch.tanh(self.trained(torch.tanh(self.below(x)))))


def test_gradients_through_frozen_layers_are_those_of_single_samples(library):
    torch.manual_seed(0)
    model = Adapted()
    x = torch.randn(5, 4, 6)
    truth = []
    exact = Adapted().double()
    exact.load_state_dict(model.state_dict())
    for row in x.double():
        loss = exact(row[None]).square().mean()
        truth.append(torch.autograd.grad(loss, exact.trained.weight)[0].flatten())
    grads = PerSampleGradients(model)
    found = [path.name for path in grads.paths if isinstance(path, FrozenLinearPath)]
    assert found == (["below", "above"] if library == "onednn" else [])
    actual = grads.backward(model(x).square().mean(dim=(1, 2))).materialize()
    torch.testing.assert_close(actual.double(), torch.stack(truth), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("library", ["onednn"], indirect=True)
def test_input_gradients_may_be_differentiated_again(library):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).requires_grad_(False)
    model.append(nn.Linear(1, 1))
    x = torch.randn(3, 4, requires_grad=True)

    def penalty():
        (g,) = torch.autograd.grad(model[:3](x).sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)[0]

    expected = penalty()
    PerSampleGradients(model)
    torch.testing.assert_close(penalty(), expected)


@pytest.mark.parametrize("library", ["onednn"], indirect=True)
def test_detach_gives_frozen_layers_their_own_forward_back(library):
    model = Adapted()
    grads = PerSampleGradients(model)
    assert "forward" in model.below.__dict__
    grads.detach()
    assert "forward" not in model.below.__dict__


@needs_onednn
def test_speedup_is_measured():
    assert onednn_speedup.__wrapped__(torch.get_num_threads()) > 0
