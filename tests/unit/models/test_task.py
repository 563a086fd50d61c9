import types

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    BertConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from securetune.data.collate import Batch, collate
from securetune.data.encode import Example
from securetune.errors import ConfigError
from securetune.models.adapters import adapt
from securetune.models.task import ClassifyHead, GenerateHead
from tests.tiny import LABEL_WORDS, tiny_llama, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
V = len(TOKENIZER)
SMALL = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GATED = SMALL | {"num_key_value_heads": 2, "intermediate_size": 48}
CONFIGS = {
    "llama": LlamaConfig(**GATED, tie_word_embeddings=True),
    "llama-bias-untied": LlamaConfig(**GATED, attention_bias=True, tie_word_embeddings=False),
    "gpt2": GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "qwen2": Qwen2Config(**GATED),
    "qwen3": Qwen3Config(**GATED, head_dim=8),
    "mistral-window": MistralConfig(**GATED, sliding_window=4),
    "gpt-neox": GPTNeoXConfig(**SMALL, intermediate_size=48),
    "opt": OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32),
    "phi-output-bias": PhiConfig(**SMALL, intermediate_size=48),
    "gemma2-softcap": Gemma2Config(**GATED, head_dim=8, final_logit_softcapping=3.0, sliding_window=4),
    "gemma3-scaled-embedding": Gemma3TextConfig(**GATED, head_dim=8, sliding_window=4),
    "cohere-logit-scale": CohereConfig(**GATED, logit_scale=0.25),
    "granite-logits-scaling": GraniteConfig(**GATED, logits_scaling=4.0, embedding_multiplier=2.0),
}
LENGTHS = (9, 1, 5, 13)


def make_batch(lengths=LENGTHS, *, seed=0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for index, length in enumerate(lengths):
        ids = torch.randint(2, V, (length,), generator=generator).tolist()
        supervised = [False, *(torch.rand(length - 1, generator=generator) < 0.5).tolist()]
        supervised[-1] = length > 1
        examples.append(
            Example(
                f"unit{index}", tuple(ids), (True,) * length, label=index % 2, supervised=tuple(supervised)
            )
        )
    return collate(examples, pad_id=1)


def row(batch: Batch, index: int) -> Batch:
    length = int(batch.lengths[index])
    return Batch(
        input_ids=batch.input_ids[index : index + 1, :length],
        lengths=batch.lengths[index : index + 1],
        labels=batch.labels[index : index + 1],
        attack_mask=batch.attack_mask[index : index + 1, :length],
        supervised=batch.supervised[index : index + 1, :length],
        unit_ids=batch.unit_ids[index : index + 1],
    )


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return tiny_model(CONFIGS[request.param], dtype=torch.float64)


def test_label_logits_are_the_models_own(model):
    head, batch = ClassifyHead(model, TOKENIZER, LABEL_WORDS), make_batch()
    logits = head.logits(head.embed(batch), batch)
    assert logits.dtype == torch.float64
    for index, length in enumerate(LENGTHS):
        full = model(input_ids=batch.input_ids[index : index + 1, :length]).logits[0, -1]
        torch.testing.assert_close(logits[index], full[list(head.label_ids)], rtol=0, atol=1e-10)


def test_label_loss_is_cross_entropy_over_the_label_words(model):
    head, batch = ClassifyHead(model, TOKENIZER, LABEL_WORDS), make_batch()
    losses = head.losses(head.embed(batch), batch, label_smoothing=0.1)
    log_probabilities = head.logits(head.embed(batch), batch).log_softmax(dim=1)
    own = log_probabilities[range(len(LENGTHS)), batch.labels]
    torch.testing.assert_close(losses, -(0.9 * own + 0.1 * log_probabilities.mean(dim=1)))


def test_token_losses_are_the_models_own(model):
    head, batch = GenerateHead(model), make_batch()
    losses = head.losses(head.embed(batch), batch)
    for index, length in enumerate(LENGTHS):
        ids, supervised = batch.input_ids[index, :length], batch.supervised[index, :length]
        full = model(input_ids=ids[None]).logits[0].log_softmax(dim=-1)
        own = [-full[t - 1, ids[t]] for t in range(1, length) if supervised[t]]
        expected = torch.stack(own).mean() if own else torch.zeros((), dtype=torch.float64)
        torch.testing.assert_close(losses[index], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("is_frozen", [True, False])
def test_smoothed_token_losses_and_gradients_are_torchs_for_each_sample_alone(model, is_frozen):
    model.requires_grad_(not is_frozen)
    head, batch = GenerateHead(model), make_batch()
    embeds = head.embed(batch).detach().requires_grad_(True)
    losses = head.losses(embeds, batch, label_smoothing=0.2)
    (grad,) = torch.autograd.grad(losses.sum(), embeds)
    for index, length in enumerate(LENGTHS):
        single = row(batch, index)
        own = head.embed(single).detach().requires_grad_(True)
        logits = head._logits(head.hidden_states(own))[0]
        wanted = [t for t in range(1, length) if single.supervised[0, t]]
        targets = single.input_ids[0, wanted]
        before = logits[[t - 1 for t in wanted]]
        truth = F.cross_entropy(before, targets, label_smoothing=0.2) if wanted else 0 * logits.sum()
        torch.testing.assert_close(losses[index], truth, rtol=0, atol=1e-10)
        (own_grad,) = torch.autograd.grad(truth, own)
        torch.testing.assert_close(grad[index, :length], own_grad[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("head_class", [ClassifyHead, GenerateHead])
def test_a_sample_does_not_depend_on_its_batch(model, head_class):
    head = head_class(model, TOKENIZER, LABEL_WORDS) if head_class is ClassifyHead else head_class(model)
    batch = make_batch()
    embeds = head.embed(batch).detach().requires_grad_(True)
    losses = head.losses(embeds, batch)
    (grad,) = torch.autograd.grad(losses.sum(), embeds)
    for index, length in enumerate(LENGTHS):
        single = row(batch, index)
        alone = head.embed(single).detach().requires_grad_(True)
        loss = head.losses(alone, single)
        torch.testing.assert_close(losses[index : index + 1], loss, rtol=0, atol=1e-10)
        if loss.requires_grad and length > 1:
            (own_grad,) = torch.autograd.grad(loss.sum(), alone)
            torch.testing.assert_close(grad[index, :length], own_grad[0], rtol=0, atol=1e-9)
        assert not grad[index, length:].any()


def test_what_padding_holds_does_not_matter():
    head, batch = ClassifyHead(tiny_llama(), TOKENIZER, LABEL_WORDS), make_batch()
    embeds = head.embed(batch)
    is_padding = torch.arange(batch.input_ids.shape[1])[None] >= batch.lengths[:, None]
    noisy = torch.where(is_padding[:, :, None], torch.randn_like(embeds) * 10, embeds)
    assert torch.equal(head.logits(embeds, batch), head.logits(noisy, batch))


def test_a_frozen_output_layer_and_slices_give_the_same_loss_and_gradient(monkeypatch):
    model, batch = tiny_llama(dtype=torch.float64), make_batch((9, 4, 13))
    results = []
    for rows, is_frozen in ((512, False), (3, False), (3, True)):
        monkeypatch.setattr("securetune.models.task._HEAD_ROWS", rows)
        head = GenerateHead(model.requires_grad_(not is_frozen))
        embeds = head.embed(batch).detach().requires_grad_(True)
        losses = head.losses(embeds, batch)
        results.append((losses, *torch.autograd.grad(losses.sum(), embeds)))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("is_frozen", [True, False])
def test_a_batch_without_supervised_tokens_has_zero_loss_and_gradient(is_frozen):
    head, batch = GenerateHead(tiny_llama().requires_grad_(not is_frozen)), make_batch((1, 1))
    embeds = head.embed(batch).detach().requires_grad_(True)
    losses = head.losses(embeds, batch)
    (grad,) = torch.autograd.grad(losses.sum(), embeds)
    assert not losses.any()
    assert not grad.any()


def test_losses_are_float32_for_a_bfloat16_model():
    model, batch = tiny_llama(dtype=torch.bfloat16), make_batch()
    classify, generate = ClassifyHead(model, TOKENIZER, LABEL_WORDS), GenerateHead(model)
    assert classify.embed(batch).dtype == torch.bfloat16
    assert classify.losses(classify.embed(batch), batch).dtype == torch.float32
    assert generate.losses(generate.embed(batch), batch).dtype == torch.float32


def test_heads_work_through_adapters_and_keep_the_mode():
    model = adapt(
        tiny_llama(), types.SimpleNamespace(rank=2, alpha=4, dropout=0.5, target_modules="all-linear")
    )
    model.train()
    head, batch = ClassifyHead(model, TOKENIZER, LABEL_WORDS), make_batch()
    assert all(module.training for module in model.modules())
    model.eval()
    before = head.logits(head.embed(batch), batch)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert not torch.allclose(before, head.logits(head.embed(batch), batch))


def test_labels_are_needed_for_a_loss():
    head = ClassifyHead(tiny_llama(), TOKENIZER, LABEL_WORDS)
    batch = collate([Example("unit", (5, 6), (True, True), None, (False, False))])
    with pytest.raises(ValueError, match="labels is None"):
        head.losses(head.embed(batch), batch)


def test_a_model_that_changes_its_logits_in_an_unknown_way_is_refused():
    model = tiny_llama().requires_grad_(False)
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 1.5 + 1)
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM \(model_type 'llama'\) computes its logits"):
        GenerateHead(model)


def test_an_encoder_is_refused():
    config = BertConfig(**SMALL, intermediate_size=48, is_decoder=False)
    with pytest.raises(ConfigError, match="computes its logits in a way that is not known"):
        GenerateHead(tiny_model(config))


def test_a_bidirectional_llama_is_refused():
    model = tiny_llama()
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    with pytest.raises(ConfigError, match="not causal"):
        GenerateHead(model)
