"""Model families whose layers are unusual, against ordinary autograd on one sample at a time in float64."""

import inspect

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from securetune.privacy.per_sample import PerSampleGradients
from tests.per_sample_oracle import assert_exact, random_parameters

VOCAB = 60
_BERT = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
_DECODER = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
_VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip
_FALCON = {
    "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def build(kind, config, mode: str = "full") -> nn.Module:
    """A tiny random model in float64 without dropout, trained in full or through adapters."""
    for name, value in list(vars(config).items()):
        if isinstance(value, float) and "drop" in name:
            setattr(config, name, 0.0)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = kind.from_config(config) if kind.__name__.startswith("Auto") else kind(config)
    model = model.double()
    if mode == "lora":
        lora = LoraConfig(r=3, target_modules="all-linear")
        model = get_peft_model(model, lora, autocast_adapter_dtype=False).double()
    return random_parameters(model.train(), std=0.05)


def losses(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Random sums of each sample's outputs; ids of zero are padding."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    accepted = inspect.signature(base.forward).parameters
    arguments = {"use_cache": False} if "use_cache" in accepted else {}
    if inputs.is_floating_point():
        arguments[next(iter(accepted))] = inputs
    else:
        arguments |= {"input_ids": inputs, "attention_mask": (inputs != 0).long()}
    if base.config.is_encoder_decoder:
        first = inputs[:, :6] if inputs.ndim == 2 else 10 * inputs[:, 0, :6].abs()
        arguments["decoder_input_ids"] = first.long()
    y = model(**arguments).logits
    y = torch.log_softmax(y, dim=-1) + 0.1 * y
    weights = torch.randn(y.shape[1:], generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return (y * weights).flatten(1).sum(dim=1)


def padded_ids(batch: int = 3, tokens: int = 9) -> torch.Tensor:
    ids = torch.randint(4, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(3))
    for row in range(1, batch):
        ids[row, tokens - 2 * row :] = 0
    return ids


def images(size: int = 8) -> torch.Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class TestOutputLayerWhoseHeadOwnsItsBias:
    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("BertConfig", {}),
            ("RobertaConfig", {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}),
            ("ElectraConfig", {"embedding_size": 8}),
        ],
    )
    def test_masked_language_models_with_tied_embeddings(self, name, options):
        config = getattr(transformers, name)(**_BERT | options)
        assert_exact(build(transformers.AutoModelForMaskedLM, config), padded_ids(), losses)


class TestLinearLayerThatMultipliesItself:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"num_kv_heads": 1, "new_decoder_architecture": True},
            {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
        ],
        ids=["multi query", "grouped", "with biases"],
    )
    def test_falcon(self, options):
        config = transformers.FalconConfig(**_FALCON, **options)
        assert_exact(build(transformers.AutoModelForCausalLM, config), padded_ids(), losses)

    @pytest.mark.parametrize("trains", ["weight", "bias"])
    def test_frozen_part(self, trains):
        config = transformers.FalconConfig(**_FALCON, bias=True)
        model = build(transformers.AutoModelForCausalLM, config)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith(f"query_key_value.{trains}"))
        assert_exact(model, padded_ids(), losses)


class TestOperationInPlaceAfterALayer:
    @pytest.mark.parametrize("mode", ["full", "lora"])
    @pytest.mark.parametrize("bias", [True, False])
    def test_relu_in_place(self, mode, bias):
        model = nn.Sequential(
            nn.Linear(6, 8, bias=bias), nn.ReLU(inplace=True), nn.LayerNorm(8), nn.ReLU(inplace=True),
            nn.Linear(8, 3, bias=bias), nn.ReLU(inplace=True),
        )  # fmt: skip
        model = model.double()
        if mode == "lora":
            model = get_peft_model(
                model, LoraConfig(r=3, target_modules=["0", "4"]), autocast_adapter_dtype=False
            ).double()
        x = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        assert_exact(random_parameters(model), x)

    def test_module_whose_own_output_is_kept_by_autograd_is_as_without_the_engine(self):
        class Squashed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale = nn.Parameter(torch.ones(6, dtype=torch.float64))

            def forward(self, x):
                return torch.tanh(x * self.scale)

        model = nn.Sequential(Squashed(), nn.ReLU(inplace=True))
        engine = PerSampleGradients(model)
        x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            engine.backward(model(x).sum(dim=1))

    @pytest.mark.parametrize("mode", ["full", "lora"])
    def test_queries_scaled_in_place(self, mode):
        class Attention(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.query, self.key = nn.Linear(6, 6), nn.Linear(6, 6)

            def forward(self, x):
                query = self.query(x)
                query /= 2.0
                return query.transpose(1, 2).mul_(0.5) @ self.key(x)

        model = nn.Sequential(Attention()).double()
        if mode == "lora":
            lora = LoraConfig(r=3, target_modules=["query", "key"])
            model = get_peft_model(model, lora, autocast_adapter_dtype=False).double()
        x = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        assert_exact(random_parameters(model), x)
