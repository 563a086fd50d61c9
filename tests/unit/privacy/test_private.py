import copy
import json

import pytest
import torch

from securetune.errors import PrivacyError
from securetune.privacy.accounting import epsilon_spent
from securetune.privacy.adaptive_clipping import AdaptiveClipping
from securetune.privacy.clipping import NormalizedClipping, PerLayerClipping
from securetune.privacy.ledger import read_ledger
from securetune.privacy.noise import NoiseSource
from securetune.privacy.sampling import PoissonSampler, TruncatedPoissonSampler
from securetune.privacy.units import UserSampler
from tests.private_runs import (
    KEY,
    NO_CLIP,
    D,
    N,
    NoNoise,
    losses_of,
    private_run,
    records,
    tiny_net,
    train,
)

pytestmark = pytest.mark.usefixtures("calibrated_once")


@pytest.mark.parametrize("make_optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
def test_without_clipping_and_noise_it_is_the_plain_loop(tmp_path, make_optimizer):
    model = tiny_net()
    plain = copy.deepcopy(model)
    features = torch.stack([feature for feature, _ in records()])
    labels = torch.tensor([label for _, label in records()])
    optimizer = make_optimizer(plain.parameters(), lr=0.1, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for _ in range(3):
        losses_of(plain, (features, labels)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    optimizer = make_optimizer(model.parameters(), lr=0.1, weight_decay=0.01)
    private = private_run(
        tmp_path, model, optimizer, sample_rate=1.0, max_grad_norm=NO_CLIP, expected_batch_size=N,
        noise=NoNoise(), target_epsilon=50.0,
    )  # fmt: skip
    train(private, model, scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("micro_batch_size", [1, 4, 100])
def test_step_is_the_clipped_sum_over_the_sample_for_any_micro_batch_size(tmp_path, micro_batch_size, passes):
    model, data, clip = tiny_net(), records(), 0.3
    drawn = PoissonSampler(N, 0.5, KEY).draw(0)
    expected = [torch.zeros_like(p) for p in model.parameters()]
    for index in drawn:
        feature, label = data[index]
        loss = losses_of(model, (feature[None], torch.tensor([label])))[0]
        grads = torch.autograd.grad(loss, list(model.parameters()))
        norm = torch.cat([grad.flatten() for grad in grads]).norm()
        for total, grad in zip(expected, grads, strict=True):
            total += grad * min(1.0, clip / float(norm))
    before = [p.detach().clone() for p in model.parameters()]
    private = private_run(
        tmp_path, model, torch.optim.SGD(model.parameters(), lr=1.0), steps=1, max_grad_norm=clip,
        sample_rate=None, sampler=PoissonSampler(N, 0.5, KEY), noise=NoNoise(), passes=passes,
    )  # fmt: skip
    train(private, model, micro_batch_size=micro_batch_size)
    for old, new, total in zip(before, model.parameters(), expected, strict=True):
        torch.testing.assert_close(old - new, total / 6, rtol=1e-6, atol=1e-9)
    assert 0 < len(drawn) < N


def test_epsilon_is_that_of_the_charged_steps_and_within_the_target(tmp_path):
    model = tiny_net()
    private = private_run(tmp_path, model)
    assert private.epsilon == 0.0
    train(private, model)
    assert private.epsilon == pytest.approx(epsilon_spent(private.plan.noise_multiplier, 0.5, 3, 1e-5))
    assert 0 < private.epsilon <= 8.0
    assert read_ledger(tmp_path / "ledger.jsonl").steps_charged == 3


def test_fixed_keys_report_no_epsilon(tmp_path):
    assert private_run(tmp_path, noise=NoiseSource(KEY)).epsilon is None


def test_empty_sample_is_noised_charged_and_moves_the_model(tmp_path):
    model = tiny_net()
    before = model[0].weight.detach().clone()
    private = private_run(tmp_path, model, data=records(1), sample_rate=1e-9, delta=1e-12, steps=2)
    sizes = []
    for batches in private.steps(micro_batch_size=4):
        sizes.append(len(list(batches)))
        private.step()
    assert sizes == [0, 0]
    assert private.ledger.steps_charged == 2
    assert not torch.equal(before, model[0].weight)


def test_step_is_on_disk_before_the_model_moves(tmp_path):
    model = tiny_net()
    charged = []

    class Watching(torch.optim.SGD):
        def step(self, closure=None):
            charged.append(read_ledger(tmp_path / "ledger.jsonl").steps_charged)
            super().step()

    train(private_run(tmp_path, model, Watching(model.parameters(), lr=0.1)), model)
    assert charged == [1, 2, 3]


def test_killed_run_goes_on_with_the_steps_that_are_left(tmp_path):
    model = tiny_net()
    private = private_run(tmp_path, model)
    for batches in private.steps(micro_batch_size=4):
        for batch in batches:
            private.backward(losses_of(model, batch))
        private.step()
        saved = json.loads(json.dumps(private.state_dict()))
        break
    private.close()  # as the end of the process does
    resumed = private_run(tmp_path, model)
    resumed.load_state_dict(saved)
    assert resumed.remaining_steps == 2
    train(resumed, model)
    assert resumed.ledger.steps_charged == 3
    with pytest.raises(PrivacyError, match="all 3 planned steps are charged"):
        private_run(tmp_path, model)


def test_checkpoint_that_the_ledger_has_not_paid_for_is_refused(tmp_path):
    with pytest.raises(PrivacyError, match="lost or shortened"):
        private_run(tmp_path).load_state_dict({"steps_charged": 2, "writers": [], "clipping": {}})


def test_ledger_of_another_kind_of_clipping_is_refused(tmp_path):
    private_run(tmp_path, max_grad_norm=NormalizedClipping(1.0)).close()
    with pytest.raises(PrivacyError, match="clipping: 'normalized' in the ledger, 'flat' now"):
        private_run(tmp_path, max_grad_norm=1.0)  # of the same sensitivity


def test_checkpoint_of_another_run_is_refused(tmp_path):
    """Its steps would be missing, although this ledger holds as many of its own."""
    states = []
    for _ in range(2):
        (tmp_path / "ledger.jsonl").unlink(missing_ok=True)  # lost, and the run is started again
        model = tiny_net()
        private = private_run(tmp_path, model)
        for batches in private.steps(micro_batch_size=4):
            for batch in batches:
                private.backward(losses_of(model, batch))
            private.step()
            states.append(json.loads(json.dumps(private.state_dict())))
            break
        private.close()
    resumed = private_run(tmp_path, model)
    with pytest.raises(PrivacyError, match="ledger of another run"):
        resumed.load_state_dict(states[0])
    resumed.load_state_dict(states[1])


@pytest.mark.parametrize("noise", [None, NoiseSource(KEY)], ids=["secret", "fixed for a test"])
def test_dropout_masks_do_not_follow_from_a_known_seed(tmp_path, noise):
    private = private_run(tmp_path, noise=noise)
    torch.manual_seed(7)
    next(private.steps(micro_batch_size=4))
    assert (torch.initial_seed() == 7) == (noise is not None)


def test_stopping_early_charges_the_whole_plan(tmp_path):
    private = private_run(tmp_path)
    private.stop_early()
    assert private.epsilon == pytest.approx(private.plan.epsilon)


def test_users_are_sampled_and_clipped_as_one(tmp_path):
    model, data, clip = tiny_net(), records(), 0.3
    users = [f"user{index // 4}" for index in range(N)]
    expected = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    for user in range(3):
        batch = torch.utils.data.default_collate(data[4 * user : 4 * user + 4])
        grads = torch.autograd.grad(losses_of(model, batch).sum(), list(model.parameters()))
        grad = torch.cat([g.flatten() for g in grads])
        expected += grad * min(1.0, clip / float(grad.norm()))
    private = private_run(
        tmp_path,
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        data,
        steps=1,
        max_grad_norm=clip,
        expected_batch_size=1,
        noise=NoNoise(),
        target_epsilon=50.0,
        sampler=UserSampler(users, PoissonSampler(3, 1.0, KEY), max_records_per_user=4, key=KEY),
    )
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    sizes = []
    for batches in private.steps(micro_batch_size=3):
        for batch in batches:
            sizes.append(len(batch[1]))
            private.backward(losses_of(model, batch))
        private.step()
    assert sizes == [4, 4, 4]
    moved = before - torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-8)
    assert private.ledger.state.header.unit == "user"


def test_each_step_takes_a_sample_of_its_own(tmp_path):
    sampler = PoissonSampler(N, 0.5, KEY)
    private = private_run(tmp_path, data=list(range(N)), sampler=sampler)
    drawn = []
    for batches in private.steps(micro_batch_size=N, collate_fn=list):
        drawn.append(next(batches, []))
        private.backward(private.grads.model(torch.ones(len(drawn[-1]), D, dtype=torch.float64)).sum(dim=1))
        private.step()
    assert drawn == [sampler.draw(step) for step in range(3)]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("unit", ["record", "user"])
def test_two_runs_with_one_sampler_share_no_sample(tmp_path, unit):
    sampler, drawn = PoissonSampler(N, 0.5, KEY), []
    for run in range(2):
        given = sampler
        if unit == "user":
            given = UserSampler([str(index) for index in range(N)], sampler, max_records_per_user=1)
        private = private_run(tmp_path, data=list(range(N)), sampler=given, ledger=tmp_path / f"{run}.jsonl")
        for batches in private.steps(micro_batch_size=N, collate_fn=list):
            drawn.append(next(batches, []))
            private.backward(
                private.grads.model(torch.ones(len(drawn[-1]), D, dtype=torch.float64)).sum(dim=1)
            )
            private.step()
    assert drawn == [sampler.draw(step) for step in range(6)]


def test_truncated_sampling_and_other_clippings_reach_the_ledger(tmp_path):
    private = private_run(
        tmp_path, sampler=TruncatedPoissonSampler(N, 0.5, 8), max_grad_norm=PerLayerClipping(2.0)
    )
    header = private.ledger.state.header
    assert (header.sampler, header.num_records, header.max_batch_size) == ("truncated Poisson", N, 8)
    assert header.max_grad_norm == pytest.approx(2.0)


def test_adaptive_thresholds_are_resumed(tmp_path):
    def adaptive():
        return AdaptiveClipping(1.0, count_noise_multiplier=5.0, expected_batch_size=6)

    model = tiny_net()
    private = private_run(tmp_path, model, max_grad_norm=adaptive(), steps=2)
    for batches in private.steps(micro_batch_size=4):
        for batch in batches:
            private.backward(losses_of(model, batch))
        private.step()
        break
    thresholds = private.clipping.thresholds
    assert thresholds != {"all": 1.0}
    private.close()
    resumed = private_run(tmp_path, model, max_grad_norm=adaptive(), steps=2)
    resumed.load_state_dict(private.state_dict())
    assert resumed.clipping.thresholds == thresholds


def test_epochs_become_expected_passes(tmp_path):
    assert private_run(tmp_path, steps=None, epochs=3, sample_rate=0.1).plan.spec.steps == 30


def test_public_gradient_is_added_without_noise_or_clipping(tmp_path):
    model = tiny_net()
    public = (torch.randn(2, D, dtype=torch.float64) * 50, torch.tensor([0, 1]))
    expected = torch.autograd.grad(losses_of(model, public).mean(), model[0].weight)[0]
    before = model[0].weight.detach().clone()
    private = private_run(
        tmp_path, model, torch.optim.SGD(model.parameters(), lr=1.0), steps=1, data=records(1),
        sample_rate=1e-9, delta=1e-12, noise=NoNoise(),
    )  # fmt: skip
    for _ in private.steps(micro_batch_size=4):
        private.public_backward(losses_of(model, public), weight=0.5)
        private.step()
    torch.testing.assert_close(before - model[0].weight, expected, rtol=1e-6, atol=1e-9)


def test_after_the_run_the_model_is_an_ordinary_one(tmp_path):
    model = tiny_net()
    train(private_run(tmp_path, model), model)
    losses_of(model, torch.utils.data.default_collate(records(2))).mean().backward()
    assert model[0].weight.grad is not None
