"""The engine with its sums and norms in Triton: compiled on a GPU, else in the interpreter on a CPU."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from securetune.privacy.clipping import ROUNDING_EXCESS
from securetune.privacy.per_sample import PerSampleGradients
from securetune.privacy.per_sample.gradients import dense_squared_norms
from tests.per_sample_oracle import one_by_one, random_parameters, relative_error

VOCAB = 11


class Tied(nn.Module):
    """An embedding, a norm layer, a dense layer with bias, and an output layer, perhaps the table again."""

    def __init__(self, *, is_tied: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, 8)
        self.norm, self.dense = nn.RMSNorm(8), nn.Linear(8, 8)
        self.head = nn.Linear(8, VOCAB, bias=False)
        if is_tied:
            self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.dense(self.norm(self.table(ids)))))


def some_ids(device):
    return torch.randint(0, VOCAB, (4, 7), generator=torch.Generator().manual_seed(1)).to(device)


@pytest.fixture
def on_triton(monkeypatch, kernel_device):
    monkeypatch.setenv("SECURETUNE_BACKEND", "triton")
    return kernel_device


def assert_as_autograd(model, x, tolerance):
    truth = one_by_one(
        copy.deepcopy(model).double().cpu(), x.double().cpu() if x.is_floating_point() else x.cpu()
    )
    engine = PerSampleGradients(model)
    losses = (model(x) + 0.3).square().flatten(1).float().sum(dim=1)
    batch = engine.backward(losses)
    squared = batch.squared_norms()[:, 0].cpu()
    torch.testing.assert_close(squared.double(), truth.square().sum(1), rtol=2 * tolerance, atol=0.0)
    out = torch.zeros(engine.num_params, device=x.device)
    factors = torch.tensor([0.5, 0.0, 2.0, 1.0])
    batch.accumulate(factors[:, None].to(x.device), out)
    assert relative_error(out.cpu(), factors.double() @ truth) <= tolerance


@pytest.mark.parametrize("is_tied", [False, True])
def test_model_trained_in_full(is_tied, on_triton):
    model = random_parameters(Tied(is_tied=is_tied)).to(on_triton)
    assert_as_autograd(model, some_ids(on_triton), tolerance=1e-5)


def test_adapters(on_triton):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 5))
    model = get_peft_model(model, LoraConfig(r=3, lora_alpha=7, target_modules=["0", "2"]))
    x = torch.randn(4, 6, 9, generator=torch.Generator().manual_seed(1)).to(on_triton)
    assert_as_autograd(random_parameters(model).to(on_triton), x, tolerance=1e-5)


@pytest.mark.parametrize(
    ("layers", "size"),
    [
        ([nn.Linear(9, 12), nn.LayerNorm(12), nn.Linear(12, 5)], (4, 6, 9)),
        ([nn.LayerNorm((6, 9)), nn.Linear(9, 5)], (4, 6, 9)),
        ([nn.Conv1d(9, 8, 3), nn.GroupNorm(2, 8), nn.Conv1d(8, 5, 1)], (4, 9, 7)),
    ],
)
def test_norm_layers_and_convolutions(layers, size, on_triton):
    torch.manual_seed(0)
    model = random_parameters(nn.Sequential(*copy.deepcopy(layers))).to(on_triton)
    x = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(on_triton)
    assert_as_autograd(model, x, tolerance=1e-5)


# in bfloat16 the layers' own rounding is in the gradients, which the truth in float64 does not have
def test_model_in_bfloat16(on_triton):
    torch.manual_seed(0)
    model = random_parameters(nn.Sequential(nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 5))).bfloat16()
    x = torch.randn(4, 6, 9, generator=torch.Generator().manual_seed(1)).bfloat16().to(on_triton)
    assert_as_autograd(model.to(on_triton), x, tolerance=0.03)


# [p, d] with few and with many positions: by Gram matrices, and by the product
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    left=st.floats(-9, 0), size=st.sampled_from([(40, 40), (3, 5)]), pairs=st.integers(1, 6),
    scale=st.floats(-3, 3), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_norms_of_positions_that_cancel_are_upper_bounds(left, size, pairs, scale, seed, on_triton):
    generator = torch.Generator().manual_seed(seed)

    def randn(features):
        return torch.randn(4, pairs, features, generator=generator, dtype=torch.float64)

    a, g, rest = randn(size[1]), 10**scale * randn(size[0]), 10**left * randn(size[0])
    a, g = torch.cat([a, a], dim=1).float(), torch.cat([g, rest - g], dim=1).float()
    expected = (g.double().transpose(1, 2) @ a.double()).flatten(1).norm(dim=1)
    found = dense_squared_norms(a.to(on_triton), g.to(on_triton)).sqrt().double().cpu()
    assert (found >= expected * (1 - ROUNDING_EXCESS)).all()
