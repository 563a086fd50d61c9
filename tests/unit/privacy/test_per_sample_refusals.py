"""Uses whose per-sample gradients would be wrong, missing or coupled: each is refused, with the reason."""

import copy
import functools
import pickle
import types

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from securetune.errors import PrivacyError
from securetune.privacy.per_sample import PerSampleGradients
from tests.per_sample_oracle import one_by_one, randn, random_parameters, relative_error, square_losses


class Using(nn.Module):
    """A model whose forward pass is given: ``use(layer, x)``."""

    def __init__(self, layer: nn.Module, use) -> None:
        super().__init__()
        self.layer, self.use = layer, use

    def forward(self, x):
        return self.use(self.layer, x)


def using(layer: nn.Module, use) -> nn.Module:
    return random_parameters(Using(layer, use).double())


def refused(model: nn.Module, x: torch.Tensor, match: str, losses=square_losses) -> None:
    engine = PerSampleGradients(model)
    with pytest.raises(PrivacyError, match=match):
        engine.backward(losses(model, x))
    assert all(parameter.grad is None for parameter in model.parameters())


class TestRowsThatAreNotTheSamples:
    # with as many positions as samples, or a multiple, nothing but the proof can tell; reading one position
    # leaves all but one row without a gradient
    @pytest.mark.parametrize("tokens", [4, 8])
    @pytest.mark.parametrize("position", [0, 1, -1])
    def test_input_that_is_not_batch_first(self, tokens, position):
        model = using(nn.Linear(6, 3), lambda layer, x: layer(x.transpose(0, 1))[position])
        refused(model, randn(4, tokens, 6), "coupled")

    def test_other_number_of_positions(self):
        model = using(nn.Linear(6, 3), lambda layer, x: layer(x.transpose(0, 1))[0])
        refused(model, randn(4, 5, 6), "saw 5 rows where the batch has 4 samples")

    @pytest.mark.parametrize("tokens", [4, 5])
    def test_positions_looked_up_once_for_all_samples(self, tokens):
        def use(table, x):
            return x + table(torch.arange(x.shape[1])).sin()

        refused(using(nn.Embedding(9, 6), use), randn(4, tokens, 6), r"(coupled|saw 5 rows).*\[1, T\]")

    def test_first_of_the_rows_that_were_looked_up_for_each_sample(self):
        def use(table, x):
            return x + table(torch.arange(x.shape[1])[None])[0]

        refused(using(nn.Embedding(9, 6), use), randn(4, 5, 6), "coupled")

    def test_table_row_chosen_by_each_sample(self):
        def use(layer, x):
            rows = layer(torch.eye(6, dtype=x.dtype)[:4])
            return rows[torch.tensor([0, 2, 1, 3])[: len(x)]] * x[:, 0, :3]

        refused(using(nn.Linear(6, 3), use), randn(4, 5, 6), "coupled")


def test_a_layer_that_is_the_whole_model_has_a_name():
    model = nn.Linear(6, 3).double()
    PerSampleGradients(model)
    with pytest.raises(PrivacyError, match=r"layer \(root\) already has per-sample gradients"):
        PerSampleGradients(model)


class TestLosses:
    def test_one_loss_repeated(self):
        model = using(nn.Linear(6, 3), lambda layer, x: layer(x))
        refused(model, randn(4, 6), "coupled", lambda model, x: square_losses(model, x)[:1].expand(4))

    def test_losses_in_another_order(self):
        model = using(nn.Linear(6, 3), lambda layer, x: layer(x))
        order = torch.tensor([0, 2, 1, 3])
        refused(model, randn(4, 6), "coupled", lambda model, x: square_losses(model, x)[order])

    @pytest.mark.parametrize("kept", [[0, 1], [2, 3], [1]])
    def test_losses_left_out_after_a_whole_batch(self, kept):
        model = using(nn.Linear(6, 3), lambda layer, x: layer(x))
        engine = PerSampleGradients(model)
        engine.backward(square_losses(model, randn(4, 6)))
        with pytest.raises(PrivacyError, match=r"coupled|there is one loss"):
            engine.backward(square_losses(model, randn(4, 6))[kept])

    def test_proof_of_the_check_is_not_that_of_another_loss(self):
        model = using(nn.Linear(6, 3), lambda layer, x: layer(x))
        engine = PerSampleGradients(model)
        engine.check(lambda rows: square_losses(model, randn(4, 6)[rows]), 4)
        with pytest.raises(PrivacyError, match="coupled"):
            engine.backward(square_losses(model, randn(4, 6)).flip(0))

    @pytest.mark.parametrize("layer", [nn.Linear(6, 6), nn.LayerNorm(6), nn.Bilinear(6, 6, 6)])
    def test_gradient_penalty(self, layer):
        def use(layer, x):
            return torch.tanh(layer(x, x) if isinstance(layer, nn.Bilinear) else layer(x))

        def losses(model, x):
            x = x.clone().requires_grad_(True)
            values = square_losses(model, x)
            (slope,) = torch.autograd.grad(values.sum(), x, create_graph=True)
            return values + slope.square().flatten(1).sum(dim=1)

        model = using(layer, use)
        PerSampleGradients(model)
        with pytest.raises(PrivacyError, match="second derivative"):
            losses(model, randn(4, 6))


class SharedMask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x, mask):
        return (mask @ x) * self.weight


class TestModules:
    def test_shared_argument_that_is_as_long_as_the_batch(self):
        def use(layer, x):
            return layer(x, torch.linspace(0, 1, x.shape[1] ** 2, dtype=x.dtype).view(x.shape[1], -1))

        model = using(SharedMask(), use)
        truth = one_by_one(copy.deepcopy(model), randn(4, 5, 6))
        engine = PerSampleGradients(model)
        assert (
            relative_error(engine.backward(square_losses(model, randn(4, 5, 6))).materialize(), truth) < 1e-12
        )
        with pytest.raises(PrivacyError, match=r"layer layer .SharedMask. can't be run sample by sample"):
            engine.backward(square_losses(model, randn(4, 4, 6)))

    def test_shared_argument_that_would_broadcast(self):
        class Row(SharedMask):
            def forward(self, x, mask):
                return x * mask[: x.shape[1], None] * self.weight

        def use(layer, x):
            return layer(x, torch.arange(1, x.shape[1] + 1, dtype=x.dtype))

        refused(using(Row(), use), randn(4, 4, 6), "differs from that in the batch|Mismatch")

    def test_list_with_an_entry_for_each_sample(self):
        class Shifted(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale = nn.Parameter(torch.ones(6))

            def forward(self, x, shifts):
                positions = torch.arange(x.shape[1])[None] >= torch.tensor(shifts)[:, None]
                return x.flatten(0, 1)[positions.flatten()] * self.scale

        model = using(Shifted(), lambda layer, x: layer(x, [1] * len(x)).unflatten(0, (len(x), -1)))
        refused(model, randn(4, 5, 6), r"layer layer \(Shifted\) can't be run sample by sample")

    def test_argument_that_hides_its_tensors(self):
        class Scaled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale = nn.Parameter(torch.ones(6))

            def forward(self, batch):
                return batch.x * self.scale

        model = using(Scaled(), lambda layer, x: layer(types.SimpleNamespace(x=x)))
        refused(
            model, randn(4, 5, 6), r"layer layer \(Scaled\) .*in its SimpleNamespace can't be split; give a"
        )

    @pytest.mark.parametrize("batch", [1, 4])
    def test_output_without_a_batch_dimension(self, batch):
        class Balanced(SharedMask):
            def forward(self, x):
                y = x * self.weight
                return y, y.square().mean()

        def losses(model, x):
            y, balance = model.layer(x)
            return y.flatten(1).sum(dim=1) + balance

        model = using(Balanced(), lambda layer, x: layer(x))
        refused(model, randn(batch, 5, 6), "no batch dimension", losses)
        unused = using(Balanced(), lambda layer, x: layer(x)[0])
        truth = one_by_one(copy.deepcopy(unused), randn(batch, 5, 6))
        found = PerSampleGradients(unused).backward(square_losses(unused, randn(batch, 5, 6))).materialize()
        assert relative_error(found, truth) < 1e-12

    def test_output_that_hides_its_tensors(self):
        class Box:
            def __init__(self, y) -> None:
                self.y = y

        class Boxed(SharedMask):
            def forward(self, x):
                return x, Box(x * self.weight)

        model = using(Boxed(), lambda layer, x: layer(x)[1].y)
        PerSampleGradients(model)
        with pytest.raises(PrivacyError, match=r"Boxed.* returns a Box"):
            model(randn(4, 5, 6))

    def test_random_operation_that_is_no_ordinary_dropout(self):
        class Own(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale = nn.Parameter(torch.ones(6))

            def forward(self, x):
                return self.scale * x * torch.normal(x, 0.1)

        refused(using(Own(), lambda layer, x: layer(x)), randn(4, 5, 6), "random operation")

    @pytest.mark.parametrize("vectorises", [True, False])
    def test_random_operation_where_samples_run_one_after_another(self, vectorises):
        class Own(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale = nn.Parameter(torch.ones(6))

            def forward(self, x):
                if not vectorises and x.sum() > 1e9:
                    return x
                return functional.feature_alpha_dropout(self.scale * x, 0.1, training=True)

        refused(using(Own(), lambda layer, x: layer(x)), randn(4, 5, 6), "random operation")

    def test_adapter_of_the_attention_of_torch(self):
        model = using(nn.MultiheadAttention(6, 2, batch_first=True), lambda layer, x: layer(x, x, x)[0])
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["layer"]))
        with pytest.raises(PrivacyError, match=r"layer base_model.model.layer is an adapter of nn.Multihead"):
            PerSampleGradients(model)

    def test_child_of_a_whole_module_used_outside_of_it(self):
        class Block(nn.Module):
            def __init__(self, child) -> None:
                super().__init__()
                self.scale, self.child = nn.Parameter(torch.ones(6)), child

            def forward(self, x):
                return self.child(x) * self.scale

        linear = nn.Linear(6, 6)
        refused(
            nn.Sequential(linear, Block(linear)).double(), randn(4, 6), r"0\.weight got an ordinary gradient"
        )

    @pytest.mark.parametrize("bias", [True, False])
    def test_weight_norm_of_old(self, bias):
        layer = nn.utils.weight_norm(nn.Linear(6, 3, bias=bias))
        refused(nn.Sequential(layer).double(), randn(4, 6), "weight_[gv] got an ordinary gradient")

    def test_power_iteration_that_moves_in_each_pass(self):
        torch.manual_seed(0)
        layer = nn.utils.parametrizations.spectral_norm(nn.Linear(60, 50))
        refused(nn.Sequential(layer).double().train(), randn(4, 60), "differs from that in the batch")

    @pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
    @pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
    def test_embedding_options(self, option, kind):
        with pytest.raises(PrivacyError, match=next(iter(option))):
            PerSampleGradients(nn.Sequential(kind(9, 6, **option)))

    @pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
    def test_frozen_table_that_look_ups_change(self, kind):
        model = nn.Sequential(kind(9, 6, max_norm=1.0).requires_grad_(False), nn.Linear(6, 3))
        with pytest.raises(PrivacyError, match=r"layer 0 has max_norm"):
            PerSampleGradients(model)


class TestOneModelOneEngine:
    @pytest.mark.parametrize("layer", [nn.Linear(6, 6), nn.LayerNorm(6), SharedMask()])
    def test_second_engine(self, layer):
        model = nn.Sequential(layer)
        first = PerSampleGradients(model)
        with pytest.raises(PrivacyError, match="already has per-sample gradients"):
            PerSampleGradients(model)
        first.detach()
        PerSampleGradients(model)

    def test_detached_and_attached_again_is_exact(self):
        model = random_parameters(nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)).double())
        truth = one_by_one(copy.deepcopy(model), randn(4, 6))
        for _ in range(2):
            engine = PerSampleGradients(model)
            assert (
                relative_error(engine.backward(square_losses(model, randn(4, 6))).materialize(), truth)
                < 1e-12
            )
            with engine.ordinary_autograd():
                square_losses(model, randn(4, 6)).sum().backward()
            found = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
            assert relative_error(found, truth.sum(dim=0)) < 1e-12
            model.zero_grad()
            engine.detach()
        square_losses(model, randn(4, 6)).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())

    def test_copies(self):
        model = nn.Sequential(nn.Linear(6, 6))
        engine = PerSampleGradients(model)
        with pytest.raises(PrivacyError, match="can't be copied"):
            copy.deepcopy(model)
        with pytest.raises(PrivacyError, match="can't be copied"):
            pickle.dumps(model)
        engine.detach()
        copy.deepcopy(model)
        pickle.dumps(model)

    @pytest.mark.parametrize("mode", [True, False])
    def test_modes_may_change_between_passes(self, mode):
        model = random_parameters(nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)).double()).train(mode)
        truth = one_by_one(copy.deepcopy(model), randn(4, 6))
        engine = PerSampleGradients(model)
        for is_training in (mode, not mode, mode):
            model.train(is_training)
            with torch.no_grad():
                model(randn(7, 6))  # an evaluation in between
            assert (
                relative_error(engine.backward(square_losses(model, randn(4, 6))).materialize(), truth)
                < 1e-12
            )

    def test_gradient_left_over_from_elsewhere(self):
        model = nn.Sequential(nn.Linear(6, 6)).double()
        engine = PerSampleGradients(model)
        model[0].weight.grad = torch.ones(6, 6, dtype=torch.float64)
        with pytest.raises(PrivacyError, match=r"0\.weight got an ordinary gradient before"):
            engine.backward(square_losses(model, randn(4, 6)))


class TestParameters:
    def test_complex_one(self):
        model = using(nn.Linear(6, 6), lambda layer, x: layer(x)).to(torch.complex128)
        with pytest.raises(PrivacyError, match=r"layer\.weight is complex128.*view_as_real"):
            PerSampleGradients(model)

    def test_one_without_a_shape_yet(self):
        model = nn.Sequential(nn.LazyLinear(3))
        with pytest.raises(PrivacyError, match=r"0\.weight has no shape yet.*Run the model once"):
            PerSampleGradients(model)

    def test_one_whose_gradient_a_hook_would_change(self):
        model = nn.Sequential(nn.Embedding(9, 6)).double()
        model[0].weight.register_hook(lambda g: g * torch.arange(9)[:, None])
        refused(model, torch.arange(8).view(4, 2), r"0\.weight has a hook.*TrainableTokensConfig")

    def test_one_that_was_frozen_afterwards(self):
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)).double()
        engine = PerSampleGradients(model)
        model[0].requires_grad_(False)
        with pytest.raises(PrivacyError, match=r"0\.weight was frozen after PerSampleGradients was made"):
            engine.backward(square_losses(model, randn(4, 6)))

    def test_losses_that_do_not_depend_on_any(self):
        model = nn.Sequential(nn.Linear(6, 6)).double()
        engine = PerSampleGradients(model)
        with pytest.raises(PrivacyError, match=r"losses are not attached to a graph.*no_grad"):
            engine.backward(square_losses(model, randn(4, 6)).detach())

    @pytest.mark.parametrize("adapted", [True, False])
    def test_records_in_two_halves_of_one_batch(self, adapted):
        model = using(nn.Linear(6, 6), lambda layer, x: layer(x))
        if adapted:
            model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["layer"])).double()

        def halves(model, x):
            chosen, rejected = square_losses(model, torch.cat([x, 2 * x])).chunk(2)
            return chosen - rejected.square()

        refused(
            model,
            randn(4, 6),
            "are coupled.*rejected answers.*interleave them, or call the model once",
            halves,
        )


class TestModelThatChangedAfterwards:
    @staticmethod
    def adapted(**options) -> nn.Module:
        layer = Using(nn.Linear(6, 6), lambda layer, x: layer(x))
        lora = peft.LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False, **options)
        return peft.get_peft_model(layer, lora, autocast_adapter_dtype=False).double()

    @pytest.mark.parametrize(
        "model",
        [nn.Linear(6, 6), nn.LayerNorm(6), nn.RMSNorm(6), nn.PReLU(), "lora"],
        ids=["dense", "layer norm", "rms norm", "any other", "lora"],
    )
    @pytest.mark.parametrize("change", ["assign", "functional_call"])
    def test_parameters_that_are_other_tensors_now(self, model, change):
        model = self.adapted() if model == "lora" else nn.Sequential(copy.deepcopy(model)).double()
        engine = PerSampleGradients(model)
        values = {name: value.clone() for name, value in model.state_dict().items()}
        if change == "assign":
            model.load_state_dict(values, assign=True)
            run = model
        else:
            run = functools.partial(torch.func.functional_call, model, values)
        with pytest.raises(PrivacyError, match="is another tensor than when PerSample") as error:
            run(randn(4, 5, 6))
        assert any(name in str(error.value) for name in engine.parameter_names())

    @pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
    def test_another_adapter_is_active(self, options):
        model = self.adapted(**options)
        engine = PerSampleGradients(model)
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["layer"], **options))
        model.double().set_adapter("second")
        with pytest.raises(PrivacyError, match=r"base_model\.model\.layer trains .*second.* now"):
            engine.backward(square_losses(model, randn(4, 6)))
        model.set_adapter("default")
        engine.backward(square_losses(model, randn(4, 6)))

    def test_scale_of_the_adapter_is_read_each_time(self):
        model = self.adapted()
        other = copy.deepcopy(model)
        engine = PerSampleGradients(model)
        for changed in (model, other):
            changed.base_model.model.layer.set_scale("default", 3.0)
        truth = one_by_one(other, randn(4, 6))
        assert relative_error(engine.backward(square_losses(model, randn(4, 6))).materialize(), truth) < 1e-12


class TestGraphThatIsUsedUp:
    @pytest.mark.parametrize("passes", [1, 2])
    def test_losses_given_twice(self, passes):
        engine = PerSampleGradients(nn.Sequential(nn.Linear(6, 6)).double(), passes=passes)
        losses = square_losses(engine.model, randn(4, 6))
        total = torch.zeros(engine.num_params, dtype=torch.float64)
        engine.backward(losses).accumulate(torch.ones(4, 1), total)
        with pytest.raises(PrivacyError, match=r"differentiated before.*given twice.*detach\(\) states"):
            engine.backward(losses)

    def test_selective_checkpointing(self):
        save = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.tanh.default])
        engine = PerSampleGradients(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)).double())
        y = checkpoint(engine.model, randn(4, 6), use_reentrant=False, context_fn=save)
        with pytest.raises(PrivacyError, match=r"selective activation checkpointing.*without context_fn"):
            engine.backward(y.square().sum(dim=1))
