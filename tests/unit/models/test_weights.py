import json

import pytest
import torch
from safetensors.torch import load, save
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, MixtralConfig

from securetune.checkpoints.safe_loading import check_payload
from securetune.errors import CheckpointError
from securetune.models.weights import load_weights, unfreeze, weight_files
from tests.tiny import tiny_model, tiny_tokenizer

V = len(tiny_tokenizer())
SMALL = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED = SMALL | {"num_key_value_heads": 2, "intermediate_size": 48, "bos_token_id": 0, "eos_token_id": 1}
CONFIGS = {
    "tied": LlamaConfig(**GATED, tie_word_embeddings=True),
    "untied": LlamaConfig(**GATED, tie_word_embeddings=False),
    "gpt2": GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "experts": MixtralConfig(**GATED, num_local_experts=4),
}
IDS = torch.tensor([[4, 5, 6, 7]])


@pytest.fixture(params=CONFIGS)
def base(request, tmp_path):
    """A model's folder and another model of the same kind, as if it had been trained."""
    folder = tmp_path / "base"
    tiny_model(CONFIGS[request.param]).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder, tiny_model(CONFIGS[request.param], seed=1)


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def write(files, folder):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("shard_bytes", [1 << 30, 20_000])
def test_the_files_are_the_model_for_transformers_and_for_us(base, tmp_path, shard_bytes):
    folder, trained = base
    files = weight_files(trained, folder, shard_bytes=shard_bytes)
    shards = [name for name in files if name.endswith(".safetensors")]
    assert (len(shards) > 3) == (shard_bytes == 20_000) == ("model.safetensors.index.json" in files)
    for name in files:
        check_payload(name, files[name])
    written = write(files, tmp_path / "written")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(written)), logits(trained))
    text = "it was good"
    assert AutoTokenizer.from_pretrained(written)(text) == AutoTokenizer.from_pretrained(folder)(text)
    fresh = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(load_weights(fresh, list(files), files.__getitem__)), logits(trained))


def test_a_tied_weight_is_written_once_and_equal_models_give_equal_bytes(base):
    folder, trained = base
    files = weight_files(trained, folder)
    assert dict(files) == dict(files)
    stored = sum(tensor.numel() for tensor in load(files["model.safetensors"]).values())
    assert stored == sum(parameter.numel() for parameter in trained.parameters())


def test_the_config_names_the_dtype_and_no_place_or_code(base):
    folder, trained = base
    config = json.loads((folder / "config.json").read_text())
    config |= {"_name_or_path": "/home/me/secret", "auto_map": {"AutoConfig": "evil.Config"}}
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    written = json.loads(weight_files(trained, folder)["config.json"])
    assert written["dtype"] == "float32"
    assert not {"_name_or_path", "auto_map"} & written.keys()


def test_all_weights_are_trained_in_float32():
    model = unfreeze(tiny_model(CONFIGS["tied"], dtype=torch.bfloat16).requires_grad_(False))
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.float32, True)}
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "1 tensors are missing, such as 'model.norm"),
        (lambda tensors: tensors.update(other=torch.zeros(2)), "are unknown, there twice or of another"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.zeros(3)}),
            "such as 'model.norm.weight'",
        ),
    ],
)
def test_weights_of_another_model_are_refused(change, message):
    model = tiny_model(CONFIGS["tied"])
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        load_weights(model, ["config.json", "model.safetensors"], lambda _: save(tensors))


def test_a_weight_in_two_shards_is_refused():
    model = tiny_model(CONFIGS["tied"])
    content = save({name: parameter.detach() for name, parameter in model.named_parameters()})
    with pytest.raises(CheckpointError, match=r"tensors of b\.safetensors are unknown, there twice"):
        load_weights(model, ["a.safetensors", "b.safetensors"], lambda _: content)


def test_damaged_weights_are_refused_by_name():
    with pytest.raises(CheckpointError, match=r"The weights in model\.safetensors cannot be loaded"):
        load_weights(
            tiny_model(CONFIGS["tied"]), ["model.safetensors"], lambda _: b"\x08\0\0\0\0\0\0\0{nonsen}"
        )
