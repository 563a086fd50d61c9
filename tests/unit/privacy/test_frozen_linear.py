"""Frozen layers by the faster library: seen through by gradients."""

import pytest
import torch
from torch import nn

from securetune.privacy.per_sample import PerSampleGradients
from securetune.privacy.per_sample.frozen import FrozenLinearPath
from securetune_kernels import products


@pytest.fixture(params=["own", "onednn"])
def library(request, monkeypatch):
    """Take torch's own products, or oneDNN's for any size."""
    is_onednn = request.param == "onednn"
    if is_onednn and products.onednn_speedup(torch.get_num_threads()) == 0:
        pytest.skip("this build of torch has no oneDNN operator")
    monkeypatch.setattr(products, "prefers_onednn", lambda: is_onednn)
    monkeypatch.setattr(products, "_WORTHWHILE", 1)
    return request.param


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
