"""A trace of one private step: every op of the step runs its kernel, and the result is that without them."""

import importlib

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from securetune.privacy.clipping import FlatClipping
from securetune.privacy.noise import NoiseSource
from securetune.privacy.per_sample import PerSampleGradients
from securetune.privacy.step import PrivateStep
from tests.unit.privacy.test_step import Uncharged

pytest.importorskip("triton")

LAUNCHERS = {
    "clip_and_accumulate": ["clip_and_accumulate_triton"],
    "clipped_linear_grad": ["clipped_linear_grad_triton"],
    "embedding_grad_norms": ["embedding_grad_norms_triton", "tied_cross_products_triton"],
    "linear_grad_norms": ["linear_grad_norms_triton"],
    "lora_per_sample_grads": ["lora_per_sample_grads_triton"],
    "per_sample_sums": ["per_sample_sums_triton"],
    "noisy_step": ["noisy_adamw_step_triton", "noisy_sgd_step_triton"],
}
ADAPTERS = {"lora_per_sample_grads_triton", "clip_and_accumulate_triton", "noisy_adamw_step_triton"}
IN_FULL = {
    "linear_grad_norms_triton",
    "clipped_linear_grad_triton",
    "embedding_grad_norms_triton",
    "tied_cross_products_triton",
    "per_sample_sums_triton",
    "noisy_adamw_step_triton",
}


def tiny_model(*, with_adapters: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, tie_word_embeddings=True,
        )
    )  # fmt: skip
    if with_adapters:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def step_of(model: torch.nn.Module, device: torch.device) -> torch.Tensor:
    """Take one private step and return the parameters after it."""
    grads = PerSampleGradients(model.to(device))
    private = PrivateStep(
        grads,
        torch.optim.AdamW([grads.flat_params], lr=0.01),
        clipping=FlatClipping(0.5),
        noise_multiplier=0.7,
        expected_batch_size=4,
        noise=NoiseSource(bytes(range(32))),
        ledger=Uncharged(0.7),
        fused=True,
    )
    ids = torch.randint(31, (3, 5), generator=torch.Generator().manual_seed(1)).to(device)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    private.accumulate(losses.view(3, -1).mean(dim=1))
    private.finish()
    return grads.flat_params.detach().clone()


@pytest.fixture
def launched(monkeypatch):
    """Names of the launchers that ran."""
    names: set[str] = set()
    for op, launchers in LAUNCHERS.items():
        module = importlib.import_module(f"securetune_kernels.{op}.triton_kernels")
        for name in launchers:
            launch = getattr(module, name)

            def record(*args, _launch=launch, _name=name, **kwargs):
                names.add(_name)
                return _launch(*args, **kwargs)

            monkeypatch.setattr(module, name, record)
    return names


@pytest.mark.parametrize(("with_adapters", "expected"), [(True, ADAPTERS), (False, IN_FULL)])
def test_every_op_of_the_step_runs_its_kernel(with_adapters, expected, launched, monkeypatch, kernel_device):
    monkeypatch.setenv("SECURETUNE_BACKEND", "torch")
    truth = step_of(tiny_model(with_adapters=with_adapters), kernel_device)
    assert launched == set()
    monkeypatch.setenv("SECURETUNE_BACKEND", "triton")
    found = step_of(tiny_model(with_adapters=with_adapters), kernel_device)
    assert expected <= launched
    assert torch.equal(found, step_of(tiny_model(with_adapters=with_adapters), kernel_device))
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5)
