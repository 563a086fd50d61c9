"""The private step: sensitivity, noise added once, the ledger before the noise, public divisor."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from scipy import stats
from torch import nn

from securetune.errors import PrivacyError
from securetune.privacy.clipping import FlatClipping
from securetune.privacy.ledger import Ledger, LedgerHeader, read_ledger
from securetune.privacy.matrix_factorization import CorrelatedNoise, MatrixMechanism, WholeRunCharge
from securetune.privacy.noise import NoiseSource
from securetune.privacy.participation import Participation
from securetune.privacy.per_sample import PerSampleGradients
from securetune.privacy.step import OrdinaryStep, PrivateStep

CLIP = 0.7
SIGMA = 1.3
DIVISOR = 10


def make_grads(width: int = 6) -> PerSampleGradients:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width))
    model.requires_grad_(False)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    return PerSampleGradients(adapted)


def losses_of(grads: PerSampleGradients, x: torch.Tensor) -> torch.Tensor:
    return grads.model(x).square().flatten(1).sum(dim=1)


@pytest.fixture
def ledger(tmp_path):
    header = LedgerHeader(
        accountant="test",
        noise_multiplier=SIGMA,
        sample_rate=0.1,
        max_grad_norm=CLIP,
        delta=1e-5,
        expected_batch_size=DIVISOR,
        planned_steps=3000,
        reportable_epsilon=True,
    )
    with Ledger(tmp_path / "ledger.jsonl", header) as opened:
        yield opened


class Uncharged:
    """Stands in for a ledger where nothing is released for good."""

    def __init__(self, noise_multiplier: float) -> None:
        self.state = SimpleNamespace(
            header=SimpleNamespace(noise_multiplier=noise_multiplier, reportable_epsilon=False)
        )

    def charge(self) -> None:
        pass


def private(
    grads, ledger, *, optimizer=None, noise_multiplier=SIGMA, max_grad_norm=CLIP, noise=None
) -> PrivateStep:
    ledger = ledger or Uncharged(noise_multiplier)
    return PrivateStep(
        grads,
        optimizer or torch.optim.SGD([grads.flat_params], lr=1.0),
        clipping=FlatClipping(max_grad_norm),
        noise_multiplier=noise_multiplier,
        expected_batch_size=DIVISOR,
        noise=noise or NoiseSource(),
        ledger=ledger,
    )


@settings(max_examples=25)
@given(
    scale=st.floats(1e-3, 1e4), batch=st.integers(2, 5), removed=st.integers(0, 4), seed=st.integers(0, 2**16)
)
def test_one_sample_moves_the_sum_by_at_most_the_clip_norm(scale, batch, removed, seed):
    torch.manual_seed(seed)
    x = scale * torch.randn(batch, 3, 6)
    grads = make_grads()
    keep = [row for row in range(batch) if row != removed % batch]
    sums = []
    for rows in (list(range(batch)), keep):
        step = private(grads, None)  # accumulating needs no ledger
        step.accumulate(losses_of(grads, x[rows]))
        sums.append(step.summed.clone())
    assert (sums[0] - sums[1]).norm() <= CLIP * (1 + 1e-4)


@pytest.mark.parametrize("split", [[4], [1, 3], [2, 2], [1, 1, 1, 1]])
def test_any_micro_batch_size_gives_the_same_sum(split):
    grads = make_grads()
    x = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(1))
    whole, parts = private(grads, None), private(grads, None)
    whole.accumulate(losses_of(grads, x))
    for piece in x.split(split):
        parts.accumulate(losses_of(grads, piece))
    torch.testing.assert_close(parts.summed, whole.summed)


def test_update_is_the_noisy_clipped_mean():
    grads = make_grads()
    x = torch.randn(4, 3, 6)
    rows = grads.backward(losses_of(grads, x)).materialize().double()
    clipped = (rows * (CLIP / rows.norm(dim=1, keepdim=True)).clamp(max=1.0)).sum(dim=0)
    before = grads.flat_params.detach().clone()
    step = private(grads, None, noise_multiplier=0.0)
    norms = step.accumulate(losses_of(grads, x))
    step.finish()
    torch.testing.assert_close(norms, rows.norm(dim=1).float())
    torch.testing.assert_close(before - grads.flat_params.detach(), (clipped / DIVISOR).float())


def test_noise_has_the_claimed_deviation_once_per_step_whatever_was_drawn(ledger):
    # lr 1, so a parameter's change times the divisor is the noise of that step
    grads = make_grads()
    step = private(grads, ledger)
    samples = []
    for number in range(400):
        before = grads.flat_params.detach().clone()
        if number % 2:  # an empty batch must be noised as well; a zero loss has a zero gradient
            step.accumulate(losses_of(grads, torch.zeros(3, 2, 6)) * 0.0)
        step.finish()
        samples.append((before - grads.flat_params.detach()) * DIVISOR)
    noise = torch.stack(samples).double() / (SIGMA * CLIP)
    chi_square = float(noise.square().sum())
    low, high = stats.chi2.interval(1 - 1e-9, noise.numel())
    assert low < chi_square < high
    assert ledger.steps_charged == 400
    assert len(noise.unique(dim=0)) == 400  # no step's noise twice; one float32 alone may fall on another's


def test_step_is_on_disk_before_its_noise_exists(ledger):
    grads = make_grads()
    seen: list[int] = []

    class Watching(NoiseSource):
        def normal(self, **options):
            seen.append(read_ledger(ledger.path).steps_charged)
            return super().normal(**options)

    step = private(grads, ledger)
    step._noise = Watching()
    step.finish()
    step.finish()
    assert seen == [1, 2]


def test_nothing_is_released_past_the_budget(tmp_path):
    header = LedgerHeader(
        accountant="test", noise_multiplier=SIGMA, sample_rate=0.1, max_grad_norm=CLIP, delta=1e-5,
        expected_batch_size=DIVISOR, planned_steps=1, reportable_epsilon=True,
    )  # fmt: skip
    grads = make_grads()
    with Ledger(tmp_path / "ledger.jsonl", header) as ledger:
        step = private(grads, ledger)
        step.finish()
        before = grads.flat_params.detach().clone()
        with pytest.raises(PrivacyError, match="all 1 planned steps are charged"):
            step.finish()
    assert torch.equal(before, grads.flat_params.detach())


def test_sample_of_a_step_that_an_error_stopped_is_not_released_again(ledger):
    """As where somebody interrupts a notebook in the optimizer, and runs the cell once more."""
    grads = make_grads()
    optimizer = torch.optim.SGD([grads.flat_params], lr=1.0)
    step = PrivateStep(
        grads, optimizer, clipping=FlatClipping(CLIP), noise_multiplier=SIGMA,
        expected_batch_size=DIVISOR, noise=NoiseSource(), ledger=ledger,
    )  # fmt: skip
    step.accumulate(losses_of(grads, torch.randn(3, 2, 6)))

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = optimizer.register_step_post_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        step.finish()
    hook.remove()
    released = grads.flat_params.detach().clone()
    with pytest.raises(PrivacyError, match=r"stopped a step after it was charged.*Start again"):
        step.finish()
    assert torch.equal(released, grads.flat_params.detach())
    assert ledger.steps_charged == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_sample_contributes_zero(bad):
    grads = make_grads()
    x = torch.randn(3, 2, 6)
    clean = private(grads, None)
    clean.accumulate(losses_of(grads, x[1:]))
    x[0, 0, 0] = bad
    step = private(grads, None)
    norms = step.accumulate(losses_of(grads, x))
    torch.testing.assert_close(step.summed, clean.summed)
    assert not norms[0].isfinite()


def test_bfloat16_sums_do_not_stall():
    # a bfloat16 running sum of 512 x 0.01 stops at 4.0
    grads = make_grads()
    step = private(grads, None, max_grad_norm=1e6)
    x = torch.randn(1, 2, 6)
    step.accumulate(losses_of(grads, x))
    one = step.summed.clone()
    for _ in range(511):
        step.accumulate(losses_of(grads, x))
    assert step.summed.dtype == torch.float32
    torch.testing.assert_close(step.summed, 512 * one, rtol=1e-4, atol=1e-5)


def test_ordinary_step_equals_a_plain_optimizer_step():
    grads, reference = make_grads(), make_grads()
    reference.detach()
    x = torch.randn(4, 3, 6)
    parameters = [p for p in reference.model.parameters() if p.requires_grad]
    plain = torch.optim.AdamW(parameters, lr=0.1)
    (losses_of(reference, x).sum() / DIVISOR).backward()
    plain.step()
    step = OrdinaryStep(grads, torch.optim.AdamW([grads.flat_params], lr=0.1), expected_batch_size=DIVISOR)
    step.accumulate(losses_of(grads, x))
    step.finish()
    expected = torch.cat([p.detach().flatten() for p in parameters])
    torch.testing.assert_close(grads.flat_params.detach(), expected)


def test_optimizer_of_other_parameters_is_refused(ledger):
    grads = make_grads()
    parameters = [p for p in grads.model.parameters() if p.requires_grad]
    with pytest.raises(PrivacyError, match=r"1 are missing .*lora_B"):
        private(grads, ledger, optimizer=torch.optim.SGD(parameters[:1], lr=0.1))
    stranger = nn.Parameter(torch.zeros(3))
    with pytest.raises(PrivacyError, match="1 are unknown to the per-sample gradients"):
        private(grads, ledger, optimizer=torch.optim.SGD([*parameters, stranger], lr=0.1))


def test_parameter_group_added_after_wrapping_is_refused(ledger):
    grads = make_grads()
    parameters = [p for p in grads.model.parameters() if p.requires_grad]
    step = private(grads, ledger, optimizer=torch.optim.SGD(parameters, lr=0.1))
    step.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    with pytest.raises(PrivacyError, match="1 are unknown"):
        step.finish()


def test_optimizer_over_the_parameters_or_over_the_flat_vector_is_the_same():
    results = []
    for flat in (True, False):
        grads = make_grads()
        x = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(3))
        parameters = [p for p in grads.model.parameters() if p.requires_grad]
        owned = [grads.flat_params] if flat else parameters
        step = private(grads, None, optimizer=torch.optim.AdamW(owned, lr=0.1), noise_multiplier=0.0)
        for _ in range(3):
            step.accumulate(losses_of(grads, x))
            step.finish()
        results.append(torch.cat([p.detach().flatten() for p in parameters]))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("change", [nn.Module.double, nn.Module.bfloat16, lambda model: replace_data(model)])
def test_model_that_is_moved_away_from_the_flat_vector_is_refused(ledger, change):
    """Else each step would be charged, and none would move the model."""
    grads = make_grads()
    step = private(grads, ledger, optimizer=torch.optim.SGD([grads.flat_params], lr=1.0))
    step.finish()
    change(grads.model)
    with pytest.raises(PrivacyError, match=r"moved or cast .* after flat_params was made"):
        step.finish()
    assert ledger.steps_charged == 1


def replace_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def test_ledger_of_another_noise_multiplier_is_refused(ledger):
    with pytest.raises(
        PrivacyError, match=r"charges steps of noise_multiplier 1\.3, the step would add noise of 1\.0"
    ):
        private(make_grads(), ledger, noise_multiplier=1.0)


class TestPublicGradient:
    def test_is_added_after_noise_and_division_and_never_clipped(self):
        grads = make_grads()
        private_x, public_x = torch.randn(4, 3, 6), 100 * torch.randn(2, 3, 6)
        expected = private(grads, None, noise_multiplier=0.0)
        expected.accumulate(losses_of(grads, private_x))
        clipped = expected.summed / DIVISOR
        public = grads.backward(losses_of(grads, public_x)).materialize().sum(dim=0) / 2
        before = grads.flat_params.detach().clone()
        step = private(grads, None, noise_multiplier=0.0)
        step.accumulate(losses_of(grads, private_x))
        step.accumulate_public(losses_of(grads, public_x), weight=0.5)
        step.finish()
        torch.testing.assert_close(
            before - grads.flat_params.detach(), clipped + public, rtol=1e-5, atol=1e-4
        )
        after = grads.flat_params.detach().clone()
        step.finish()  # it belongs to one step
        assert torch.equal(after, grads.flat_params.detach())

    def test_record_in_both_sets_is_refused(self):
        grads = make_grads()
        step = private(grads, None)
        step.accumulate(losses_of(grads, torch.randn(2, 3, 6)), unit_ids=["a", "b"])
        with pytest.raises(PrivacyError, match="1 records are private and public in one step, first 'b'"):
            step.accumulate_public(losses_of(grads, torch.randn(2, 3, 6)), record_ids=["b", "c"])


class TestUnits:
    def test_samples_of_a_unit_are_clipped_as_one(self):
        grads = make_grads()
        x = 10 * torch.randn(3, 3, 6)
        rows = grads.backward(losses_of(grads, x)).materialize().double()
        users = torch.stack([rows[0] + rows[2], rows[1]])
        expected = (users * (CLIP / users.norm(dim=1, keepdim=True)).clamp(max=1.0)).sum(dim=0)
        step = private(grads, None)
        norms = step.accumulate(losses_of(grads, x), unit_ids=["u", "v", "u"])
        torch.testing.assert_close(norms, users.norm(dim=1).float())
        torch.testing.assert_close(step.summed, expected.float())

    def test_unit_in_two_micro_batches_is_refused(self):
        grads = make_grads()
        step = private(grads, None)
        step.accumulate(losses_of(grads, torch.randn(2, 3, 6)), unit_ids=["u", "v"])
        with pytest.raises(PrivacyError, match="1 units are in two micro-batches of one step, first 'u'"):
            step.accumulate(losses_of(grads, torch.randn(1, 3, 6)), unit_ids=["u"])
        step.finish()
        step.accumulate(losses_of(grads, torch.randn(1, 3, 6)), unit_ids=["u"])  # the next step may have it


def test_negative_noise_multiplier_is_refused(ledger):
    with pytest.raises(PrivacyError, match=r"noise_multiplier must be >= 0, got -1\.0"):
        private(make_grads(), ledger, noise_multiplier=-1.0)


# what is charged is what is drawn


@pytest.fixture
def made(tmp_path):
    """A private step of 20 steps with the given noise and kind of charge, its ledger, and its mechanism."""
    mechanism = MatrixMechanism(
        participation=Participation(steps=20, max_participations=20, min_separation=1), bands=4
    )
    opened = []

    def make(noise, *, whole_run, reportable=True):
        header = LedgerHeader(
            accountant="test",
            noise_multiplier=SIGMA,
            sample_rate=1.0 if whole_run else 0.1,
            max_grad_norm=CLIP,
            delta=1e-5,
            expected_batch_size=DIVISOR,
            planned_steps=1 if whole_run else 20,
            reportable_epsilon=reportable,
            sampler="fixed order" if whole_run else "Poisson",
        )
        ledger = Ledger(tmp_path / f"{len(opened)}.jsonl", header)
        opened.append(ledger)
        return private(make_grads(), WholeRunCharge(ledger, mechanism) if whole_run else ledger, noise=noise)

    yield make, mechanism
    for ledger in opened:
        ledger.close()


def test_independent_noise_is_not_charged_as_one_mechanism(made):
    make, _ = made
    with pytest.raises(PrivacyError, match="noise is independent at each step, but the ledger charges for"):
        make(NoiseSource(), whole_run=True)


def test_correlated_noise_is_not_charged_as_sampled_steps(made):
    make, mechanism = made
    with pytest.raises(PrivacyError, match="ledger charges for independent at each step"):
        make(CorrelatedNoise(mechanism), whole_run=False)


def test_correlated_noise_of_another_mechanism_is_refused(made):
    make, mechanism = made
    other = MatrixMechanism(participation=mechanism.participation, bands=1)
    with pytest.raises(PrivacyError, match="bands=1"):
        make(CorrelatedNoise(other), whole_run=True)
    make(CorrelatedNoise(mechanism), whole_run=True).finish()


def test_noise_with_a_fixed_key_is_refused_where_epsilon_is_reported(made):
    make, mechanism = made
    for noise, whole_run in ((NoiseSource(bytes(32)), False), (CorrelatedNoise(mechanism, bytes(32)), True)):
        with pytest.raises(PrivacyError, match="fixed key"):
            make(noise, whole_run=whole_run)
        make(noise, whole_run=whole_run, reportable=False)


@pytest.mark.parametrize("whole_run", [False, True])
def test_trap_17_noise_of_one_run_is_refused_for_another(made, whole_run):
    make, mechanism = made
    noise = CorrelatedNoise(mechanism) if whole_run else NoiseSource()
    make(noise, whole_run=whole_run).finish()  # step 0 may repeat, for its shards
    with pytest.raises(PrivacyError, match="belongs to another run"):
        make(noise, whole_run=whole_run)


def test_new_noise_needs_a_new_charge(made):
    make, mechanism = made
    step = make(CorrelatedNoise(mechanism), whole_run=True)
    step.finish()
    with pytest.raises(PrivacyError, match="paid for another run"):
        private(make_grads(), step._ledger, noise=CorrelatedNoise(mechanism))
