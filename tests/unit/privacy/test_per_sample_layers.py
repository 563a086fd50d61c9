"""Every kind of layer against the truth: ordinary autograd on one sample at a time, in float64."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.pytorch_utils import Conv1D

from securetune.privacy.per_sample import PerSampleGradients
from securetune.privacy.per_sample.functional import FunctionalPath
from securetune.privacy.per_sample.norms import RmsNormPath
from tests.per_sample_oracle import assert_exact, one_by_one, randn, random_parameters, square_losses


def some_ids(batch: int, tokens: int, vocab: int = 11) -> torch.Tensor:
    return torch.randint(0, vocab, (batch, tokens), generator=torch.Generator().manual_seed(2))


def sequence(*layers: nn.Module) -> nn.Module:
    return random_parameters(nn.Sequential(*layers).double())


class TestDense:
    @pytest.mark.parametrize("layer", [nn.Linear(3, 3), Conv1D(3, 3)])
    def test_weight_is_kept_itself_until_its_backward(self, layer):
        """ZeRO-3 frees a parameter after its forward, and gathers it anew for its backward."""
        layers = sequence(layer)
        whole = layers[0].weight.data
        grads = PerSampleGradients(layers)
        x = randn(1, 4, 3).requires_grad_()
        losses = square_losses(layers, x)
        layers[0].weight.data = whole.new_empty(0)
        layers[0].weight.data = 2 * whole
        grads.backward(losses)
        grads.detach()
        layers[0].weight.data = whole
        (expected,) = torch.autograd.grad(square_losses(layers, x).sum(), x)
        torch.testing.assert_close(x.grad, 2 * expected)

    @pytest.mark.parametrize("batch", [1, 3])
    @pytest.mark.parametrize("shape", [(), (1,), (7,), (513,), (2, 7)])
    @pytest.mark.parametrize("bias", [True, False])
    def test_inputs_of_any_rank(self, batch, shape, bias):
        model = sequence(nn.Linear(13, 5, bias=bias), nn.Tanh(), nn.Linear(5, 7, bias=bias))
        assert_exact(model, randn(batch, *shape, 13))

    # few positions keep the factors, many write the product out: both sides of the rule
    @settings(max_examples=40)
    @given(
        batch=st.integers(1, 4),
        tokens=st.integers(1, 40),
        inputs=st.integers(1, 17),
        outputs=st.integers(1, 17),
    )
    def test_any_shape(self, batch, tokens, inputs, outputs):
        assert_exact(sequence(nn.Linear(inputs, outputs)), randn(batch, tokens, inputs))

    @pytest.mark.parametrize("shape", [(13,), (7, 13), (513, 13), (2, 7, 13)])
    @pytest.mark.parametrize("frozen", [None, "weight", "bias"])
    def test_conv1d_of_transformers(self, shape, frozen):
        model = sequence(Conv1D(5, 13), nn.Tanh(), Conv1D(7, 5))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen is None or not name.endswith(frozen))
        assert_exact(model, randn(3, *shape))

    @pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "2.weight", "2.bias", "0.", "2."])
    def test_frozen_part(self, frozen):
        model = sequence(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 7))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen))
        engine = assert_exact(model, randn(3, 4, 6))
        assert not any(name.startswith(frozen) for name in engine.parameter_names())

    def test_input_flattened_over_positions(self):
        class Flat(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norm, self.linear = nn.LayerNorm(6), nn.Linear(6, 5)

            def forward(self, x):
                return self.linear(self.norm(x.flatten(0, 1))).unflatten(0, x.shape[:2])

        assert_exact(random_parameters(Flat().double()), randn(3, 7, 6))

    @pytest.mark.parametrize("tokens", [1, 3, 40])
    def test_used_twice_in_one_forward(self, tokens):
        linear = nn.Linear(6, 6)
        assert_exact(sequence(linear, nn.Tanh(), linear), randn(3, tokens, 6))

    def test_two_layers_share_their_weight(self):
        model = sequence(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        model[2].weight = model[0].weight
        assert_exact(model, randn(3, 4, 6))
        assert len(list(model.parameters())) == 3

    def test_bias_shared_with_a_norm(self):
        model = sequence(nn.Linear(6, 6), nn.LayerNorm(6))
        model[1].bias = model[0].bias
        assert_exact(model, randn(3, 4, 6))

    def test_module_run_without_gradients_inside_of_forward(self):
        class Target(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(6, 6)

            def forward(self, x):
                with torch.no_grad():
                    target = self.linear(x)
                return self.linear(x) - 2 * target

        assert_exact(random_parameters(Target().double()), randn(3, 4, 6))

    def test_hooks_run_once(self):
        model = sequence(nn.Linear(6, 5))
        model[0].register_forward_pre_hook(lambda _, args: (2 * args[0],))
        model[0].register_forward_hook(lambda _, __, output: 3 * output)
        assert_exact(model, randn(3, 4, 6))

    def test_scripted(self):
        model = nn.Sequential(torch.jit.script(nn.Linear(6, 4)), nn.Linear(4, 3)).double()
        x, parameters = randn(3, 5, 6), list(model.parameters())
        rows = [torch.autograd.grad(square_losses(model, row).sum(), parameters) for row in x.split(1)]
        truth = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])  # cannot be copied
        assert_exact(model, x, expected=truth)

    def test_subclass_with_a_forward_of_its_own(self):
        class Scaled(nn.Linear):
            def forward(self, x):
                return 3 * functional.linear(2 * x, self.weight, self.bias)

        assert_exact(sequence(Scaled(6, 5)), randn(3, 4, 6))


class Lookup(nn.Module):
    """Tokens and positions; position ids are one row for all samples, or one for each."""

    def __init__(self, *, table: nn.Embedding | None = None, one_row: bool = True) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 6) if table is None else table
        self.positions = nn.Embedding(64, 6)
        self.one_row = one_row

    def forward(self, ids):
        positions = torch.arange(ids.shape[1])[None]
        positions = positions if self.one_row else positions.expand_as(ids)
        return torch.tanh(self.tokens(ids) + self.positions(positions))


class TestEmbedding:
    @pytest.mark.parametrize("batch", [1, 3])
    @pytest.mark.parametrize("tokens", [1, 7, 33])
    @pytest.mark.parametrize("one_row", [True, False])
    def test_repeated_tokens_and_broadcast_positions(self, batch, tokens, one_row):
        model = random_parameters(Lookup(one_row=one_row).double())
        assert_exact(model, some_ids(batch, tokens))

    @pytest.mark.parametrize("padding_idx", [0, -1, 5])
    def test_padding_row_gets_no_gradient(self, padding_idx):
        table = nn.Embedding(11, 6, padding_idx=padding_idx)
        ids = some_ids(3, 12)
        ids[:, ::3] = table.padding_idx
        engine = assert_exact(random_parameters(Lookup(table=table).double()), ids)
        grads = engine.backward(square_losses(engine.model, ids)).materialize()
        assert not grads[:, : 11 * 6].view(3, 11, 6)[:, table.padding_idx].any()

    @pytest.mark.parametrize("padding_idx", [None, 3])
    def test_subclass_with_a_forward_of_its_own(self, padding_idx):
        class Scaled(nn.Embedding):
            def forward(self, ids):
                return 4 * super().forward((ids + 2).clamp(max=10))

        model = Lookup(table=Scaled(11, 6, padding_idx=padding_idx))
        assert_exact(random_parameters(model.double()), some_ids(3, 9))

    # tokens past and below the vocabulary's size take the two ways to a norm
    @pytest.mark.parametrize("tokens", [1, 4, 30])
    @pytest.mark.parametrize("bias", [True, False])
    def test_tied_embedding_and_head(self, tokens, bias):
        table = nn.Embedding(11, 6)
        head = nn.Linear(6, 11, bias=bias)
        head.weight = table.weight
        model = sequence(Lookup(table=table), head)
        engine = assert_exact(model, some_ids(3, tokens))
        assert sum(name.endswith("tokens.weight") for name in engine.parameter_names()) == 1

    def test_tied_and_used_twice(self):
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.table, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
                self.head.weight = self.table.weight

            def forward(self, ids):
                x = self.table(ids) * self.table(ids.flip(1))
                return self.head(x) + self.head(x.square())

        assert_exact(random_parameters(Twice().double()), some_ids(3, 5))


class TestNorms:
    @pytest.mark.parametrize("build", [nn.LayerNorm, nn.RMSNorm, LlamaRMSNorm, GemmaRMSNorm])
    @pytest.mark.parametrize("shape", [(), (1,), (7,), (513,), (2, 7)])
    def test_inputs_of_any_rank(self, build, shape):
        assert_exact(sequence(build(13)), randn(3, *shape, 13))

    @pytest.mark.parametrize("build", [nn.LayerNorm, nn.RMSNorm, LlamaRMSNorm, GemmaRMSNorm])
    def test_in_front_of_a_layer_and_behind_one(self, build):
        assert_exact(sequence(build(6), nn.Linear(6, 6), build(6)), randn(3, 7, 6))

    @pytest.mark.parametrize("build", [nn.RMSNorm, LlamaRMSNorm])
    @pytest.mark.parametrize("x_scale", [1e-4, 1.0, 1e3])
    def test_float32_fast_path_stays_near_the_float64_truth(self, build, x_scale):
        model = random_parameters(nn.Sequential(build(13), nn.Linear(13, 3)))
        x = (x_scale * randn(3, 7, 13)).float()
        wide = [nn.RMSNorm(13, eps=getattr(model[0], "variance_epsilon", torch.finfo(torch.float32).eps))]
        truth = nn.Sequential(*wide, nn.Linear(13, 3)).double()
        truth.load_state_dict(model.state_dict())
        expected = one_by_one(truth, x.double())
        engine = assert_exact(model, x, expected=expected, tolerance=1e-5)
        assert isinstance(engine.paths[0], RmsNormPath)

    @pytest.mark.parametrize("build", [nn.LayerNorm, nn.RMSNorm, LlamaRMSNorm, GemmaRMSNorm, Olmo2RMSNorm])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("has_wide_weights", [False, True])
    @pytest.mark.parametrize("x_scale", [1.0, 0.02])
    def test_output_of_short_floats_stays_what_it_was(self, build, dtype, has_wide_weights, x_scale):
        """The smallest allowed mean square, the dtype of the output, and what is rounded to it."""
        model = random_parameters(nn.Sequential(build(13)).to(torch.float32 if has_wide_weights else dtype))
        x = (x_scale * randn(3, 7, 13)).to(dtype)
        with torch.autocast("cpu", dtype=dtype, enabled=has_wide_weights):
            expected = model(x)
            PerSampleGradients(model)
            found = model(x)
        torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)

    @pytest.mark.parametrize("build", [nn.RMSNorm, LlamaRMSNorm, GemmaRMSNorm])
    def test_frozen_norm_passes_the_gradient_on(self, build):
        model = sequence(nn.Linear(6, 6), build(6), nn.Linear(6, 3))
        model[1].requires_grad_(False)
        assert_exact(model, randn(3, 7, 6))

    @pytest.mark.parametrize("frozen", ["weight", "bias"])
    def test_layer_norm_over_two_dimensions_partly_frozen(self, frozen):
        model = sequence(nn.LayerNorm((5, 6)))
        getattr(model[0], frozen).requires_grad_(False)
        assert_exact(model, randn(3, 7, 5, 6))

    @pytest.mark.parametrize("is_elsewhere", [False, True])
    @pytest.mark.parametrize(("build", "is_plain"), [(GemmaRMSNorm, False), (LlamaRMSNorm, True)])
    def test_plain_norms_are_told_by_what_they_compute(self, build, is_plain, is_elsewhere):
        model = nn.Sequential(build(6))
        if is_elsewhere:  # as ZeRO-3 leaves a parameter between its uses
            model[0].weight = nn.Parameter(torch.empty(0))
            model[0].weight.ds_shape = torch.Size([6])
        assert isinstance(PerSampleGradients(model).paths[0], RmsNormPath) == is_plain


class Mix(nn.Module):
    """Bare parameters: one with a position each, a scalar, and a child."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.zeros(1, 7, 6))
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.linear = nn.Linear(6, 6)

    def forward(self, x, factor=None):
        x = self.linear(x + self.places[:, : x.shape[1]]) * self.scale
        return x if factor is None else x * factor[0] + factor[1]


class TestBareParameters:
    @pytest.mark.parametrize("nested", [False, True])
    def test_lists_and_dictionaries_of_parameters(self, nested):
        class Listed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first = nn.Linear(6, 6)
                self.rows = nn.ParameterList([torch.ones(6), torch.ones(6, 6)])
                self.named = nn.ParameterDict({"scale": torch.ones(6)})

            def forward(self, x):
                x = self.first(x) * self.rows[0]
                return torch.tanh(x @ self.rows[1]) * self.named["scale"]

        model = sequence(nn.Linear(6, 6), Listed()) if nested else Listed().double()
        assert_exact(random_parameters(model), randn(3, 5, 6))

    def test_of_an_inner_module(self):
        assert_exact(sequence(nn.Linear(6, 6), Mix()), randn(3, 7, 6))

    def test_of_the_model_itself(self):
        assert_exact(random_parameters(Mix().double()), randn(3, 7, 6))

    def test_hooks_run_once(self):
        model = sequence(Mix())
        model[0].register_forward_pre_hook(lambda _, args: (2 * args[0],))
        model[0].register_forward_hook(lambda _, __, output: 3 * output)
        assert_exact(model, randn(3, 7, 6))

    def test_arguments_inside_of_a_tuple_are_split_too(self):
        class Nested(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.mix = Mix()

            def forward(self, x):
                return self.mix(x, factor=(x.cos(), x.sin()))

        assert_exact(random_parameters(Nested().double()), randn(3, 7, 6))

    @pytest.mark.parametrize("tokens", [5, 6])
    def test_argument_that_all_samples_share(self, tokens):
        class Shared(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.mix = Mix()

            def forward(self, x):
                return self.mix(x, factor=(x.new_ones(1, 1, 6) * 2, torch.arange(6).to(x)))

        assert_exact(random_parameters(Shared().double()), randn(3, tokens, 6))

    def test_input_flattened_over_positions(self):
        class Scale(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.ones(6))

            def forward(self, x):
                return x * self.weight

        class Flat(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale = Scale()

            def forward(self, x):
                return self.scale(x.flatten(0, 1)).unflatten(0, x.shape[:2])

        assert_exact(random_parameters(Flat().double()), randn(3, 7, 6))

    def test_child_that_the_model_lists_before(self):
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.listed = nn.Linear(6, 6)
                self.mix = Mix()
                self.mix.linear = self.listed

            def forward(self, x):
                return self.mix(x)

        assert_exact(random_parameters(Model().double()), randn(3, 7, 6))

    def test_autocast_is_the_same_when_it_runs_again(self):
        model = random_parameters(nn.Sequential(nn.Linear(6, 6), Mix()))
        x = randn(3, 7, 6).float()
        expected = one_by_one(copy.deepcopy(model).double(), x.double())

        def losses(model, x):
            with torch.autocast("cpu", torch.bfloat16):
                return square_losses(model, x).float()

        # bfloat16 has eight bits
        assert_exact(model, x, losses, expected=expected, tolerance=3e-2)

    @pytest.mark.parametrize("kind", ["weight_norm", "own forward"])
    def test_layer_that_is_unlike_its_class(self, kind):
        model = sequence(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        expected = None
        if kind == "weight_norm":
            nn.utils.parametrizations.weight_norm(model[0])
        else:  # as accelerate does it; a deep copy would run the old module, so the truth comes first
            original = model[0].forward
            model[0].forward = lambda x: 2 * original(x)
            expected = one_by_one(model, randn(3, 4, 6))
        engine = assert_exact(model, randn(3, 4, 6), expected=expected)
        assert isinstance(engine.paths[0], FunctionalPath)


class TestWithoutWork:
    def test_empty_batch(self):
        model = sequence(nn.Embedding(11, 6), nn.Linear(6, 5), nn.LayerNorm(5), Mix6())
        engine = PerSampleGradients(model)
        grads = engine.backward(square_losses(model, some_ids(0, 4)))
        summed = torch.zeros(engine.num_params, dtype=torch.float64)
        grads.accumulate(torch.zeros(0, 1), summed)
        assert grads.squared_norms().shape == (0, 1)
        assert grads.materialize().shape == (0, engine.num_params)
        assert not summed.any()

    def test_layer_that_is_not_used_has_a_zero_gradient_each_time(self):
        class Sometimes(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.LayerNorm(6)

            def forward(self, x):
                y = self.first(x)
                return self.norm(self.second(y)) if x.shape[1] > 2 else y

        model = random_parameters(Sometimes().double())
        reference = copy.deepcopy(model)
        engine = PerSampleGradients(model)
        for tokens in (4, 2, 4):
            x = randn(3, tokens, 6)
            grads = engine.backward(square_losses(model, x)).materialize()
            torch.testing.assert_close(grads, one_by_one(reference, x), rtol=1e-9, atol=1e-12)


class Mix6(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5))

    def forward(self, x):
        return x * self.weight
