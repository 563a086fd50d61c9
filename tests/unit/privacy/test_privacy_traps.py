"""The 36 known traps of differentially private training: where each is tested, and those tested here.

Paths are under ``tests/unit/``, without ``test_`` and ``.py``; a star stands for the rest of a name. *Here*
is ``test_trap_<number>_*`` of this file, *step* that of privacy/privacy_traps_of_the_step.

====  ===========================================  ==========================================================
trap  what goes wrong elsewhere                    tests
====  ===========================================  ==========================================================
1     a layer's norm or sum is wrong               privacy/per_sample_layers (all), per_sample_conv,
                                                   per_sample_moe, per_sample_models::TestInFull, TestAdapters
2     one sample moves the sum by more than C      here; privacy/clipping::test_one_unit_moves_the_sum
3     tied weights are counted without their cross here; per_sample_layers::TestEmbedding::test_tied*
      term
4     a module runs twice in one forward           here; per_sample_layers::TestDense::test_used_twice*
5     a parameter trains unclipped, or not at all  here; per_sample_refusals (all)
6     position ids given once for all samples      here; per_sample_layers::TestEmbedding::test_repeated*
7     gradient checkpointing                       here; per_sample_models::TestCheckpointing
8     torch.compile                                per_sample_models::TestCompile
9     dropout masks differ between passes          here; privacy/per_sample::test_dropout*,
                                                   per_sample_two_passes; training/dropout
10    a divisor counted over the batch             here; training/trainer::test_loss_with_a_divisor*,
                                                   test_loss_that_depends_on_the_padding*
11    a sample without supervised tokens           here; models/task::test_a_batch_without_supervised*
12    mean or sum over the batch                   here
13    batch statistics, in-batch negatives,        here; per_sample_moe::TestRefusals::test_balance_loss
      balance loss
14    noise of a wrong size, or twice              step (one process); privacy/step::test_noise_has*,
                                                   test_*_noise_is_not_charged*.
                                                   Several processes: with distributed training
15    noise depends on the number of processes     privacy/noise::test_a_slice_equals*. The rest: with
                                                   distributed training
16    processes with equal seeds draw the same     privacy/sampling::test_trap_16*, noise::test_new_sources*.
                                                   The rest: with distributed training
17    noise is used twice                          step; privacy/noise::test_no_value_repeats*,
                                                   test_steps_may_repeat*; privacy/step::test_trap_17*;
                                                   private::test_two_runs_with_one_sampler*
18    an empty batch is skipped                    step; privacy/sampling::test_empty_samples_happen
19    steps taken are not steps counted            step; privacy/ledger::test_trap_19*
20    micro-batches change the sum                 step; per_sample_models::test_any_micro_batch_size*
21    adaptive thresholds under accumulation       privacy/adaptive_clipping::test_micro_batches_do_not*,
                                                   test_update_divides_by*
22    the divisor depends on the data              step; privacy/sampling::test_trap_22*,
                                                   ledger::test_trap_22*
23    a record twice, or none at the end           privacy/sampling::test_trap_23*
24    inclusion is not what the accountant assumes privacy/sampling::test_trap_24*
25    noise or sums in bfloat16                    step; privacy/step::test_bfloat16_sums_do_not_stall
26    a sample that is not finite                  step; privacy/step::test_non_finite*
27    Gram products overflow in float16            step
28    the normal's tail is cut                     privacy/noise::test_tails_are_not_cut*, test_tail_mass*,
                                                   test_distribution_is_normal
29    groups are accounted as one threshold        step; privacy/clipping::test_sensitivity_is_the_root*
30    un-noised numbers leave by a side            step; private::test_trap_30*; training/
                                                   trainer::test_nothing_unnoised*,
                                                   training/stopping::test_noisy_score*, config/rules
31    a second optimizer or parameter group        step; privacy/step::test_parameter_group_added*;
                                                   training/trainer::test_parameters_that_join*
32    frozen parameters move                       step
33    accountant and calibration                   privacy/accounting::test_trap_33*
34    resuming                                     privacy/sampling::test_trap_34*, odometer::test_trap_34*,
                                                   private::test_checkpoint*, training/finetune
35    adapters that do not train                   step; privacy/per_sample::TestSelfCheck
36    autotuning runs add into the output          kernels/clip_and_accumulate::test_same_call* (no kernel is
                                                   autotuned or uses atomics; test memory is poisoned)
====  ===========================================  ==========================================================
"""

import math

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torch.nn import functional

from securetune.errors import PrivacyError
from securetune.privacy.clipping import AutomaticClipping, FlatClipping, NormalizedClipping, PerLayerClipping
from securetune.privacy.per_sample import PerSampleGradients
from tests.per_sample_oracle import (
    assert_exact,
    next_token_losses,
    random_parameters,
    relative_error,
    square_losses,
)
from tests.small_private import (
    CLIP,
    DIVISOR,
    VOCAB,
    Scale,
    clipped_sum,
    private,
    small_losses,
    small_model,
    some_ids,
)


def tiny_gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=8, n_layer=2, n_head=2, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    return random_parameters(transformers.GPT2LMHeadModel(config).double(), std=0.1)


@settings(max_examples=60)
@given(
    data=st.data(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    kind=st.sampled_from([FlatClipping, PerLayerClipping, AutomaticClipping, NormalizedClipping]),
    tied=st.booleans(),
    norm=st.sampled_from([nn.LayerNorm, nn.RMSNorm]),
    batch=st.integers(1, 5),
    tokens=st.integers(2, 12),
    log_clip=st.floats(-3, 2),
    log_scale=st.floats(-2, 2),
    seed=st.integers(0, 2**16),
)
def test_trap_02_removing_a_sample_moves_the_sum_by_at_most_the_sensitivity(
    data, dtype, kind, tied, norm, batch, tokens, log_clip, log_scale, seed
):
    model = small_model(seed=seed, tied=tied, norm=norm, dtype=dtype)
    ids = some_ids(batch, tokens, seed=seed)
    if data.draw(st.booleans()):  # adversarial: the same token throughout, so that a table's rows add up
        ids[0] = ids[0, 0]
    removed = data.draw(st.integers(0, batch - 1))
    kept = [row for row in range(batch) if row != removed]
    engine = PerSampleGradients(model)

    def contributions(rows: list[int]) -> torch.Tensor:
        clipping = kind(10.0**log_clip)
        return clipped_sum(engine, 10**log_scale * small_losses(model, ids[rows]), clipping)

    clipping = kind(10.0**log_clip)
    clipping.assign(engine.parameter_names())
    moved = (contributions(list(range(batch))) - contributions(kept)).norm()
    # A row of a matrix product may round otherwise in a smaller matrix: 2^-8 of each kept sample in bfloat16.
    rounding = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype] * len(kept)
    assert float(moved) <= clipping.sensitivity * (1 + rounding)


def test_trap_02_the_bound_is_reached():
    model = small_model(tied=True)
    engine = PerSampleGradients(model)
    moved = clipped_sum(engine, 100 * small_losses(model, some_ids(1)), FlatClipping(CLIP)).norm()
    assert float(moved) == pytest.approx(CLIP, rel=1e-6)


# fastDP: the head's norm overwrites the table's, so that the clipped gradient is up to thousands of C long
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_trap_03_tied_table_that_dominates_is_clipped(scale):
    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(VOCAB, 4), nn.Linear(4, VOCAB, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(1e-3 * self.table(ids)) + scale * self.table(ids).sum(dim=-1, keepdim=True)

    engine = PerSampleGradients(random_parameters(Toy().double()))
    for row in some_ids(5).split(1):
        length = clipped_sum(engine, square_losses(engine.model, row), FlatClipping(CLIP)).norm()
        assert float(length) <= CLIP * (1 + 1e-9)


def test_trap_03_the_two_uses_of_a_tied_table_add_up_before_they_are_measured():
    class Toy(nn.Module):  # both uses give the table the same gradient
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(VOCAB, 4), nn.Linear(4, VOCAB, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            looked_up = self.table(ids)
            scores = self.head(torch.ones_like(looked_up)).gather(2, ids.unsqueeze(-1)).squeeze(-1)
            return looked_up.sum(dim=-1) + scores

    model = random_parameters(Toy().double())
    engine = PerSampleGradients(model)
    ids = some_ids(1)
    expected = 2 * torch.bincount(ids[0], minlength=VOCAB).double().norm() * 2  # 4 entries in each row
    found = engine.backward(model(ids).sum(dim=1)).squared_norms().sqrt()
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    length = clipped_sum(engine, model(ids).sum(dim=1), FlatClipping(CLIP)).norm()
    assert float(length) == pytest.approx(CLIP, rel=1e-6)


def test_trap_04_module_run_twice_is_exact():
    assert_exact(small_model(tied=False), some_ids(), small_losses)  # its hidden layer runs twice


# FlashDP: the embeddings of GPT-2 train on raw gradients
def test_trap_05_every_trainable_parameter_of_gpt2_is_clipped_and_noised():
    model = tiny_gpt2()
    engine = PerSampleGradients(model)
    assert len(engine.parameters) == len(list(model.parameters()))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    step = private(engine, sigma=50.0, clipping=FlatClipping(1e-6))
    step.accumulate(next_token_losses(model, some_ids()))
    step.finish()
    # what is left is noise alone, of the same size in every part of every parameter
    expected = 50 * 1e-6 / DIVISOR
    for new, old in zip(model.parameters(), before, strict=True):
        for part in (new - old).detach().flatten().split(64):
            low, high = stats.chi2.interval(1 - 1e-7, len(part))
            assert low <= float((part / expected).square().sum()) <= high


def test_trap_05_functional_use_is_refused_by_name():
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x):
            return self.linear(x) @ self.linear.weight.square()

    model = Functional()
    engine = PerSampleGradients(model)
    with pytest.raises(PrivacyError, match=r"linear\.weight"):
        engine.backward(square_losses(model, torch.randn(3, 6)))
    assert model.linear.weight.grad is None


# Opacus: GPT-2 fails because its position ids are one row for the whole batch
def test_trap_06_position_ids_of_gpt2():
    assert_exact(tiny_gpt2(), some_ids(3, 9), next_token_losses)


# Opacus: non-reentrant checkpointing, which transformers uses by default, fails
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_trap_07_default_checkpointing_of_transformers():
    def with_checkpoints(model: nn.Module) -> nn.Module:
        model.gradient_checkpointing_enable()
        return model.train()

    assert_exact(tiny_gpt2(), some_ids(3, 9), next_token_losses, wrap=with_checkpoints)


def test_trap_09_dropout_has_one_mask_for_output_and_gradient():
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.dropout = nn.Linear(6, 8), nn.Linear(8, 3), nn.Dropout(0.5)

        def forward(self, x):
            return self.second(self.dropout(self.first(x)))

    model = random_parameters(Dropped().double()).train()
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    parameters = list(model.parameters())
    torch.manual_seed(7)
    losses = square_losses(model, x)
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    expected = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    engine = PerSampleGradients(model)
    torch.manual_seed(7)
    assert relative_error(engine.backward(square_losses(model, x)).materialize(), expected) < 1e-12


def test_trap_09_layer_that_runs_twice_uses_its_mask_again_or_is_refused():
    class Inside(Scale):
        def forward(self, x):
            return functional.dropout(x * self.weight, 0.5)

    class Anew(Scale):
        def forward(self, x):
            return x * self.weight * torch.normal(x, 0.1)

    model, x = nn.Sequential(Inside(6)), torch.randn(3, 6)
    torch.manual_seed(7)
    losses = square_losses(model, x)
    rows = [torch.autograd.grad(loss, model[0].weight, retain_graph=True)[0] for loss in losses]
    engine = PerSampleGradients(model)
    torch.manual_seed(7)
    found = engine.backward(square_losses(model, x)).materialize()
    torch.testing.assert_close(found, torch.stack(rows))

    model = nn.Sequential(Anew(6))
    engine = PerSampleGradients(model)
    with pytest.raises(PrivacyError, match="random"):
        engine.backward(square_losses(model, torch.randn(3, 6)))


def test_trap_10_divisor_counted_over_the_batch_is_found():
    model = small_model(tied=True)
    engine = PerSampleGradients(model)
    ids = some_ids()
    lengths = torch.tensor([2, 5, 3, 4])

    def losses_of(rows: list[int], *, over_batch: bool) -> torch.Tensor:
        logits = model(ids[rows])[:, :-1]
        each = functional.cross_entropy(logits.transpose(1, 2), ids[rows][:, 1:], reduction="none")
        is_kept = torch.arange(5) < lengths[rows][:, None]
        count = is_kept.sum() if over_batch else is_kept.sum(dim=1)
        return (each * is_kept).sum(dim=1) / count

    assert engine.check(lambda rows: losses_of(rows, over_batch=False), 4) < 1e-9
    with pytest.raises(PrivacyError, match="batch-mates"):
        engine.check(lambda rows: losses_of(rows, over_batch=True), 4)


def test_trap_11_sample_without_supervised_tokens_adds_zero():
    model = small_model(tied=True)
    engine = PerSampleGradients(model)
    labels = some_ids()[:, 1:].clone()
    labels[0] = -100

    def losses(rows: torch.Tensor) -> torch.Tensor:
        logits = model(some_ids()[rows])[:, :-1].transpose(1, 2)
        each = functional.cross_entropy(logits, labels[rows], ignore_index=-100, reduction="none")
        return each.sum(dim=1) / (labels[rows] != -100).sum(dim=1).clamp(min=1)

    found = engine.backward(losses(torch.arange(4))).materialize()
    assert not found[0].any()
    assert found[1:].norm(dim=1).min() > 0
    with_it = clipped_sum(engine, losses(torch.arange(4)), FlatClipping(CLIP))
    without = clipped_sum(engine, losses(torch.arange(1, 4)), FlatClipping(CLIP))
    torch.testing.assert_close(with_it, without)


@pytest.mark.parametrize("reduce", [torch.mean, torch.sum])
def test_trap_12_mean_or_sum_over_the_batch_is_refused(reduce):
    model = small_model(tied=True)
    engine = PerSampleGradients(model)
    for loss in (reduce(small_losses(model, some_ids())), reduce(small_losses(model, some_ids()))[None]):
        with pytest.raises(PrivacyError, match="reduction='none'"):
            engine.backward(loss)
    # within a sample both are allowed, and the number of batch-mates changes neither
    alone = engine.backward(small_losses(model, some_ids()[:1])).materialize()
    together = engine.backward(small_losses(model, some_ids())).materialize()
    torch.testing.assert_close(alone, together[:1])


class TestTrap13:
    def test_batch_normalisation(self):
        with pytest.raises(PrivacyError, match="BatchNorm1d"):
            PerSampleGradients(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)))

    @pytest.mark.parametrize("first", ["whole", "one sample", "a zero loss", "not finite"])
    def test_batch_statistics_of_an_own_layer(self, first):
        class Centered(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(6, 6)

            def forward(self, x):
                return self.linear(x) - self.linear(x).mean(dim=0, keepdim=True)

        model = random_parameters(Centered().double())
        engine = PerSampleGradients(model)
        x = torch.randn(4, 6, dtype=torch.float64)
        weight, sample = torch.ones(4), x.clone()
        if first == "one sample":
            engine.backward(square_losses(model, x[:1]))
        if first == "a zero loss":
            weight[0] = 0.0
        if first == "not finite":  # proves nothing, so the next batch must
            sample[0] = math.nan
            engine.backward(square_losses(model, sample))
        with pytest.raises(PrivacyError, match="coupled"):
            engine.backward(weight * square_losses(model, x))

    def test_statistics_without_a_gradient_are_found_by_the_check(self):
        class Centered(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(6, 6)

            def forward(self, x):
                return self.linear(x) - self.linear(x).mean(dim=0, keepdim=True).detach()

        model = random_parameters(Centered().double())
        x = torch.randn(4, 6, dtype=torch.float64)
        with pytest.raises(PrivacyError, match="batch-mates"):
            PerSampleGradients(model).check(lambda rows: square_losses(model, x[rows]), 4)

    def test_coupling_only_in_training_mode(self):
        class InTraining(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(6, 6)

            def forward(self, x):
                y = self.linear(x)
                return y - y.mean(dim=0, keepdim=True) if self.training else y

        model = random_parameters(InTraining().double()).eval()
        engine = PerSampleGradients(model)
        x = torch.randn(4, 6, dtype=torch.float64)
        engine.backward(square_losses(model, x))
        model.train()
        with pytest.raises(PrivacyError, match="coupled"):
            engine.backward(square_losses(model, x))

    def test_in_batch_negatives(self):
        model = random_parameters(nn.Sequential(nn.Linear(6, 4)).double())
        x = torch.randn(4, 6, dtype=torch.float64)
        engine = PerSampleGradients(model)
        features = functional.normalize(model(x), dim=1)
        losses = functional.cross_entropy(features @ features.T, torch.arange(4), reduction="none")
        with pytest.raises(PrivacyError, match="coupled"):
            engine.backward(losses)
