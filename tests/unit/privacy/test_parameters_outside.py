"""Parameters that a loss trains beside those of the private model: their gradients have no noise."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from securetune.errors import PrivacyError
from securetune.privacy.per_sample import PerSampleGradients
from tests.per_sample_oracle import assert_exact, one_by_one, randn, square_losses
from tests.private_runs import K, losses_of, private_run, tiny_net

pytestmark = pytest.mark.usefixtures("calibrated_once")


def train_beside(tmp_path, model, losses_of, optimizer):
    private = private_run(tmp_path, model, sample_rate=1.0, target_epsilon=50.0, steps=1)
    for batches in private.steps(micro_batch_size=4):
        for batch in batches:
            private.backward(losses_of(batch))
        private.step()
        optimizer.step()


def test_head_with_an_optimizer_of_its_own(tmp_path):
    model, head = tiny_net(), nn.Linear(K, K).double()
    before = head.weight.detach().clone()

    def losses(batch):
        return functional.cross_entropy(head(model(batch[0])), batch[1], reduction="none")

    with pytest.raises(PrivacyError, match=r"train a tensor of shape \[3(, 3)?\] that is outside"):
        train_beside(tmp_path, model, losses, torch.optim.SGD(head.parameters(), lr=1.0))
    assert torch.equal(head.weight, before)
    assert head.weight.grad is None


@pytest.mark.parametrize("shape", [(), (1,), (K,)])
@pytest.mark.parametrize("kind", [nn.Parameter, lambda value: value.requires_grad_(True)])
def test_temperature_that_is_learnt_in_the_loss(tmp_path, kind, shape):
    model, temperature = tiny_net(), kind(torch.ones(shape, dtype=torch.float64))

    def losses(batch):
        return functional.cross_entropy(model(batch[0]) * temperature, batch[1], reduction="none")

    with pytest.raises(PrivacyError, match=r"outside of the model.*ModuleDict"):
        train_beside(tmp_path, model, losses, torch.optim.SGD([temperature], lr=1.0))
    assert temperature.grad is None


@pytest.mark.parametrize("how", ["frozen", "without gradients"])
def test_teacher_that_is_not_trained_is_allowed(tmp_path, how):
    model, teacher = tiny_net(), tiny_net()
    teacher.requires_grad_(how != "frozen")

    def losses(batch):
        with torch.set_grad_enabled(how == "frozen"):
            target = teacher(batch[0])
        return (model(batch[0]) - target).square().sum(dim=1) + losses_of(model, batch)

    train_beside(tmp_path, model, losses, torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0))


@pytest.mark.parametrize("reentrant", [True, False])
def test_inputs_that_require_gradients_are_allowed(reentrant):
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()

    def losses(model, x):
        hidden = checkpoint(model[0], x.clone().requires_grad_(True), use_reentrant=reentrant)
        return square_losses(model[1:], hidden)

    truth = one_by_one(model, randn(4, 6))  # torch.autograd.grad can't see through the reentrant kind
    assert_exact(model, randn(4, 6), losses, expected=truth)


def test_layer_that_joined_the_model_is_named():
    model = nn.Sequential(nn.Linear(6, 6)).double()
    engine = PerSampleGradients(model)
    model.append(nn.Linear(6, 3).double())
    with pytest.raises(PrivacyError, match=r"1\.weight joined the model after PerSampleGradients was made"):
        engine.backward(square_losses(model, randn(4, 6)))
    assert model[1].weight.grad is None
