"""Model families whose layers are unusual, against ordinary autograd on one sample at a time in float64."""

import inspect

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from securetune.errors import PrivacyError
from securetune.privacy.per_sample import PerSampleGradients
from tests.per_sample_oracle import (
    assert_exact,
    random_parameters,
)

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
_SPEECH = {
    "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 24, "conv_dim": [8, 8], "conv_stride": [4, 2], "conv_kernel": [8, 4],
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
    "apply_spec_augment": False, "pad_token_id": 0,
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


_ENCODER_DECODER = {
    "vocab_size": VOCAB, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
    "decoder_start_token_id": 0,
}  # fmt: skip


class TestTableOfRelativePositionsLookedUpOnceForAllSamples:
    @pytest.mark.parametrize(
        ("name", "options"),
        [("T5Config", {}), ("UMT5Config", {}), ("LongT5Config", {"local_radius": 4})],
        ids=["t5", "a table for each layer", "blocks"],
    )
    def test_t5(self, name, options):
        config = getattr(transformers, name)(**_ENCODER_DECODER, **options)
        assert_exact(build(transformers.AutoModelForSeq2SeqLM, config), padded_ids(), losses)

    @pytest.mark.parametrize("batch", [1, 2])
    def test_few_samples(self, batch):
        config = transformers.T5Config(**_ENCODER_DECODER)
        assert_exact(build(transformers.AutoModelForSeq2SeqLM, config), padded_ids(batch), losses)

    @pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_under_gradient_checkpointing(self, use_reentrant):
        def checkpointed(model):
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
            )
            return model

        config = transformers.T5Config(**_ENCODER_DECODER)
        model = build(transformers.AutoModelForSeq2SeqLM, config)
        assert_exact(model, padded_ids(), losses, wrap=checkpointed)

    def test_evaluation_of_another_number_of_samples_in_between(self):
        config = transformers.T5Config(**_ENCODER_DECODER)
        model = build(transformers.AutoModelForSeq2SeqLM, config)
        with torch.no_grad():
            expected = losses(model, padded_ids(2))
        PerSampleGradients(model)
        losses(model, padded_ids(3))
        with torch.no_grad():
            torch.testing.assert_close(losses(model, padded_ids(2)), expected)

    def test_mpnet(self):
        config = transformers.MPNetConfig(**_BERT | {"pad_token_id": 1}, bos_token_id=0, eos_token_id=2)
        model = build(transformers.AutoModelForSequenceClassification, config)
        assert_exact(model, padded_ids(), losses)

    @pytest.mark.parametrize("shared", [True, False])
    def test_beit(self, shared):
        config = transformers.BeitConfig(
            **_VISION, use_shared_relative_position_bias=shared, use_relative_position_bias=not shared
        )
        assert_exact(build(transformers.AutoModelForImageClassification, config), images(), losses)

    @pytest.mark.parametrize("batch", [3, 1])
    @pytest.mark.parametrize("name", ["SwinConfig", "Swinv2Config"])
    def test_windows_that_are_more_rows_than_samples(self, name, batch):
        config = getattr(transformers, name)(
            image_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=2
        )
        model = build(transformers.AutoModelForImageClassification, config)
        assert_exact(model, images(16)[:batch], losses)

    @pytest.mark.parametrize("kind", ["table", "row"])
    def test_module_without_arguments(self, kind):
        class Bias(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.ones(1, 4, 6))

            def forward(self):
                return self.weight.square() if kind == "row" else self.weight[0].square()

        class Biased(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.bias = Bias()

            def forward(self, x):
                return x * self.bias()

        model = random_parameters(nn.Sequential(Biased()).double())
        x = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        if kind == "row":
            assert_exact(model, x)
            return
        engine = PerSampleGradients(model)
        with pytest.raises(PrivacyError, match="saw 4 rows"):
            engine.backward(model(x).sum(dim=(1, 2)))


class TestPositionTableThatIsIndexed:
    def test_whisper(self):
        config = transformers.WhisperConfig(
            vocab_size=VOCAB, num_mel_bins=8, d_model=16, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
            max_source_positions=16, max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=3, suppress_tokens=[], begin_suppress_tokens=[],
        )  # fmt: skip
        model = build(transformers.WhisperForConditionalGeneration, config)
        x = torch.randn(3, 8, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        assert_exact(model, x, losses)

    @pytest.mark.parametrize("tokens", [9, 3])
    def test_blenderbot_looks_positions_up_once_for_all_samples(self, tokens):
        config = transformers.BlenderbotConfig(
            vocab_size=VOCAB, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=64,
        )  # fmt: skip
        model = build(transformers.AutoModelForSeq2SeqLM, config)
        assert_exact(model, padded_ids(3, 9)[:, :tokens], losses)

    def test_subclass_of_a_table_with_one_id_for_each_sample(self):
        class Largest(nn.Embedding):
            def forward(self, x):
                return super().forward(x.argmax(dim=1))

        x = torch.tensor([[0.1, 3.0, 0.2], [2.0, 0.0, 1.0], [0.0, 1.0, 2.0]], dtype=torch.float64)
        assert_exact(random_parameters(nn.Sequential(Largest(3, 6), nn.Linear(6, 3)).double()), x)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [True, False])
class TestLayerOfItsOwnParametersThatCheckpointsItself:
    @staticmethod
    def checkpointed(use_reentrant: bool):
        def wrap(model):
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
            )
            return model

        return wrap

    def test_beit_scales_its_layers(self, use_reentrant):
        model = build(transformers.AutoModelForImageClassification, transformers.BeitConfig(**_VISION))
        assert_exact(model, images(), losses, wrap=self.checkpointed(use_reentrant))

    def test_wav2vec2_owns_the_embedding_of_what_is_masked(self, use_reentrant):
        x = torch.randn(3, 120, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        model = build(transformers.AutoModelForCTC, transformers.Wav2Vec2Config(**_SPEECH))
        assert_exact(model, x, losses, wrap=self.checkpointed(use_reentrant))


class TestModuleWithSeveralOutputs:
    @pytest.mark.parametrize("fills_a_cache", [True, False])
    def test_attention_sinks_of_gpt_oss(self, fills_a_cache):
        config = transformers.GptOssConfig(
            **_DECODER, head_dim=8, num_local_experts=4, num_experts_per_tok=2,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )  # fmt: skip
        config._experts_implementation = "eager"
        model = build(transformers.AutoModelForCausalLM, config)
        assert any("sinks" in name for name, _ in model.named_parameters())
        # parts of its attention compute in float32

        def cached_losses(model, ids):
            y = model(input_ids=ids, attention_mask=(ids != 0).long()).logits
            return y.log_softmax(dim=-1)[:, :, 4].sum(dim=1)

        assert_exact(model, padded_ids(), cached_losses if fills_a_cache else losses, tolerance=1e-6)


class TestOperationThatDoesNotVectorise:
    def test_samples_run_one_after_another(self, caplog):
        config = transformers.Wav2Vec2Config(**_SPEECH)

        def masked_losses(model, x):
            y = model(input_values=x, attention_mask=(x != 0).long()).logits
            weights = torch.randn(y.shape[1:], generator=torch.Generator().manual_seed(7), dtype=y.dtype)
            return (y.log_softmax(dim=-1) * weights).flatten(1).sum(dim=1)

        x = torch.randn(3, 120, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        x[1, 90:] = x[2, 60:] = 0.0
        model = build(transformers.AutoModelForCTC, config)
        assert_exact(model, x, masked_losses)
        messages = [record.message for record in caplog.records if "once for each sample" in record.message]
        assert len(messages) == 1
        assert "Wav2Vec2Model" in messages[0]


class TestDisentangledAttention:
    @staticmethod
    def config(**options):
        defaults = {
            "relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm",
            "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False,
            "pooler_hidden_size": 16,
        }  # fmt: skip
        return transformers.DebertaV2Config(**_BERT, **defaults | options)

    @pytest.mark.parametrize("mode", ["full", "lora"])
    @pytest.mark.parametrize(
        "options",
        [{}, {"norm_rel_ebd": "none", "share_att_key": False}, {"pos_att_type": ["c2p"]}],
        ids=["v3", "own keys of positions", "one direction"],
    )
    def test_deberta(self, mode, options):
        model = build(transformers.AutoModelForSequenceClassification, self.config(**options), mode)
        assert_exact(model, padded_ids(), losses)

    @pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_under_gradient_checkpointing(self, use_reentrant):
        def checkpointed(model):
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
            )
            return model

        model = build(transformers.AutoModelForSequenceClassification, self.config())
        assert_exact(model, padded_ids(), losses, wrap=checkpointed)

    def test_dropout_of_the_table(self):
        model = build(transformers.AutoModelForSequenceClassification, self.config())
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.3
        engine = PerSampleGradients(model)
        torch.manual_seed(4)
        found = engine.backward(losses(model, padded_ids())).materialize()
        with engine.ordinary_autograd():
            torch.manual_seed(4)
            values = losses(model, padded_ids())
            parameters = list(model.parameters())
            rows = [torch.autograd.grad(value, parameters, retain_graph=True) for value in values]
        expected = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
        assert float((found - expected).norm() / expected.norm()) < 1e-12

    def test_first_deberta_with_adapters(self):
        config = transformers.DebertaConfig(
            **_BERT, relative_attention=True, pos_att_type=["p2c", "c2p"], pooler_hidden_size=16
        )
        model = build(transformers.AutoModelForSequenceClassification, config, "lora")
        assert_exact(model, padded_ids(), losses)

    def test_first_deberta_in_full_is_refused_by_name(self):
        config = transformers.DebertaConfig(
            **_BERT, relative_attention=True, pos_att_type=["p2c", "c2p"], pooler_hidden_size=16
        )
        model = build(transformers.AutoModelForSequenceClassification, config)
        engine = PerSampleGradients(model)
        with pytest.raises(PrivacyError, match=r"rel_embeddings\.weight got an ordinary gradient"):
            engine.backward(losses(model, padded_ids()))
        engine.detach()
        model.deberta.encoder.rel_embeddings.requires_grad_(False)
        assert_exact(model, padded_ids(), losses)

    def test_table_used_elsewhere_is_refused_by_name(self):
        model = build(transformers.AutoModelForSequenceClassification, self.config())
        engine = PerSampleGradients(model)
        values = losses(model, padded_ids()) + model.deberta.encoder.get_rel_embedding().square().sum()
        with pytest.raises(PrivacyError, match=r"saw|is used outside of disentangled attention"):
            engine.backward(values)


class TestLayerWhoseWeightIsTakenByAnother:
    @pytest.mark.parametrize("kept", ["", "bias"])
    def test_head_of_mobilebert(self, kept):
        config = transformers.MobileBertConfig(
            **_BERT | {"num_hidden_layers": 1}, embedding_size=8, intra_bottleneck_size=16,
            true_hidden_size=16,
        )  # fmt: skip
        model = build(transformers.AutoModelForMaskedLM, config)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(kept in name)
        assert_exact(model, padded_ids(), losses)


class TestConvolutionWhoseWeightGoesToAKernel:
    def test_lfm2(self):
        config = transformers.Lfm2Config(**_DECODER, layer_types=["conv", "full_attention"])
        assert_exact(build(transformers.AutoModelForCausalLM, config), padded_ids(), losses)

    @pytest.mark.parametrize("kept", ["", "conv1d.bias", "conv1d.weight"])
    def test_mamba(self, kept):
        config = transformers.MambaConfig(
            vocab_size=VOCAB, hidden_size=16, state_size=4, num_hidden_layers=2, conv_kernel=3,
            bos_token_id=0, eos_token_id=1, pad_token_id=0,
        )  # fmt: skip
        model = build(transformers.AutoModelForCausalLM, config)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(kept in name)
        assert_exact(model, padded_ids(), losses)
