"""Whole models, in full and with adapters, against ordinary autograd on one sample at a time in float64."""

import copy
import gc
import weakref

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

from securetune.privacy.clipping import FlatClipping
from securetune.privacy.per_sample import PerSampleGradients
from securetune.privacy.per_sample.functional import FunctionalPath, PromptPath
from securetune.privacy.per_sample.lora import LoraPath
from tests.per_sample_oracle import (
    assert_exact,
    next_token_losses,
    one_by_one,
    random_parameters,
    relative_error,
)

VOCAB = 60
_LLAMA_LIKE = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
_BERT_LIKE = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "pad_token_id": 0,
}  # fmt: skip
_WITH_HEAD_DIM = {**_LLAMA_LIKE, "head_dim": 8}


def configs() -> dict[str, transformers.PreTrainedConfig]:
    """Tiny configurations by family."""
    return {
        "gpt2": transformers.GPT2Config(
            vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, bos_token_id=0, eos_token_id=1,
        ),
        "llama": transformers.LlamaConfig(**_LLAMA_LIKE, attention_bias=True, mlp_bias=True),
        "llama tied": transformers.LlamaConfig(**_LLAMA_LIKE, tie_word_embeddings=True),
        "qwen2": transformers.Qwen2Config(**_LLAMA_LIKE),
        "qwen3": transformers.Qwen3Config(**_WITH_HEAD_DIM, tie_word_embeddings=True),
        "mistral": transformers.MistralConfig(**_LLAMA_LIKE),
        "gemma": transformers.GemmaConfig(**_WITH_HEAD_DIM),
        "gemma2": transformers.Gemma2Config(**_WITH_HEAD_DIM),
        "gemma3": transformers.Gemma3TextConfig(**_WITH_HEAD_DIM),
        "phi3": transformers.Phi3Config(**{**_LLAMA_LIKE, "pad_token_id": 0}),
        "opt": transformers.OPTConfig(
            vocab_size=VOCAB, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=64, word_embed_proj_dim=16, dropout=0.0,
        ),
        "neox": transformers.GPTNeoXConfig(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
        ),
        "bert": transformers.BertConfig(**_BERT_LIKE),
        "roberta": transformers.RobertaConfig(
            **{**_BERT_LIKE, "pad_token_id": 1}, bos_token_id=0, eos_token_id=2
        ),
        "distilbert": transformers.DistilBertConfig(
            vocab_size=VOCAB, dim=16, hidden_dim=24, n_layers=2, n_heads=2, max_position_embeddings=64,
            dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0,
        ),
        "albert": transformers.AlbertConfig(
            **_BERT_LIKE, embedding_size=8, classifier_dropout_prob=0.0, bos_token_id=2, eos_token_id=3
        ),
        "deberta": transformers.DebertaV2Config(**_BERT_LIKE, pooler_hidden_size=16),
        "vit": transformers.ViTConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8,
            patch_size=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        ),
    }  # fmt: skip


CAUSAL = ["gpt2", "llama", "llama tied", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "phi3",
          "opt", "neox"]  # fmt: skip
CLASSIFIERS = ["bert", "roberta", "distilbert", "albert", "deberta"]


def make(family: str, *, dtype: torch.dtype = torch.float64, **changes) -> nn.Module:
    config = configs()[family]
    config._attn_implementation = "eager"
    for name, value in changes.items():
        setattr(config, name, value)
    kind = transformers.AutoModelForCausalLM
    if family in CLASSIFIERS:
        kind = transformers.AutoModelForSequenceClassification
    if family == "vit":
        kind = transformers.AutoModelForImageClassification
    torch.manual_seed(0)
    return random_parameters(kind.from_config(config).to(dtype).train(), std=0.05)


def some_ids(batch: int = 3, tokens: int = 9) -> torch.Tensor:
    return torch.randint(4, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(3))


def class_losses(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(model(input_ids=ids).logits, ids[:, 0] % 2, reduction="none")


def image_losses(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    labels = (x.flatten(1).sum(dim=1) > 0).long()
    return functional.cross_entropy(model(pixel_values=x).logits, labels, reduction="none")


def losses_of(family: str):
    return class_losses if family in CLASSIFIERS else next_token_losses


class TestInFull:
    @pytest.mark.parametrize("family", CAUSAL)
    def test_causal_models(self, family):
        assert_exact(make(family), some_ids(), next_token_losses)

    @pytest.mark.parametrize("family", CLASSIFIERS)
    def test_encoders(self, family):
        assert_exact(make(family), some_ids(), class_losses)

    def test_vision_transformer(self):
        x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        assert_exact(make("vit"), x, image_losses)

    @pytest.mark.parametrize("family", ["gpt2", "llama tied"])
    @pytest.mark.parametrize(("batch", "tokens"), [(1, 2), (4, 4), (2, 33)])
    def test_other_shapes(self, family, batch, tokens):
        assert_exact(make(family), some_ids(batch, tokens), next_token_losses)

    @pytest.mark.parametrize("kept", ["norm", "embed_tokens", "lm_head", "bias", "layers.1"])
    def test_partly_frozen(self, kept):
        model = make("llama")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(kept in name)
        assert_exact(model, some_ids(), next_token_losses)

    @pytest.mark.parametrize("family", ["gpt2", "llama"])
    def test_position_ids_of_each_sample(self, family):
        def losses(model, ids):
            positions = torch.arange(ids.shape[1]) + ids[:, :1]  # starts elsewhere in each sample
            logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, :-1]
            each = functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            return each.mean(dim=1)

        ids = some_ids(3, 4)
        ids[:, 0] = torch.tensor([5, 0, 31])
        assert_exact(make(family), ids, losses)


TARGETS = {"llama": {"some": ["q_proj", "down_proj"], "ffn": ["down_proj"], "table": ["embed_tokens"]},
           "gpt2": {"some": ["c_attn", "mlp.c_proj"], "ffn": ["mlp.c_proj"], "table": ["wte"]}}  # fmt: skip


def adapter_config(kind: str, family: str) -> peft.PeftConfig:
    target = TARGETS[family]
    lora = {"r": 3, "target_modules": "all-linear"}
    saved = ["lm_head"] if family == "llama" else ["wpe"]
    task = {"task_type": "CAUSAL_LM"}
    return {
        "lora": lambda: peft.LoraConfig(**lora),
        "rslora": lambda: peft.LoraConfig(**lora, use_rslora=True),
        "dora": lambda: peft.LoraConfig(**lora, use_dora=True),
        "lora bias": lambda: peft.LoraConfig(**lora, lora_bias=True),
        "lora and all biases": lambda: peft.LoraConfig(**lora, bias="all"),
        "lora on embeddings": lambda: peft.LoraConfig(r=3, target_modules=target["table"]),
        "lora and saved modules": lambda: peft.LoraConfig(**lora, modules_to_save=saved),
        "ia3": lambda: peft.IA3Config(
            **task, target_modules=target["some"], feedforward_modules=target["ffn"]
        ),
        "vera": lambda: peft.VeraConfig(r=3, target_modules=target["some"][:1]),
        "vb-lora": lambda: peft.VBLoRAConfig(
            r=2, num_vectors=8, vector_length=4, topk=2, target_modules=target["some"][:1]
        ),
        "prompt tuning": lambda: peft.PromptTuningConfig(**task, num_virtual_tokens=4),
        "p-tuning": lambda: peft.PromptEncoderConfig(**task, num_virtual_tokens=4, encoder_hidden_size=8),
    }[kind]()


def adapted(family: str, kind: str, *, dtype: torch.dtype = torch.float64) -> nn.Module:
    model = peft.get_peft_model(
        make(family, dtype=dtype), adapter_config(kind, family), autocast_adapter_dtype=False
    )
    return random_parameters(model.to(dtype).train(), std=0.1)


def prompted_losses(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The virtual tokens stand in front."""
    logits = model(input_ids=ids).logits
    kept = logits[:, logits.shape[1] - ids.shape[1] : -1]
    return functional.cross_entropy(kept.transpose(1, 2), ids[:, 1:], reduction="none").mean(dim=1)


def prefixed_losses(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids).logits[:, :-1]
    return functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(dim=1)


class TestAdapters:
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    @pytest.mark.parametrize(
        "kind",
        ["lora", "rslora", "dora", "lora bias", "lora and all biases", "lora on embeddings",
         "lora and saved modules", "ia3", "vera", "vb-lora"],
    )  # fmt: skip
    def test_layers(self, family, kind):
        engine = assert_exact(adapted(family, kind), some_ids(), next_token_losses)
        is_fast = any(isinstance(path, LoraPath) for path in engine.paths)
        assert is_fast == (kind in ("lora", "rslora", "lora and all biases", "lora and saved modules"))

    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    @pytest.mark.parametrize("kind", ["prompt tuning", "p-tuning"])
    def test_prompts(self, family, kind):
        engine = assert_exact(adapted(family, kind), some_ids(), prompted_losses)
        assert isinstance(engine.paths[0], PromptPath)

    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    @pytest.mark.parametrize("has_projection", [True, False])
    def test_prefixes(self, family, has_projection):
        config = peft.PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=has_projection,
            encoder_hidden_size=8,
        )  # fmt: skip
        model = peft.get_peft_model(make(family), config).double().train()
        assert_exact(random_parameters(model, std=0.1), some_ids(), prefixed_losses)

    @pytest.mark.parametrize("kind", ["dora", "ia3", "vera"])
    def test_others_under_autocast(self, kind):
        model = adapted("llama", kind, dtype=torch.float32)
        expected = one_by_one(copy.deepcopy(model).double(), some_ids(), next_token_losses)
        # bfloat16 has eight bits
        assert_exact(model, some_ids(), autocast_losses, expected=expected, tolerance=4e-2)


def autocast_losses(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    logits = logits[:, :-1].float()
    return functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(dim=1)


def checkpointed(model: nn.Module, use_reentrant: bool) -> nn.Module:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    return model


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
class TestCheckpointing:
    @pytest.mark.parametrize("use_reentrant", [True, False])
    @pytest.mark.parametrize("family", ["llama tied", "gpt2", "bert"])
    def test_in_full(self, family, use_reentrant):
        assert_exact(
            make(family), some_ids(), losses_of(family), wrap=lambda model: checkpointed(model, use_reentrant)
        )

    @pytest.mark.parametrize("use_reentrant", [True, False])
    @pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "lora and saved modules"])
    def test_adapters(self, kind, use_reentrant):
        assert_exact(
            adapted("llama", kind),
            some_ids(),
            next_token_losses,
            wrap=lambda model: checkpointed(model, use_reentrant),
        )

    def test_before_the_engine(self):
        model = make("llama")
        expected = one_by_one(copy.deepcopy(model), some_ids(), next_token_losses)
        assert_exact(checkpointed(model, False), some_ids(), next_token_losses, expected=expected)

    @pytest.mark.parametrize("use_reentrant", [True, False])
    @pytest.mark.parametrize("kind", ["full", "dora"])
    def test_no_activation_outlives_the_step(self, kind, use_reentrant):
        model = make("llama") if kind == "full" else adapted("llama", kind)
        engine = PerSampleGradients(checkpointed(model, use_reentrant))
        seen = []
        decoder = model.model if kind == "full" else model.base_model.model.model
        for layer in decoder.layers:
            layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(weakref.ref(args[0])))
        losses = next_token_losses(model, some_ids())
        gc.collect()
        assert not any(ref() is not None for ref in seen)  # the forward pass kept nothing from inside a block
        grads = engine.backward(losses)
        del losses
        grads.squared_norms()
        if kind == "full":  # the factors are held until the next pass
            grads = engine.backward(next_token_losses(model, some_ids())[:0])
        gc.collect()
        assert not any(ref() is not None for ref in seen)


class TestCompile:
    @pytest.fixture(autouse=True)
    def _fresh(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @pytest.mark.parametrize("kind", ["full", "lora"])
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_after_the_engine(self, family, kind):
        model = make(family, dtype=torch.float32)
        if kind == "lora":
            model = adapted(family, kind, dtype=torch.float32)
        expected = one_by_one(copy.deepcopy(model).double(), some_ids(), next_token_losses)
        assert_exact(
            model,
            some_ids(),
            next_token_losses,
            expected=expected,
            wrap=lambda model: torch.compile(model, backend="aot_eager"),
            tolerance=1e-5,
        )

    @pytest.mark.parametrize("has_run", [True, False])
    def test_before_the_engine(self, has_run):
        model = make("llama", dtype=torch.float32)
        expected = one_by_one(copy.deepcopy(model).double(), some_ids(), next_token_losses)
        compiled = torch.compile(model, backend="aot_eager")
        if has_run:
            next_token_losses(compiled, some_ids()).sum().backward()
            model.zero_grad()
        engine = assert_exact(compiled, some_ids(), next_token_losses, expected=expected, tolerance=1e-5)
        assert engine.parameter_names()[0] == "model.embed_tokens.weight"


class TestPrecision:
    @pytest.mark.parametrize("family", ["llama tied", "gpt2", "gemma"])
    def test_autocast(self, family):
        model = make(family, dtype=torch.float32)
        expected = one_by_one(copy.deepcopy(model).double(), some_ids(), next_token_losses)
        # bfloat16 has eight bits
        assert_exact(model, some_ids(), autocast_losses, expected=expected, tolerance=4e-2)

    # float16 has eleven bits, bfloat16 eight
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-2), (torch.float16, 1e-2)])
    @pytest.mark.parametrize("kind", ["llama tied", "gpt2", "bert", "lora", "dora"])
    def test_low_precision_weights(self, kind, dtype, tolerance):
        model = adapted("llama", kind, dtype=dtype) if kind in ("lora", "dora") else make(kind, dtype=dtype)
        losses = losses_of(kind)
        truth = copy.deepcopy(model).double()
        # rotary tables and the like are made anew in float64
        expected = one_by_one(truth, some_ids(), losses)

        def wide_losses(model, ids):
            return losses(model, ids).float()

        engine = assert_exact(model, some_ids(), wide_losses, expected=expected, tolerance=tolerance)
        assert engine.backward(wide_losses(model, some_ids())).squared_norms().dtype == torch.float32


@pytest.mark.parametrize("kind", ["llama tied", "gpt2", "lora"])
def test_any_micro_batch_size_gives_the_same_clipped_sum(kind):
    model = adapted("llama", kind) if kind == "lora" else make(kind)
    engine = PerSampleGradients(model)
    ids = some_ids(6, 8)
    sums = []
    for size in (1, 2, 4, 6):
        clipping = FlatClipping(0.1)
        groups = clipping.assign(engine.parameter_names())
        summed = torch.zeros(engine.num_params, dtype=torch.float64)
        for part in ids.split(size):
            grads = engine.backward(next_token_losses(model, part))
            grads.accumulate(clipping.factors(grads.squared_norms(groups)), summed, groups)
        sums.append(summed)
    # factors are rounded to float32
    assert max(relative_error(other, sums[0]) for other in sums[1:]) < 1e-6


def test_state_dict_and_the_model_itself_are_as_without_the_engine():
    model = make("vit")
    names, modules = list(model.state_dict()), [type(module) for module in model.modules()]
    engine = PerSampleGradients(model)
    assert any(isinstance(path, FunctionalPath) for path in engine.paths)
    assert list(model.state_dict()) == names
    assert [type(module) for module in model.modules()] == modules
    engine.detach()
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
