import pytest
import torch
from torch import nn

from securetune.errors import PrivacyError
from securetune.privacy.saved_tensors import SavedTensors
from tests.private_runs import D, K, losses_of, private_run, tiny_net, train

pytestmark = pytest.mark.usefixtures("calibrated_once")


def assign_data(kept, mean):
    kept.data = 0.9 * kept + 0.1 * mean


WRITES = {
    "in place": lambda kept, mean: kept.lerp_(mean, 0.1),
    "data": lambda kept, mean: kept.data.mul_(0.9).add_(mean, alpha=0.1),
    "data assigned": assign_data,
    "numpy": lambda kept, mean: kept.detach().numpy().__iadd__(mean.numpy()),
}


class Averaging(nn.Module):
    """Keeps a running mean of its inputs, as normalisation layers and codebooks of some libraries do."""

    def __init__(self, where, how):
        super().__init__()
        self.how, self.linear = how, nn.Linear(D, K).double()
        mean = torch.zeros(D, dtype=torch.float64)
        if where.endswith("parameter"):
            self.mean = nn.Parameter(mean, requires_grad=where.startswith("trainable"))
        else:
            self.register_buffer("mean", mean, persistent=where != "not saved")

    def forward(self, x):
        mean = x.detach().mean(dim=0)
        if self.training and self.how == "assigned":
            self.mean = 0.9 * self.mean + 0.1 * mean
        elif self.training:
            with torch.no_grad():
                WRITES[self.how](self.mean, mean)
        return self.linear(x + self.mean)


@pytest.mark.parametrize("how", WRITES)
@pytest.mark.parametrize("where", ["buffer", "frozen parameter"])
def test_trap_30_statistics_of_private_records_that_are_saved_are_refused(tmp_path, where, how):
    model = nn.Sequential(Averaging(where, how))
    parameters = [p for p in model.parameters() if p.requires_grad]
    private = private_run(
        tmp_path, model, torch.optim.SGD(parameters, lr=0.1), sample_rate=1.0, target_epsilon=50.0
    )
    with pytest.raises(PrivacyError, match=r"0\.mean changed"):
        train(private, model)
    assert private.ledger.steps_charged == 0


def test_trap_30_buffer_that_is_replaced_is_refused(tmp_path):
    model = nn.Sequential(Averaging("buffer", "assigned"))
    private = private_run(tmp_path, model, sample_rate=1.0, target_epsilon=50.0)
    with pytest.raises(PrivacyError, match=r"0\.mean changed"):
        train(private, model)


class StartsFromFirstBatch(nn.Module):
    """Sets its shift so that the first batch has mean zero, as the normalisation of flows does."""

    def __init__(self):
        super().__init__()
        self.shift, self.has_started = nn.Parameter(torch.zeros(D).double()), False

    def forward(self, x):
        if not self.has_started:
            self.shift.data.copy_(-x.detach().mean(dim=0))
            self.has_started = True
        return x + self.shift


@pytest.mark.parametrize("is_started_before", [False, True])
def test_trainable_parameter_that_starts_from_private_records_is_refused(tmp_path, is_started_before):
    model = nn.Sequential(StartsFromFirstBatch(), tiny_net())
    if is_started_before:
        model(torch.randn(4, D).double())
    private = private_run(tmp_path, model, sample_rate=1.0, target_epsilon=50.0)
    if is_started_before:
        train(private, model)
        assert private.ledger.steps_charged == 3
        return
    with pytest.raises(PrivacyError, match=r"0\.shift changed.*see public records before"):
        train(private, model)
    assert private.ledger.steps_charged == 0


@pytest.mark.parametrize("where", ["buffer", "not saved"])
def test_buffers_that_stay_or_are_not_saved_are_allowed(tmp_path, where):
    model = nn.Sequential(Averaging(where, "in place")).train(where == "not saved")
    private = private_run(tmp_path, model)
    model.load_state_dict(model.state_dict())  # of a checkpoint: between two steps a buffer may change
    train(private, model)
    assert private.ledger.steps_charged == 3


def test_parameters_may_move_before_the_first_forward_pass_of_a_step(tmp_path):
    """Schedule-free optimizers swap averages and iterates when they are put into training mode."""
    model = tiny_net()
    private = private_run(tmp_path, model, sample_rate=1.0, target_epsilon=50.0)
    for batches in private.steps(micro_batch_size=4):
        with torch.no_grad():
            model[0].weight.mul_(0.5)
        for batch in batches:
            private.backward(losses_of(model, batch))
        private.step()
    assert private.ledger.steps_charged == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.bool, torch.complex64])
@pytest.mark.parametrize("shape", [(), (3,), (4, 6), (5, 3, 2)])
@pytest.mark.parametrize("is_strided", [False, True])
def test_any_entry_that_changes_is_seen(shape, dtype, is_strided):
    model = nn.Module()
    kept = torch.zeros(shape, dtype=dtype)
    if is_strided and kept.ndim:
        kept = kept.mT if kept.ndim > 1 else kept[1:]
    model.register_buffer("kept", kept)
    saved = SavedTensors(model)
    saved.refuse_written()
    for index in range(model.kept.numel()):
        place = [int(i) for i in torch.unravel_index(torch.tensor(index), model.kept.shape)]
        model.kept.data[tuple(place)] = 1
        with pytest.raises(PrivacyError, match="kept changed in this step"):
            saved.refuse_written()
        model.kept.data[tuple(place)] = 0
    saved.refuse_written()


def test_tensors_that_are_no_plain_memory_are_known_by_version():
    model = nn.Module()
    model.register_buffer("kept", torch.eye(3).to_sparse())
    model.register_buffer("elsewhere", torch.zeros(3, device="meta"))
    saved = SavedTensors(model)
    saved.refuse_written()
    model.kept.mul_(2)
    with pytest.raises(PrivacyError, match="kept changed"):
        saved.refuse_written()


def test_buffer_that_was_made_in_inference_mode_is_known_by_its_values():
    model = nn.Module()
    with torch.inference_mode():
        model.register_buffer("kept", torch.zeros(3))
    saved = SavedTensors(model)
    saved.refuse_written()
    with torch.inference_mode():
        model.kept.add_(1)
    with pytest.raises(PrivacyError, match="kept changed"):
        saved.refuse_written()
