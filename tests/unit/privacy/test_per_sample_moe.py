"""Per-sample gradients of mixture-of-experts models against ordinary autograd on one sample at a time."""

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional

from securetune.errors import PrivacyError
from securetune.privacy.per_sample import PerSampleGradients
from securetune.privacy.per_sample.gradients import by_expert, routed_squared_norms
from securetune.privacy.per_sample.moe import ExpertsPath, RouterPath
from tests.per_sample_oracle import assert_exact, random_parameters, square_losses

VOCAB = 60
_SIZES = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": None, "max_position_embeddings": 64,
}  # fmt: skip
_EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12}


def configs() -> dict[str, transformers.PreTrainedConfig]:
    return {
        "mixtral": transformers.MixtralConfig(**_SIZES, num_local_experts=5, num_experts_per_tok=2),
        "qwen3_moe": transformers.Qwen3MoeConfig(**_SIZES, **_EXPERTS, head_dim=8),
        # shared experts
        "qwen2_moe": transformers.Qwen2MoeConfig(**_SIZES, **_EXPERTS, shared_expert_intermediate_size=20),
        "olmoe": transformers.OlmoeConfig(**_SIZES, num_experts=5, num_experts_per_tok=2),
        # a dense first layer, shared experts, groups of experts, a router in float32
        "deepseek_v3": transformers.DeepseekV3Config(
            **_SIZES | {"num_key_value_heads": 2}, n_routed_experts=4, num_experts_per_tok=2, n_group=2,
            topk_group=1, moe_intermediate_size=12, first_k_dense_replace=1, n_shared_experts=1,
            q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
        ),
        # transposed weights with biases, a router with a bias
        "gpt_oss": transformers.GptOssConfig(
            **_SIZES, head_dim=8, num_local_experts=5, num_experts_per_tok=2,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
    }  # fmt: skip


def moe_model(family: str, *, dtype=torch.float64, experts: str = "eager") -> nn.Module:
    config = configs()[family]
    config._attn_implementation = "eager"
    config._experts_implementation = experts
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        # so large that experts differ, and no gradient drowns in another's rounding
        parameter.data = 0.3 * torch.randn(parameter.shape) + (1.0 if "norm" in name else 0.0)
        if name.endswith("sinks"):
            parameter.requires_grad_(False)
    return model.to(dtype).train()


def some_ids(batch: int = 3, tokens: int = 7) -> torch.Tensor:
    return torch.randint(2, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(1))


def next_token_losses(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(dim=1)


def oracle(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """One sample at a time, through the model's own forwards, in float64."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for row in range(len(ids)):
        losses = next_token_losses(model, ids[row : row + 1])
        grads = torch.autograd.grad(losses.sum(), parameters, allow_unused=True)
        pairs = zip(grads, parameters, strict=True)
        rows.append(torch.cat([torch.zeros(p.numel()) if g is None else g.flatten() for g, p in pairs]))
    return torch.stack(rows).double()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


class TestWholeModels:
    # DeepSeek routes in float32 even in a float64 model
    @pytest.mark.parametrize(
        ("family", "tolerance"),
        [("mixtral", 1e-12), ("qwen3_moe", 1e-12), ("qwen2_moe", 1e-12), ("olmoe", 1e-12),
         ("gpt_oss", 1e-12), ("deepseek_v3", 1e-7)],
    )  # fmt: skip
    def test_gradients_norms_and_sums_equal_autograd_on_one_sample(self, family, tolerance):
        model, ids = moe_model(family), some_ids()
        expected = oracle(copy.deepcopy(model), ids)
        engine = PerSampleGradients(model)
        kinds = {type(path) for path in engine.paths}
        assert {ExpertsPath, RouterPath} <= kinds
        grads = engine.backward(next_token_losses(model, ids))
        rows = grads.materialize()
        for place in engine.parameters:
            actual, part = rows[:, place.start : place.stop], expected[:, place.start : place.stop]
            assert (actual - part).norm() <= tolerance * (part.norm() + 1e-3 * expected.norm()), place.name
        norms = grads.squared_norms()[:, 0]
        torch.testing.assert_close(norms, expected.square().sum(1), rtol=100 * tolerance, atol=0.0)
        factors = torch.tensor([[0.5], [0.0], [2.0]], dtype=torch.float64)
        out = torch.zeros(engine.num_params, dtype=torch.float64)
        grads.accumulate(factors, out)
        assert relative_error(out, (factors * expected).sum(0)) < tolerance

    @pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
    def test_samples_of_one_unit_count_as_one(self, family):
        model, ids = moe_model(family), some_ids(batch=4)
        rows = oracle(copy.deepcopy(model), ids)
        expected = torch.stack([rows[0] + rows[2] + rows[3], rows[1]])
        engine = PerSampleGradients(model)
        grads = engine.backward(next_token_losses(model, ids), unit_ids=["b", "a", "b", "b"])
        norms = grads.squared_norms()[:, 0]
        torch.testing.assert_close(norms, expected.square().sum(1), rtol=1e-10, atol=0.0)
        out = torch.zeros(engine.num_params, dtype=torch.float64)
        grads.accumulate(torch.tensor([[0.5], [3.0]], dtype=torch.float64), out)
        torch.testing.assert_close(out, 0.5 * expected[0] + 3.0 * expected[1], rtol=1e-10, atol=1e-14)

    def test_norms_by_group_split_the_experts_from_the_rest(self):
        model, ids = moe_model("qwen3_moe"), some_ids()
        rows = oracle(copy.deepcopy(model), ids)
        engine = PerSampleGradients(model)
        group_of = [1 if ".experts." in place.name else 0 for place in engine.parameters]
        norms = engine.backward(next_token_losses(model, ids)).squared_norms(group_of, 2)
        expected = torch.zeros(len(ids), 2, dtype=torch.float64)
        for place, group in zip(engine.parameters, group_of, strict=True):
            expected[:, group] += rows[:, place.start : place.stop].square().sum(1)
        torch.testing.assert_close(norms, expected, rtol=1e-10, atol=0.0)

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_gradient_checkpointing(self, use_reentrant):
        model, ids = moe_model("mixtral"), some_ids()
        expected = oracle(copy.deepcopy(model), ids)
        engine = PerSampleGradients(model)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        grads = engine.backward(next_token_losses(model, ids))
        assert relative_error(grads.materialize(), expected) < 1e-12

    @pytest.mark.parametrize("experts", ["batched_mm", "grouped_mm"])
    def test_other_experts_implementations_agree(self, experts):
        model, ids = moe_model("qwen3_moe", dtype=torch.float32, experts=experts), some_ids()
        expected = oracle(copy.deepcopy(model), ids)
        grads = PerSampleGradients(model).backward(next_token_losses(model, ids))
        assert relative_error(grads.materialize(), expected) < 1e-5

    @pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
    def test_bfloat16_model_stays_near_the_float64_truth(self, family):
        model, ids = moe_model(family, dtype=torch.bfloat16), some_ids()
        wide = copy.deepcopy(model).to(torch.float64)
        expected = oracle(wide, ids)
        own = oracle(copy.deepcopy(model), ids)
        grads = PerSampleGradients(model).backward(next_token_losses(model, ids))
        # a token near a tie may be routed otherwise in bfloat16, so the model's own error is the yardstick
        assert relative_error(grads.materialize(), expected) < 1.2 * relative_error(own, expected) + 1e-2
        assert relative_error(grads.materialize(), own) < 5e-2

    def test_frozen_experts_with_a_trained_router(self):
        model, ids = moe_model("mixtral"), some_ids()
        model.requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".gate." in name)
        expected = oracle(copy.deepcopy(model), ids)
        engine = PerSampleGradients(model)
        assert not any(isinstance(path, ExpertsPath) for path in engine.paths)
        grads = engine.backward(next_token_losses(model, ids)).materialize()
        assert relative_error(grads, expected) < 1e-12

    def test_detach_gives_the_experts_their_forward_back(self):
        model, ids = moe_model("mixtral"), some_ids()
        engine = PerSampleGradients(model)
        with torch.no_grad():
            before = next_token_losses(model, ids)
        replaced = next_token_losses(model, ids)
        torch.testing.assert_close(replaced, before, rtol=1e-12, atol=0.0)
        engine.detach()
        assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_sample_that_is_not_finite_is_left_out():
    """Its tokens are among the others' in every expert's list."""
    model, ids = moe_model("mixtral"), some_ids()
    expected = oracle(copy.deepcopy(model), ids)
    engine = PerSampleGradients(model)
    losses = next_token_losses(model, ids) * torch.tensor([1.0, float("nan"), 1.0], dtype=torch.float64)
    grads = engine.backward(losses)
    norms = grads.squared_norms()[:, 0]
    assert norms.isfinite().tolist() == [True, False, True]
    out = torch.zeros(engine.num_params, dtype=torch.float64)
    grads.accumulate(torch.tensor([[1.0], [0.0], [1.0]], dtype=torch.float64), out)
    torch.testing.assert_close(out, expected[0] + expected[2], rtol=1e-9, atol=1e-13)


class TestAdapters:
    @staticmethod
    def adapted(family: str, targets: list[str], *, dtype=torch.float64) -> nn.Module:
        config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], target_parameters=targets)
        model = get_peft_model(moe_model(family, dtype=dtype), config, autocast_adapter_dtype=False)
        torch.manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = (0.3 * torch.randn(parameter.shape)).to(dtype)
        return model

    @pytest.mark.parametrize(
        ("family", "targets"),
        [
            ("mixtral", ["experts.gate_up_proj"]),
            ("mixtral", ["experts.gate_up_proj", "experts.down_proj"]),
            ("gpt_oss", ["experts.gate_up_proj", "experts.down_proj"]),
        ],
    )
    def test_lora_on_experts_equals_autograd_on_one_sample(self, family, targets):
        model, ids = self.adapted(family, targets), some_ids()
        expected = oracle(copy.deepcopy(model), ids)
        engine = PerSampleGradients(model)
        names = [path.name for path in engine.paths if isinstance(path, ExpertsPath)]
        assert len(names) == 2  # one a layer: the outermost adapter stands for those inside
        assert not any(path.name.startswith(f"{name}.") for name in names for path in engine.paths)
        grads = engine.backward(next_token_losses(model, ids))
        rows = grads.materialize()
        for place in engine.parameters:
            part = slice(place.start, place.stop)
            assert expected[:, part].norm() > 0
            torch.testing.assert_close(rows[:, part], expected[:, part], rtol=1e-9, atol=1e-13)
        assert grads.flat_rows is not None

    def test_disabled_adapters_run_the_base(self):
        model, ids = self.adapted("mixtral", ["experts.gate_up_proj"]), some_ids()
        engine = PerSampleGradients(model)
        with model.disable_adapter():
            losses = next_token_losses(model, ids)
        engine.detach()
        with model.disable_adapter():
            torch.testing.assert_close(losses, next_token_losses(model, ids), rtol=1e-12, atol=0.0)

    def test_adapted_parameter_of_another_layer_is_refused(self):
        class Blocks(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.blocks = nn.Parameter(torch.ones(3, 4, 4))

            def forward(self, x):
                return torch.einsum("epd,bd->bp", self.blocks, x)

        config = LoraConfig(r=2, target_modules=[], target_parameters=["0.blocks"])
        model = get_peft_model(nn.Sequential(Blocks()), config)
        with pytest.raises(PrivacyError, match=r"has an adapter of its parameter blocks.*target_modules"):
            PerSampleGradients(model)

    def test_trained_bias_beside_an_adapter_has_a_gradient(self):
        model, ids = self.adapted("gpt_oss", ["experts.down_proj"]), some_ids()
        for name, parameter in model.named_parameters():
            if name.endswith("down_proj_bias"):
                parameter.requires_grad_(True)
        expected = oracle(copy.deepcopy(model), ids)
        grads = PerSampleGradients(model).backward(next_token_losses(model, ids)).materialize()
        assert relative_error(grads, expected) < 1e-12


class Mixture(nn.Module):
    """Experts in a list, called with their tokens; a sample may get too few, as its capacity allows."""

    def __init__(self, capacity: int | None = None) -> None:
        super().__init__()
        self.router = nn.Linear(6, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6)) for _ in range(3)
        )
        self.capacity = capacity

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, -2)
        weights, chosen = self.router(tokens).softmax(dim=-1).topk(2)
        y = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            slots = (chosen == index).nonzero()[: self.capacity]
            if len(slots):
                y = y.index_add(
                    0, slots[:, 0], expert(tokens[slots[:, 0]]) * weights[slots.unbind(1)][:, None]
                )
        return y.view_as(x)


class TestExpertsInAnOrderOfTheirOwn:
    @pytest.mark.parametrize("mode", ["full", "lora"])
    def test_list_of_layers(self, mode):
        model = nn.Sequential(nn.Linear(6, 6), Mixture()).double()
        if mode == "lora":
            lora = LoraConfig(r=2, target_modules=r"0|.*router|.*experts\.\d\.\d", exclude_modules=r".*\.1")
            model = get_peft_model(model, lora, autocast_adapter_dtype=False).double()
        x = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        assert_exact(random_parameters(model), x)

    def test_capacity_that_the_batch_shares_is_refused_when_it_matters(self):
        model = random_parameters(nn.Sequential(nn.Linear(6, 6), Mixture(capacity=8)).double())
        engine = PerSampleGradients(model)
        x = torch.randn(4, 9, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        engine.backward(square_losses(model, x[:2, :2]))
        with pytest.raises(PrivacyError, match="differs from that in the batch"):
            engine.backward(square_losses(model, x))

    @pytest.mark.parametrize("mode", ["full", "lora"])
    def test_switch_transformers(self, mode):
        config = transformers.SwitchTransformersConfig(
            vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, num_experts=3,
            num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, expert_capacity=16, dropout_rate=0.0,
            router_jitter_noise=0.0, decoder_start_token_id=0,
        )  # fmt: skip
        torch.manual_seed(0)
        model = transformers.AutoModelForSeq2SeqLM.from_config(config).double().train()
        if mode == "lora":
            lora = LoraConfig(r=2, target_modules="all-linear")
            model = get_peft_model(model, lora, autocast_adapter_dtype=False).double()

        def losses(model, ids):
            y = model(input_ids=ids, decoder_input_ids=ids[:, :5], use_cache=False).logits
            return y.log_softmax(dim=-1)[:, :, 4].sum(dim=1)

        # the router computes in float32
        assert_exact(random_parameters(model, std=0.1), some_ids(), losses, tolerance=1e-6)


class TestRefusals:
    def test_balance_loss(self):
        model, ids = moe_model("mixtral"), some_ids()
        engine = PerSampleGradients(model)
        outputs = model(input_ids=ids, output_router_logits=True, use_cache=False)
        losses = functional.cross_entropy(outputs.logits[:, -1], ids[:, 0], reduction="none")
        with pytest.raises(PrivacyError, match=r"coupled.*balance loss"):
            engine.backward(losses + 0.01 * outputs.aux_loss)

    @pytest.mark.parametrize("says", ["flag", "number of its own"])
    def test_parallel_experts(self, says):
        model = moe_model("mixtral")
        experts = model.model.layers[1].mlp.experts
        if says == "flag":
            experts._is_expert_parallel = True
        else:  # transformers before it had the flag
            vars(experts).pop("_is_expert_parallel", None)
            experts.num_experts //= 2
        with pytest.raises(PrivacyError, match=r"layers\.1\.mlp\.experts are spread over devices"):
            PerSampleGradients(model)

    @pytest.mark.parametrize("use", ["bias", "weight"])
    def test_router_that_uses_a_parameter_outside_of_its_linear(self, use):
        class OwnRouter(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.ones(3, 4))
                self.bias = nn.Parameter(torch.ones(3))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                weight = self.weight.float()
                if use == "bias":
                    return functional.linear(x, weight, 2 * self.bias.float())
                return x @ weight.t() + functional.linear(x, weight)

        model = nn.Sequential(OwnRouter().double())
        engine = PerSampleGradients(model)
        assert isinstance(engine.paths[0], RouterPath)
        losses = model(torch.randn(2, 4)).sum(dim=1)
        with pytest.raises(PrivacyError, match=rf"0\.{use} got an ordinary gradient"):
            engine.backward(losses)

    def test_unknown_parameter_of_experts(self):
        model = moe_model("mixtral")
        model.model.layers[0].mlp.experts.scale = nn.Parameter(torch.ones(5))
        with pytest.raises(
            PrivacyError, match=r"mlp\.experts \(MixtralExperts\) have no exact path for scale"
        ):
            PerSampleGradients(model)


@pytest.mark.parametrize("slots_per_token", [1, 2])
@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_routed_norms_equal_the_gradients_written_out(tokens, slots_per_token):
    """Few tokens take the Gram matrices, many the gradient itself; one unit uses only one expert."""
    generator = torch.Generator().manual_seed(tokens)
    units, slots, d, p, experts = 3, tokens * slots_per_token, 9, 11, 4
    a = torch.randn(units, tokens, d, generator=generator, dtype=torch.float64)
    g = torch.randn(units, slots, p, generator=generator, dtype=torch.float64)
    expert = torch.randint(0, experts, (units, slots), generator=generator)
    expert[1] = 2
    written = torch.zeros(units, experts, p, d, dtype=torch.float64)
    for unit in range(units):
        for slot in range(slots):
            written[unit, expert[unit, slot]] += torch.outer(g[unit, slot], a[unit, slot // slots_per_token])
    norms = routed_squared_norms(a, g, expert)
    torch.testing.assert_close(norms, written.flatten(1).square().sum(1), rtol=1e-12, atol=0.0)
    assert {index for index, _, _ in by_expert(a, g, expert)} == set(expert.flatten().tolist())


# DeepSeek routes in float32
@pytest.mark.parametrize(
    ("family", "tolerance"),
    [("olmoe", 1e-10), ("mixtral", 1e-10), ("qwen3_moe", 1e-10), ("deepseek_v3", 1e-6)],
)
def test_all_linear_adapts_routers_too(family, tolerance):
    model, ids = moe_model(family), some_ids()
    lora = LoraConfig(r=3, target_modules="all-linear")
    model = get_peft_model(model, lora, autocast_adapter_dtype=False).double().train()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, dtype=torch.float64)
    expected = oracle(copy.deepcopy(model), ids)
    engine = PerSampleGradients(model)
    assert any(".gate.lora_A" in name for name in engine.parameter_names())
    assert relative_error(engine.backward(next_token_losses(model, ids)).materialize(), expected) < tolerance


class Matrix(nn.Module):
    def __init__(self, use, *names: str) -> None:
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.ones(4, 4, dtype=torch.float64)))
        self.use = use

    def forward(self, x):
        return self.use(self, x)


def adapted_matrix(use, *names: str) -> nn.Module:
    config = LoraConfig(r=2, target_modules=[], target_parameters=[f"0.{name}" for name in names])
    model = nn.Sequential(Matrix(use, *names))
    model = get_peft_model(model, config, autocast_adapter_dtype=False).double()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, dtype=torch.float64)
    return model


def test_adapted_matrix_used_in_its_own_way_is_refused():
    model = adapted_matrix(lambda layer, x: x @ layer.weight.square(), "weight")
    PerSampleGradients(model)
    with pytest.raises(PrivacyError, match=r"model.0 \(Matrix\) does not use its weight as a linear"):
        model(torch.ones(3, 4, dtype=torch.float64))


@pytest.mark.parametrize("names", [("weight",), ("other",), ("weight", "other")], ids=" ".join)
def test_adapted_matrices_of_any_name(names):
    def use(layer, x):
        for name in names:
            x = functional.linear(x, getattr(layer, name)).sin()
        return x

    model = adapted_matrix(use, *names)
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert_exact(model, x)
