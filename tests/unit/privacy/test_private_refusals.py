"""Uses of ``make_private`` that are refused, before anything is paid or lost."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from securetune.errors import PrivacyError
from securetune.privacy.participation import EpochOrderSampler
from securetune.privacy.sampling import PoissonSampler
from securetune.privacy.units import UserSampler
from tests.private_runs import K, N, losses_of, private_run, records, tiny_net

pytestmark = pytest.mark.usefixtures("calibrated_once")


def test_ledger_in_a_folder_that_is_missing_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(PrivacyError, match=r"ledger .*/a/b/l must be .* Make the folder .*/a/b first"):
        private_run(tmp_path, ledger=tmp_path / "a" / "b" / "l")
    with pytest.raises(PrivacyError, match=r"must be a file .* Name a file in it"):
        private_run(tmp_path, ledger=tmp_path)


class Checkpointed(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=True)


@pytest.mark.parametrize("is_hidden", [False, True], ids=["in the graph", "reentrant checkpointing"])
def test_layer_that_joins_later_is_refused_though_another_optimizer_trains_it(tmp_path, is_hidden):
    model = tiny_net()
    private = private_run(tmp_path, model, sample_rate=1.0, target_epsilon=50.0)
    batches = next(private.steps(micro_batch_size=N))
    late = nn.Linear(K, K).double()
    model.append(Checkpointed(late) if is_hidden else late)
    before = late.weight.detach().clone()
    other = torch.optim.SGD(late.parameters(), lr=1.0)
    message = r"3\.(layer\.)?weight joined the model after"
    losses = losses_of(model, next(batches))
    if is_hidden:
        private.backward(losses)
        with pytest.raises(PrivacyError, match=message):
            private.step()
    else:
        with pytest.raises(PrivacyError, match=message):
            private.backward(losses)
    other.step()
    assert torch.equal(late.weight, before)
    assert private.ledger.steps_charged == 0


def test_check_of_one_example_is_refused(tmp_path):
    model = tiny_net()
    private = private_run(tmp_path, model)
    with pytest.raises(ValueError, match=r"two examples or more.*got 1"):
        private.check(lambda some: losses_of(model, torch.utils.data.default_collate(some)), records(1))


def test_record_differentiated_twice_is_refused(tmp_path):
    model = tiny_net()
    private = private_run(tmp_path, model, sample_rate=1.0, target_epsilon=50.0)
    batch = next(next(private.steps(micro_batch_size=4)))
    private.backward(losses_of(model, batch))
    with pytest.raises(PrivacyError, match="once for each"):
        private.backward(losses_of(model, batch))


@pytest.mark.parametrize("unit", ["user", "record"])
def test_collating_that_sorts_the_records_of_users_is_refused(tmp_path, unit):
    """A user's records would be clipped with another's; where each record is a unit the order is free."""
    users = UserSampler("AB" * 6, PoissonSampler(2, 1.0), max_records_per_user=3)
    how = {"sampler": users, "expected_batch_size": 1} if unit == "user" else {"sample_rate": 1.0}
    model = tiny_net()
    private = private_run(tmp_path, model, target_epsilon=50.0, delta=1e-6, **how)

    def collate(rows):
        rows.sort(key=lambda row: float(row[0][0]))
        return torch.utils.data.default_collate(rows)

    batches = next(private.steps(micro_batch_size=N, collate_fn=collate))
    if unit == "record":
        private.backward(losses_of(model, next(batches)))
        return
    with pytest.raises(PrivacyError, match=r"collate_fn sorted the records.*enforce_sorted=False"):
        next(batches)


def test_micro_batch_left_out_is_refused(tmp_path):
    model = tiny_net()
    private = private_run(tmp_path, model, sample_rate=1.0, target_epsilon=50.0)
    batches = next(private.steps(micro_batch_size=4))
    next(batches)
    with pytest.raises(PrivacyError, match="left out"):
        next(batches)
    with pytest.raises(PrivacyError, match="3 micro-batches"):
        private.step()
    assert private.ledger.steps_charged == 0


def out_of_memory(losses, unit_ids):
    raise RuntimeError("out of memory")


def test_micro_batch_whose_backward_fails_is_not_left_out(tmp_path, monkeypatch):
    """Loops catch errors such as a lack of memory and go on; whether one comes depends on the records."""
    model = tiny_net()
    private = private_run(tmp_path, model, sample_rate=1.0, target_epsilon=50.0)
    batches = next(private.steps(micro_batch_size=4))
    batch = next(batches)
    losses = losses_of(model, batch)
    with monkeypatch.context() as patch:
        patch.setattr(private.grads, "backward", out_of_memory)
        with pytest.raises(RuntimeError, match="out of memory"):
            private.backward(losses)
    with pytest.raises(PrivacyError, match="leave records out"):
        next(batches)
    with pytest.raises(PrivacyError, match="leave records out"):
        private.step()
    with pytest.raises(PrivacyError, match="leave records out"):  # part of it may be in the sum
        private.backward(losses_of(model, batch))
    assert private.ledger.steps_charged == 0


def test_step_that_is_not_finished_is_refused(tmp_path):
    steps = private_run(tmp_path).steps(micro_batch_size=4)
    next(steps)
    with pytest.raises(PrivacyError, match="not finished"):
        next(steps)


def test_step_without_a_sample_is_refused(tmp_path):
    private = private_run(tmp_path)
    with pytest.raises(PrivacyError, match="no step to finish"):
        private.step()
    assert private.ledger.steps_charged == 0


@pytest.mark.parametrize("reduce", [torch.mean, lambda losses: losses[1:]])
def test_losses_of_another_number_than_records_are_refused(tmp_path, reduce):
    model = tiny_net()
    private = private_run(tmp_path, model, sample_rate=1.0, target_epsilon=50.0)
    batch = next(next(private.steps(micro_batch_size=4)))
    with pytest.raises(PrivacyError, match="one value for each of the 4 records"):
        private.backward(reduce(losses_of(model, batch)))


def test_check_finds_a_divisor_counted_over_the_batch(tmp_path):
    model = tiny_net()
    private = private_run(tmp_path, model)
    collate = torch.utils.data.default_collate
    examples = records(4)
    assert private.check(lambda rows: losses_of(model, collate(rows)), examples) < 1e-9
    with pytest.raises(PrivacyError, match="batch-mates"):
        private.check(lambda rows: losses_of(model, collate(rows)) / len(rows), examples)


def test_refused_arguments_leave_the_model_as_it_was(tmp_path):
    model = tiny_net()
    half = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(PrivacyError, match="must own exactly the trainable parameters") as caught:
        private_run(tmp_path, model, half)
    losses_of(model, torch.utils.data.default_collate(records(2))).mean().backward()
    assert model[0].weight.grad is not None
    private_run(tmp_path, model).close()  # the ledger was given up too
    assert caught.value.__traceback__ is not None  # it kept alive what the failed call had made


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_rate": None}, "either sample_rate or sampler"),
        ({"epochs": 2}, "either steps or epochs"),
        ({"epochs": 0, "steps": None}, "epochs must be a finite number > 0, got 0"),
        ({"epochs": -1.5, "steps": None}, "epochs must be a finite number > 0, got -1.5"),
        ({"steps": 2.5}, "steps must be a whole number from 1 to 1000000, got 2.5"),
        ({"expected_batch_size": 6.5}, "expected_batch_size must be a whole number >= 1, got 6.5"),
        ({"delta": 0.1}, "one over the planned number of records, expected_batch_size / sample_rate = 12"),
        ({"sampler": PoissonSampler(N + 1, 0.5)}, "draws from 13 records, but 12"),
        (
            {"sampler": UserSampler("ABCDEF", PoissonSampler(6, 0.5), max_records_per_user=1)},
            "draws from 6 records, but 12",
        ),
        (
            {"sampler": EpochOrderSampler(N, 4, steps=8)},
            r"EpochOrderSampler\(.*fixed order.*Give sample_rate or a random sampler, or build a PrivateStep",
        ),
        (
            {"sampler": UserSampler("AB" * 6, EpochOrderSampler(2, 4, steps=8), max_records_per_user=1)},
            r"UserSampler\(.*fixed order.*Give sample_rate or a random sampler, or build a PrivateStep",
        ),
    ],
)
def test_wrong_arguments_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        private_run(tmp_path, **options)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (iter(records()), "list_iterator"),
        (torch.utils.data.DataLoader(records()), "DataLoader"),
        ([], "an empty list"),
        ({"train": records(), "test": records(3)}, "dict"),
    ],
    ids=["iterator", "loader", "empty", "splits"],
)
def test_records_that_no_sample_can_be_drawn_from_are_refused(tmp_path, data, kind):
    with pytest.raises(ValueError, match=f"records must have a length and rows by number.*got {kind}:"):
        private_run(tmp_path, data=data)
