"""The fused end of a private step against noise followed by the optimizer."""

import pytest
import torch

from securetune.errors import PrivacyError
from securetune.privacy.clipping import FlatClipping
from securetune.privacy.fused_update import why_not_fused
from securetune.privacy.matrix_factorization import CorrelatedNoise
from securetune.privacy.noise import NoiseSource
from securetune.privacy.per_sample import PerSampleGradients
from securetune.privacy.step import PrivateStep
from tests.unit.privacy.test_step import Uncharged, losses_of, make_grads

KEY = bytes(range(32))


def run(make_optimizer, *, fused, steps=3, with_public=False, schedule=False, device="cpu"):
    grads = make_grads()
    grads.detach()
    grads = PerSampleGradients(grads.model.to(device))
    optimizer = make_optimizer([grads.flat_params])
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) if schedule else None
    private = PrivateStep(
        grads,
        optimizer,
        clipping=FlatClipping(0.7),
        noise_multiplier=1.3,
        expected_batch_size=10,
        noise=NoiseSource(KEY),
        ledger=Uncharged(1.3),
        fused=fused,
    )
    generator = torch.Generator().manual_seed(1)

    def some_losses(rows):
        return losses_of(grads, torch.randn(rows, 6, generator=generator).to(device))

    for _ in range(steps):
        private.accumulate(some_losses(5))
        if with_public:
            private.accumulate_public(some_losses(2), weight=0.5)
        private.finish()
        assert private.summed.equal(torch.zeros_like(private.summed))
        assert grads.flat_params.grad is None
        if scheduler is not None:
            scheduler.step()
    return grads.flat_params.detach().clone(), optimizer


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1, betas=(0.8, 0.99)),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("with_public", [False, True])
@pytest.mark.filterwarnings("error:.*lr_scheduler")
def test_same_parameters_and_state_as_noise_and_optimizer(name, with_public):
    options = {"with_public": with_public, "schedule": True}
    found, optimizer = run(OPTIMIZERS[name], fused=True, **options)
    expected, plain = run(OPTIMIZERS[name], fused=False, **options)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    states, truth = optimizer.state_dict()["state"], plain.state_dict()["state"]
    for key, value in truth.get(0, {}).items():
        if value is not None:
            torch.testing.assert_close(states[0][key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_gpu_fuses_by_itself_with_the_same_result(name):
    found, _ = run(OPTIMIZERS[name], fused=None, device="cuda")
    expected, _ = run(OPTIMIZERS[name], fused=False)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)


def test_the_optimizers_saved_state_continues_either_way():
    found, optimizer = run(OPTIMIZERS["adamw"], fused=True, steps=2)
    other = OPTIMIZERS["adamw"]([torch.nn.Parameter(found.clone())])
    other.load_state_dict(optimizer.state_dict())
    other.param_groups[0]["params"][0].grad = torch.ones_like(found)
    other.step()
    assert other.state[other.param_groups[0]["params"][0]]["step"] == 3


class WithHook(torch.optim.AdamW):
    pass


def with_hook(parameters):
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: None)
    return optimizer


@pytest.mark.parametrize(
    ("make_optimizer", "reason"),
    [
        (lambda p: torch.optim.Adam(p), "Adam is neither"),
        (lambda p: WithHook(p), "WithHook is neither"),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "amsgrad=True"),
        (lambda p: torch.optim.SGD(p, maximize=True), "maximize=True"),
        (lambda p: torch.optim.SGD(p, momentum=0.9, dampening=0.5), "dampening=0.5"),
        (with_hook, "hooks on its step"),
    ],
)
def test_what_cannot_be_fused_is_refused_by_name(make_optimizer, reason):
    with pytest.raises(PrivacyError, match=rf"no fused update: .*{reason}"):
        run(make_optimizer, fused=True)
    run(make_optimizer, fused=None)  # and by itself it is not fused


def test_separate_parameters_and_correlated_noise_are_refused():
    grads = make_grads()
    parameters = [place.parameter for place in grads.parameters]
    options = {
        "clipping": FlatClipping(0.7), "noise_multiplier": 1.3, "expected_batch_size": 10,
        "ledger": Uncharged(1.3), "fused": True,
    }  # fmt: skip
    with pytest.raises(PrivacyError, match="does not own"):
        PrivateStep(grads, torch.optim.SGD(parameters, lr=0.1), noise=NoiseSource(), **options)
    noise = NoiseSource()
    with pytest.raises(PrivacyError, match="does not own"):
        PrivateStep(grads, torch.optim.SGD(parameters, lr=0.1), noise=noise, **options)
    unfused = {**options, "clipping": FlatClipping(0.7), "fused": False}
    PrivateStep(grads, torch.optim.SGD(parameters, lr=0.1), noise=noise, **unfused)  # it is still unused
    correlated = object.__new__(CorrelatedNoise)
    assert "CorrelatedNoise is not independent" in str(
        why_not_fused(grads, torch.optim.SGD([grads.flat_params], lr=0.1), correlated)
    )
