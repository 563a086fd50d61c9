"""Per-sample LoRA gradients against the truth: ordinary autograd on one sample at a time, in float64."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import GPT2Config, MixtralConfig, Qwen2Config

from securetune.errors import PrivacyError
from securetune.privacy.per_sample import PerSampleGradients
from securetune.privacy.per_sample.lora import ActiveAdapter, LoraPath
from tests.tiny import tiny_llama, tiny_model

VOCAB = 300


def adapted(
    base: nn.Module, *, targets="all-linear", dtype=torch.float64, seed: int = 0, **options
) -> nn.Module:
    """Put adapters with a non-zero ``B`` on a base model, so that both matrices have a gradient."""
    base.requires_grad_(False)
    torch.manual_seed(seed)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=targets, **options)
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = (torch.randn(parameter.shape, dtype=torch.float64) * 0.1).to(dtype)
    return model.eval()


def bases() -> dict[str, nn.Module]:
    gpt2 = GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=1
    )
    qwen = Qwen2Config(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return {
        "llama": tiny_llama(vocab_size=VOCAB, dtype=torch.float64),
        "gpt2": tiny_model(gpt2, dtype=torch.float64),
        "qwen2": tiny_model(qwen, dtype=torch.float64),
    }


def next_token_losses(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(dim=1)


def oracle(model: nn.Module, ids: torch.Tensor, *, losses=next_token_losses) -> torch.Tensor:
    """One sample at a time, through peft's own forward and ordinary autograd; rows in the engine's order."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for row in range(len(ids)):
        grads = torch.autograd.grad(losses(model, ids[row : row + 1]).sum(), parameters, allow_unused=True)
        pairs = zip(grads, parameters, strict=True)
        rows.append(torch.cat([torch.zeros(p.numel()) if g is None else g.flatten() for g, p in pairs]))
    return torch.stack(rows)


def rows(engine: PerSampleGradients, losses: torch.Tensor) -> torch.Tensor:
    return engine.backward(losses).materialize()


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 2), (3, 7), (2, 33)])
def test_rows_equal_autograd_on_one_sample(family, batch, tokens):
    model = adapted(bases()[family])
    ids = torch.randint(0, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(1))
    expected = oracle(copy.deepcopy(model), ids)
    engine = PerSampleGradients(model)
    torch.testing.assert_close(rows(engine, next_token_losses(model, ids)), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("targets", [["q_proj"], ["v_proj", "down_proj"]])
def test_partial_targets_and_frozen_rest(targets):
    model = adapted(bases()["llama"], targets=targets)
    ids = torch.randint(0, VOCAB, (3, 9))
    expected = oracle(copy.deepcopy(model), ids)
    engine = PerSampleGradients(model)
    torch.testing.assert_close(rows(engine, next_token_losses(model, ids)), expected, rtol=1e-9, atol=1e-12)


def test_rank_stabilised_scaling():
    model = adapted(bases()["llama"], use_rslora=True)
    ids = torch.randint(0, VOCAB, (2, 6))
    expected = oracle(copy.deepcopy(model), ids)
    torch.testing.assert_close(
        rows(PerSampleGradients(model), next_token_losses(model, ids)), expected, rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    model = adapted(bases()["llama"])
    ids = torch.randint(0, VOCAB, (3, 8))
    expected = oracle(copy.deepcopy(model), ids)
    engine = PerSampleGradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    model.train()
    torch.testing.assert_close(rows(engine, next_token_losses(model, ids)), expected, rtol=1e-9, atol=1e-12)


def test_module_used_twice_in_one_forward():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6).double()

        def forward(self, x):
            return self.linear(torch.tanh(self.linear(x)))

    model = adapted(Twice(), targets=["linear"])
    x = torch.randn(4, 3, 6, dtype=torch.float64)

    def losses(model, x):
        return model(x).square().flatten(1).sum(dim=1)

    expected = oracle(copy.deepcopy(model), x, losses=losses)
    torch.testing.assert_close(
        rows(PerSampleGradients(model), losses(model, x)), expected, rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 6), (4, 2, 3, 6)])
def test_inputs_of_any_rank(shape):
    model = adapted(nn.Sequential(nn.Linear(6, 5).double()), targets=["0"])
    x = torch.randn(shape, dtype=torch.float64)

    def losses(model, x):
        return model(x).square().flatten(1).sum(dim=1)

    expected = oracle(copy.deepcopy(model), x, losses=losses)
    torch.testing.assert_close(
        rows(PerSampleGradients(model), losses(model, x)), expected, rtol=1e-9, atol=1e-12
    )


def test_input_gradient_is_unchanged():
    model = adapted(bases()["llama"])
    embeds = torch.randn(2, 5, 32, dtype=torch.float64)

    def gradient(model):
        x = embeds.clone().requires_grad_(True)
        return torch.autograd.grad(model(inputs_embeds=x, use_cache=False).logits.square().sum(), x)[0]

    expected = gradient(copy.deepcopy(model))
    engine = PerSampleGradients(model)
    before = rows(engine, next_token_losses(model, torch.randint(0, VOCAB, (2, 5))))
    torch.testing.assert_close(gradient(model), expected, rtol=1e-9, atol=1e-12)
    # an attack's backward pass leaves the buffer and every .grad alone
    torch.testing.assert_close(engine._buffer[:2], before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dropout_draws_one_mask_for_forward_and_gradient():
    model = adapted(bases()["llama"], lora_dropout=0.5)
    reference = copy.deepcopy(model)
    ids = torch.randint(0, VOCAB, (2, 6))
    engine = PerSampleGradients(model)
    for candidate in (model, reference):
        candidate.train()
    torch.manual_seed(5)
    recorded = rows(engine, next_token_losses(model, ids))
    torch.manual_seed(5)
    parameters = [p for p in reference.parameters() if p.requires_grad]
    summed = torch.autograd.grad(next_token_losses(reference, ids).sum(), parameters)
    torch.testing.assert_close(
        recorded.sum(dim=0), torch.cat([g.flatten() for g in summed]), rtol=1e-9, atol=1e-12
    )


def test_empty_batch_and_unused_layer():
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Linear(4, 4).double()
            self.unused = nn.Linear(4, 4).double()

        def forward(self, x):
            return self.used(x)

    model = adapted(Branch(), targets=["used", "unused"])
    engine = PerSampleGradients(model)
    engine._buffer = torch.full((3, engine.num_params), float("nan"), dtype=torch.float64)
    assert rows(engine, torch.zeros(0)).shape == (0, engine.num_params)
    recorded = rows(engine, model(torch.randn(3, 2, 4, dtype=torch.float64)).flatten(1).sum(dim=1))
    assert recorded.isfinite().all()
    unused = [place for place in engine.parameters if ".unused." in place.name]
    assert len(unused) == 2
    assert not any(recorded[:, place.start : place.stop].any() for place in unused)


@settings(max_examples=10)
@given(batch=st.integers(2, 4), tokens=st.integers(2, 12), seed=st.integers(0, 1000))
def test_other_samples_do_not_matter(batch, tokens, seed):
    model = adapted(tiny_llama(vocab_size=VOCAB, dtype=torch.float64))
    engine = PerSampleGradients(model)
    ids = torch.randint(0, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))
    together = rows(engine, next_token_losses(model, ids))
    without_first = rows(engine, next_token_losses(model, ids[1:]))
    torch.testing.assert_close(together[1:], without_first, rtol=1e-9, atol=1e-12)


def test_bfloat16_base_keeps_float32_rows_close_to_the_truth():
    base = tiny_llama(vocab_size=VOCAB)
    truth_model = adapted(copy.deepcopy(base).double())
    model = adapted(base.to(torch.bfloat16), dtype=torch.float32)
    ids = torch.randint(0, VOCAB, (3, 8))
    truth = oracle(truth_model, ids)
    recorded = rows(PerSampleGradients(model), next_token_losses(model, ids).float())
    assert recorded.dtype == torch.float32
    assert (recorded.double() - truth).norm() < 0.1 * truth.norm()  # bfloat16 activations: eight bits


def test_parameters_become_views_of_one_flat_vector():
    model = adapted(bases()["llama"])
    engine = PerSampleGradients(model)
    with torch.no_grad():
        engine.flat_params.zero_()
    assert all(not p.any() for p in model.parameters() if p.requires_grad)
    names = engine.parameter_names()
    assert len(names) == len(set(names)) == 2 * len(engine.paths)


def test_detach_gives_peft_its_forward_back():
    model = adapted(bases()["llama"])
    ids = torch.randint(0, VOCAB, (2, 5))
    engine = PerSampleGradients(model)
    patched = next_token_losses(model, ids)
    engine.detach()
    torch.testing.assert_close(next_token_losses(model, ids), patched, rtol=1e-9, atol=1e-12)
    next_token_losses(model, ids).sum().backward()
    assert any(p.grad is not None for p in model.parameters())


def test_disabled_adapter_runs_the_base():
    model = adapted(bases()["llama"])
    ids = torch.randint(0, VOCAB, (2, 5))
    engine = PerSampleGradients(model)
    assert engine.num_params > 0
    with model.disable_adapter():
        off = next_token_losses(model, ids)
    assert not torch.allclose(off, next_token_losses(model, ids))


class TestRefusals:
    def test_batch_mean_loss(self):
        model = adapted(bases()["llama"])
        loss = next_token_losses(model, torch.randint(0, VOCAB, (2, 5))).mean()
        with pytest.raises(PrivacyError, match=r"one value per sample, shape \[B\], got shape \(\)"):
            PerSampleGradients(model).backward(loss)

    def test_model_without_trainable_parameters(self):
        with pytest.raises(PrivacyError, match="no trainable parameter"):
            PerSampleGradients(bases()["llama"].requires_grad_(False))

    def test_rows_that_no_sample_owns(self):
        model = adapted(nn.Sequential(nn.Linear(6, 5).double()), targets=["0"])
        engine = PerSampleGradients(model)
        x = torch.randn(5, 6, dtype=torch.float64)
        with pytest.raises(PrivacyError, match="saw 5 rows where the batch has 2 samples"):
            engine.backward(model(x).sum().expand(2))

    def test_plain_backward_would_train_nothing(self):
        model = adapted(bases()["llama"])
        PerSampleGradients(model)
        with pytest.raises(PrivacyError, match="Give the losses"):
            next_token_losses(model, torch.randint(0, VOCAB, (2, 5))).mean().backward()


class TestSelfCheck:
    def losses_of(self, model, ids):
        return lambda rows: next_token_losses(model, ids[rows])

    def test_passes_and_reports_a_small_difference(self):
        model = adapted(bases()["llama"])
        engine = PerSampleGradients(model)
        assert engine.check(self.losses_of(model, torch.randint(0, VOCAB, (2, 6))), 2) < 1e-9

    def test_finds_a_loss_that_couples_samples(self):
        model = adapted(bases()["llama"])
        ids = torch.randint(0, VOCAB, (2, 6))

        def coupled(rows):
            losses = next_token_losses(model, ids[rows])
            return losses / len(rows)  # a token count over the batch does the same

        with pytest.raises(PrivacyError, match="without its batch-mates"):
            PerSampleGradients(model).check(coupled, 2)

    def test_finds_a_wrong_gradient(self, monkeypatch):
        model = adapted(bases()["llama"])
        engine = PerSampleGradients(model)
        monkeypatch.setattr(ActiveAdapter, "scaling", 7.0)
        with pytest.raises(PrivacyError, match="differs from ordinary autograd"):
            engine.check(self.losses_of(model, torch.randint(0, VOCAB, (2, 6))), 2)

    def test_finds_a_wrong_gradient_of_a_in_fresh_adapters(self, monkeypatch):
        # B = 0 makes the gradient of A zero on both sides, and any error in it invisible
        model = adapted(bases()["llama"])
        engine = PerSampleGradients(model)
        with torch.no_grad():
            for path in engine.paths:
                path.layer.b.zero_()
        before = engine.flat_params.detach().clone()
        record = LoraPath.record
        monkeypatch.setattr(LoraPath, "record", lambda self, x, h, g, low: record(self, x, h, g, -7 * low))
        with pytest.raises(PrivacyError, match="differs from ordinary autograd"):
            engine.check(self.losses_of(model, torch.randint(0, VOCAB, (2, 6))), 2)
        assert torch.equal(engine.flat_params.detach(), before)

    @pytest.mark.parametrize(
        ("config", "starts_at_zero_gradient"),
        [
            (LoraConfig(r=3, target_modules=["q_proj"], use_dora=True), "lora_A"),
            (LoHaConfig(r=3, target_modules=["q_proj"]), "hada_w1"),
            (LoKrConfig(r=3, target_modules=["q_proj"]), "lokr_w2"),
            (LoraConfig(r=3, target_modules=[], target_parameters=["experts.down_proj"]), "lora_A"),
        ],
        ids=["dora", "loha", "lokr", "experts"],
    )
    def test_finds_a_wrong_gradient_in_fresh_adapters_of_any_kind(
        self, monkeypatch, config, starts_at_zero_gradient
    ):
        base = bases()["llama"]
        if config.peft_type == "LORA" and config.target_parameters:
            mixtral = MixtralConfig(
                vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                num_attention_heads=2, num_key_value_heads=1, num_local_experts=3, bos_token_id=0,
                eos_token_id=1,
            )  # fmt: skip
            mixtral._experts_implementation = "eager"
            base = tiny_model(mixtral, dtype=torch.float64)
        base.requires_grad_(False)
        model = get_peft_model(base, config, autocast_adapter_dtype=False).double().eval()
        engine = PerSampleGradients(model)
        before = engine.flat_params.detach().clone()
        losses_of = self.losses_of(model, torch.randint(0, VOCAB, (2, 6)))
        engine.check(losses_of, 2)
        record = engine.record_rows

        def wrong(place, grads, name):
            record(place, -7 * grads if starts_at_zero_gradient in place.name else grads, name)

        monkeypatch.setattr(engine, "record_rows", wrong)
        with pytest.raises(PrivacyError, match="differs from ordinary autograd"):
            engine.check(losses_of, 2)
        assert torch.equal(engine.flat_params.detach(), before)

    def test_finds_one_small_wrong_matrix(self, monkeypatch):
        model = adapted(bases()["llama"])
        engine = PerSampleGradients(model)
        losses_of = self.losses_of(model, torch.randint(0, VOCAB, (2, 6)))
        sizes = rows(engine, losses_of([0, 1])).sum(dim=0)
        smallest = min(
            engine.paths,
            key=lambda path: sum(float(sizes[p.start : p.stop].norm()) for p in path.row_places()),
        )
        right = smallest.layer.scaling
        signed = property(lambda adapter: -right if adapter is smallest.layer else right)
        monkeypatch.setattr(ActiveAdapter, "scaling", signed)
        with pytest.raises(PrivacyError, match="differs from ordinary autograd"):
            engine.check(losses_of, 2)

    def test_finds_adapters_that_get_no_gradient(self):
        model = adapted(bases()["llama"])
        engine = PerSampleGradients(model)
        with pytest.raises(PrivacyError, match="no gradient reaches the trainable parameters"):
            engine.check(lambda rows: torch.zeros(len(rows), requires_grad=True) * 1.0, 2)
