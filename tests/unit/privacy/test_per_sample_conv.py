"""Per-sample gradients of convolutional models against autograd on one sample at a time, in float64."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from transformers import ViTConfig, ViTForImageClassification

from securetune.errors import PrivacyError
from securetune.privacy.per_sample import PerSampleGradients
from securetune.privacy.per_sample.conv import ChannelNormPath, ConvPath
from securetune.privacy.per_sample.functional import FunctionalPath
from tests.per_sample_oracle import randn


def square_losses(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """One loss per sample that depends on every output in another way."""
    y = model(x).reshape(len(x), -1)
    return (y * torch.linspace(-1.0, 1.0, y.shape[1], dtype=y.dtype) + 0.1 * y.square()).sum(dim=1)


def oracle(model: nn.Module, x: torch.Tensor, *, losses=square_losses) -> torch.Tensor:
    """One sample at a time, through the model's own forwards."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for row in range(len(x)):
        grads = torch.autograd.grad(losses(model, x[row : row + 1]).sum(), parameters)
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    return torch.stack(rows)


def assert_exact(
    model: nn.Module, x: torch.Tensor, kind: type | None = None, *, losses=square_losses
) -> None:
    """Gradients, norms of samples and of joint units, and weighted sums equal the oracle's."""
    expected = oracle(copy.deepcopy(model), x, losses=losses)
    engine = PerSampleGradients(model)
    if kind is not None:
        assert kind in {type(path) for path in engine.paths}
    grads = engine.backward(losses(model, x))
    scale = float(expected.abs().max())
    torch.testing.assert_close(grads.materialize(), expected, rtol=1e-10, atol=1e-12 * scale)
    torch.testing.assert_close(grads.squared_norms()[:, 0], expected.square().sum(1), rtol=1e-10, atol=0.0)
    factors = torch.linspace(0.0, 2.0, len(x), dtype=torch.float64)[:, None]
    out = torch.zeros(engine.num_params, dtype=torch.float64)
    grads.accumulate(factors, out)
    torch.testing.assert_close(out, (factors * expected).sum(0), rtol=1e-10, atol=1e-11 * scale)
    unit_ids = ["same" if row in (0, len(x) - 1) else row for row in range(len(x))]
    joint = torch.cat([(expected[0] + expected[-1])[None] if len(x) > 1 else expected, expected[1:-1]])
    norms = engine.backward(losses(model, x), unit_ids=unit_ids).squared_norms()[:, 0]
    torch.testing.assert_close(norms, joint.square().sum(1), rtol=1e-10, atol=0.0)


def seeded(build, **options) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(build(**options)).double()


class TestConvolutions:
    @settings(max_examples=40)
    @given(
        dims=st.sampled_from([1, 2, 3]),
        batch=st.sampled_from([1, 2, 3]),
        kernel=st.integers(1, 3),
        stride=st.integers(1, 3),
        dilation=st.integers(1, 2),
        padding=st.sampled_from([0, 1, 2, "same", "valid"]),
        mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
        groups=st.sampled_from([1, 2]),
        bias=st.booleans(),
    )
    def test_every_option(self, dims, batch, kernel, stride, dilation, padding, mode, groups, bias):
        build = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        stride = 1 if padding == "same" else stride
        model = seeded(
            build, in_channels=4, out_channels=6, kernel_size=kernel, stride=stride, dilation=dilation,
            padding=padding, padding_mode=mode, groups=groups, bias=bias,
        )  # fmt: skip
        assert_exact(model, randn(batch, 4, *(6, 5, 7)[:dims]), ConvPath)

    @pytest.mark.parametrize("groups", [1, 2])
    def test_sides_of_different_size(self, groups):
        model = seeded(
            nn.Conv2d, in_channels=4, out_channels=6, kernel_size=(3, 2), stride=(1, 2), dilation=(2, 1),
            padding=(0, 3), groups=groups,
        )  # fmt: skip
        assert_exact(model, randn(3, 4, 8, 5), ConvPath)

    def test_depthwise(self):
        model = seeded(nn.Conv1d, in_channels=5, out_channels=10, kernel_size=3, groups=5)
        assert_exact(model, randn(2, 5, 9), ConvPath)

    @pytest.mark.parametrize("trained", ["weight", "bias"])
    def test_frozen_part(self, trained):
        model = seeded(nn.Conv2d, in_channels=2, out_channels=3, kernel_size=2)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith(trained))
        assert_exact(model, randn(3, 2, 4, 4), ConvPath)

    @pytest.mark.parametrize("groups", [1, 2])
    def test_several_frames_of_a_sample(self, groups):
        class Frames(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(2, 4, 2, groups=groups)
                self.norm = nn.GroupNorm(2, 4)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.norm(self.conv(x.flatten(0, 1))).unflatten(0, x.shape[:2])

        assert_exact(Frames().double(), randn(3, 4, 2, 5, 5), ConvPath)

    def test_used_twice_in_one_forward(self):
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv1d(3, 3, 3, padding="same")

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.conv(torch.tanh(self.conv(x)))

        assert_exact(Twice().double(), randn(3, 3, 7), ConvPath)

    def test_input_without_a_batch_dimension_is_refused(self):
        model = seeded(nn.Conv2d, in_channels=2, out_channels=2, kernel_size=1)
        PerSampleGradients(model)
        with pytest.raises(PrivacyError, match=r"layer 0 \(Conv2d\).*\(2, 3, 3\).*4 dimensions"):
            model(randn(2, 3, 3))

    @pytest.mark.parametrize("build", [nn.ConvTranspose1d, nn.ConvTranspose2d])
    def test_transposed(self, build):
        model = seeded(build, in_channels=3, out_channels=2, kernel_size=3, stride=2)
        x = randn(3, 3, 4) if build is nn.ConvTranspose1d else randn(3, 3, 4, 4)
        assert_exact(model, x, FunctionalPath)

    @pytest.mark.parametrize("bias", [True, False])
    def test_weight_computed_from_others(self, bias):
        conv = nn.Conv1d(3, 4, 3, bias=bias).double()
        model = nn.Sequential(parametrizations.weight_norm(conv), nn.Tanh())
        assert_exact(model, randn(3, 3, 6), FunctionalPath)


class TestChannelNorms:
    @pytest.mark.parametrize(
        ("groups", "shape"), [(1, (6,)), (2, (6,)), (1, (6, 5)), (6, (6, 5)), (2, (6, 4, 5)), (6, (6, 4, 5))]
    )
    def test_group_norm(self, groups, shape):
        model = nn.Sequential(nn.GroupNorm(groups, 6)).double()
        model[0].weight.data = randn(6)
        assert_exact(model, randn(3, *shape), ChannelNormPath)

    @pytest.mark.parametrize(
        ("build", "shape"),
        [(nn.InstanceNorm1d, (3, 7)), (nn.InstanceNorm2d, (3, 4, 5)), (nn.InstanceNorm3d, (3, 2, 3, 4))],
    )
    def test_instance_norm(self, build, shape):
        model = nn.Sequential(build(3, affine=True)).double()
        model[0].weight.data = randn(3)
        assert_exact(model, randn(4, *shape), ChannelNormPath)

    def test_running_statistics_are_refused(self):
        model = nn.Sequential(nn.Conv1d(2, 2, 1), nn.InstanceNorm1d(2, track_running_stats=True))
        with pytest.raises(PrivacyError, match=r"layer 1 is a InstanceNorm1d with track_running_stats"):
            PerSampleGradients(model)

    def test_instance_norm_without_a_batch_dimension_is_refused(self):
        model = nn.Sequential(nn.InstanceNorm1d(3, affine=True)).double()
        PerSampleGradients(model)
        with pytest.raises(PrivacyError, match=r"\(3, 7\).*3 dimensions"):
            model(randn(3, 7))


class ConvNet(nn.Module):
    """A small residual network, with every kind of layer that the paths know."""

    def __init__(self, *, use_checkpoints: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.use_checkpoints = use_checkpoints
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.block = nn.Sequential(
            nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8),
            nn.InstanceNorm2d(8, affine=True), nn.SiLU(), nn.Conv2d(8, 8, 1),
        )  # fmt: skip
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        inner = checkpoint(self.block, x, use_reentrant=False) if self.use_checkpoints else self.block(x)
        return self.head((x + inner).mean(dim=(2, 3)))


@pytest.mark.parametrize("use_checkpoints", [False, True])
def test_small_conv_net(use_checkpoints):
    assert_exact(ConvNet(use_checkpoints=use_checkpoints).double(), randn(4, 3, 9, 9), ConvPath)


def test_norms_by_group():
    model, x = ConvNet().double(), randn(3, 3, 9, 9)
    rows = oracle(copy.deepcopy(model), x)
    engine = PerSampleGradients(model)
    group_of = [place.index % 3 for place in engine.parameters]
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for place, group in zip(engine.parameters, group_of, strict=True):
        expected[:, group] += rows[:, place.start : place.stop].square().sum(1)
    norms = engine.backward(square_losses(model, x)).squared_norms(group_of, 3)
    torch.testing.assert_close(norms, expected, rtol=1e-10, atol=0.0)


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_stays_near_the_float64_truth(autocast):
    model, x = ConvNet(), randn(3, 3, 9, 9)
    expected = oracle(copy.deepcopy(model).double(), x)

    def losses(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return square_losses(model, x.float() if autocast else x.bfloat16())

    engine = PerSampleGradients(model if autocast else model.bfloat16())
    grads = engine.backward(losses(model, x)).materialize()
    assert grads.dtype == torch.float32
    # bfloat16 keeps eight bits, and the errors of the layers add up
    assert (grads - expected).norm() < 3e-2 * expected.norm()


def test_vision_transformer_in_full():
    """The patch convolution, the class token and the position table are trained, too."""
    config = ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8,
        patch_size=4, num_labels=3, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = ViTForImageClassification(config).double().train()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)

    def losses(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        labels = torch.zeros(len(x), dtype=torch.long)
        return functional.cross_entropy(model(pixel_values=x).logits, labels, reduction="none")

    names = PerSampleGradients(copy.deepcopy(model)).parameter_names()
    assert {"cls_token", "position_embeddings"} <= {name.rpartition(".")[2] for name in names}
    assert any("patch_embeddings.projection" in name for name in names)
    assert_exact(model, randn(4, 3, 8, 8), losses=losses)


def test_vision_transformer_with_the_patch_convolution_alone():
    config = ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8,
        patch_size=4, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = ViTForImageClassification(config).double().requires_grad_(False)
    model.vit.embeddings.patch_embeddings.requires_grad_(True)

    def losses(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return model(pixel_values=x).logits.square().sum(dim=1)

    assert_exact(model, randn(3, 3, 8, 8), ConvPath, losses=losses)
