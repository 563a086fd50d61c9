"""What may lie in a checkpoint: pickles, strict safetensors headers, adapter settings."""

import json
import pickle
import zipfile

import pytest

from securetune.checkpoints import (
    check_adapter_config,
    check_payload,
    check_safetensors_bytes,
    check_safetensors_file,
)
from securetune.checkpoints.safe_loading import check_public_payload
from securetune.errors import CheckpointError


def safetensors(header, data=b"", *, raw=None, declared=None):
    text = json.dumps(header).encode() if raw is None else raw
    return (len(text) if declared is None else declared).to_bytes(8, "little") + text + data


def tensor(start=0, end=4, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def test_real_file_is_accepted(tensors, tmp_path):
    check_safetensors_bytes(tensors)
    (tmp_path / "x.safetensors").write_bytes(tensors)
    check_safetensors_file(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({}, b""),
        ({"a": tensor()}, bytes(4)),
        ({"a": tensor(0, 0, (0, 5))}, b""),
        ({"a": tensor(0, 2, (), "BF16")}, bytes(2)),
        ({"b": tensor(4, 8), "a": tensor(), "__metadata__": {"format": "pt"}}, bytes(8)),
        ({"base_model.model.layers.0.q_proj.lora_A.weight": tensor(), "step/1": tensor(4, 8)}, bytes(8)),
    ],
)
def test_ordinary_header_is_accepted(header, data):
    check_safetensors_bytes(safetensors(header, data))


BAD_FILES = {
    "empty": b"",
    "seven bytes": bytes(7),
    "header size zero": bytes(8),
    "header beyond the file": safetensors({}, declared=3),
    "header of 2**63 bytes": safetensors({}, declared=2**63),
    "header over 100 MB": safetensors({}, declared=100_000_001),
    "not JSON": safetensors({}, raw=b"{nope}"),
    "a list": safetensors([]),
    "leading space": safetensors({}, raw=b" {}"),
    "NUL after the header": safetensors({}, raw=b"{}\0"),
    "invalid UTF-8": safetensors({}, raw=b'{"\xff":1}'),
    "duplicate tensor": safetensors(
        {}, bytes(4), raw=b'{"a":%s,"a":%s}' % ((json.dumps(tensor()).encode(),) * 2)
    ),
    "duplicate metadata": safetensors({}, raw=b'{"__metadata__":{},"__metadata__":{}}'),
    "duplicate field": safetensors(
        {}, bytes(4), raw=b'{"a":{"dtype":"I8","dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    ),
    "hole": safetensors({"a": tensor(), "b": tensor(8, 12)}, bytes(12)),
    "overlap": safetensors({"a": tensor(), "b": tensor(2, 6)}, bytes(6)),
    "same bytes twice": safetensors({"a": tensor(), "b": tensor()}, bytes(4)),
    "hole at the start": safetensors({"a": tensor(4, 8)}, bytes(8)),
    "trailing bytes": safetensors({"a": tensor()}, bytes(5)),
    "data missing": safetensors({"a": tensor()}, bytes(3)),
    "shape does not fit": safetensors({"a": tensor(0, 4, (2,))}, bytes(4)),
    "shape overflows": safetensors({"a": tensor(0, 4, (2**31, 2**33))}, bytes(4)),
    "negative shape": safetensors({"a": tensor(0, 4, (-1,))}, bytes(4)),
    "shape with a float": safetensors({"a": tensor(0, 4, (1.0,))}, bytes(4)),
    "shape with a bool": safetensors({"a": tensor(0, 4, (True,))}, bytes(4)),
    "offsets reversed": safetensors({"a": tensor(4, 0)}, bytes(4)),
    "three offsets": safetensors({"a": tensor() | {"data_offsets": [0, 4, 4]}}, bytes(4)),
    "unknown dtype": safetensors({"a": tensor(dtype="F128")}, bytes(4)),
    "dtype a list": safetensors({"a": tensor() | {"dtype": ["F32"]}}, bytes(4)),
    "extra field": safetensors({"a": tensor() | {"enc": 1}}, bytes(4)),
    "field missing": safetensors({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)),
    "metadata not text": safetensors({"__metadata__": {"a": 1}}),
    "metadata a list": safetensors({"__metadata__": []}),
} | {
    f"tensor name {name!r}": safetensors({name: tensor()}, bytes(4))
    for name in ("", "../x", "a/../b", "..", "/x", "a\0b", "a\nb", "a\\b", "x" * 513)
}


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_safetensors_file_is_refused(content):
    with pytest.raises(CheckpointError):
        check_safetensors_bytes(content)


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "rng_state.pth", "optimizer.pt", "x.PKL", "x.pickle", "data.npz", "shards/a.ckpt"],
)
def test_pickle_is_refused_by_name(name):
    with pytest.raises(CheckpointError, match="pickle"):
        check_payload(name, b"harmless")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "notes.txt"])
def test_pickle_under_another_name_is_refused(name, protocol):
    with pytest.raises(CheckpointError):
        check_payload(name, pickle.dumps({"a": 1}, protocol))


def test_zip_as_torch_writes_it_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x", "w") as archive:
        archive.writestr("data.pkl", b"x")
    content = (tmp_path / "x").read_bytes()
    with pytest.raises(CheckpointError, match="zip"):
        check_payload("tokenizer.json", content)
    with pytest.raises(CheckpointError):
        check_payload("model.safetensors", content)


def test_safetensors_followed_by_a_zip_is_refused(tensors, tmp_path):
    with zipfile.ZipFile(tmp_path / "x", "w") as archive:
        archive.writestr("data.pkl", b"x")
    with pytest.raises(CheckpointError):
        check_payload("model.safetensors", tensors + (tmp_path / "x").read_bytes())


@pytest.mark.parametrize("name", ["modeling_x.py", "lib.so", "run.sh"])
def test_code_is_refused(name):
    with pytest.raises(CheckpointError, match="code"):
        check_payload(name, b"")


@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf", "model.onnx"])
def test_weights_are_refused_among_public_files(name):
    with pytest.raises(CheckpointError, match="in clear"):
        check_public_payload(name, b"")


ADAPTER = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj"],
    "task_type": "CAUSAL_LM",
}


def config(**changes):
    return json.dumps(ADAPTER | changes).encode()


def test_settings_that_peft_writes_are_accepted(tmp_path):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    settings.save_pretrained(tmp_path)
    assert check_adapter_config((tmp_path / "adapter_config.json").read_bytes())["r"] == 4


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"target_modules": "all-linear"}, {"rank_pattern": {"layers.0": 8}}, {"new_field": None},
        {"new_flag": False},
        {"base_model_name_or_path": "some/model"}, {"modules_to_save": ["classifier"]},
        {"init_lora_weights": True},
    ],
    ids=str,
)  # fmt: skip
def test_inert_settings_are_accepted(changes):
    assert check_adapter_config(config(**changes))["peft_type"] == "LORA"


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_mapping": {"base_model_class": "X", "parent_library": "os"}},
        {"auto_map": {"AutoModel": "evil.Model"}},
        {"trust_remote_code": True},
        {"_attn_implementation_internal": "org/kernel"},
        {"megatron_core": "evil.module"},
        {"megatron_config": {"a": 1}},
        {"loftq_config": {"a": 1}},
        {"eva_config": {"a": 1}},
        {"target_modules": "(a+)+$"},
        {"target_modules": ["(a+)+$"]},
        {"target_modules": []},
        {"rank_pattern": {"(a+)+$": 8}},
        {"exclude_modules": ".*"},
        {"layers_pattern": "(a+)+"},
        {"init_lora_weights": "pissa"},
        {"peft_type": "IA3"},
        {"peft_type": None},
        {"r": 0}, {"r": True}, {"r": 1.5}, {"r": 10**9},
        {"lora_dropout": 1.0}, {"lora_alpha": "8"}, {"bias": "some"}, {"task_type": "X"},
        {"base_model_name_or_path": ["x"]},
        {"unknown": 1},
    ],
    ids=str,
)  # fmt: skip
def test_active_or_unknown_settings_are_refused(changes):
    with pytest.raises(CheckpointError, match=next(iter(changes))):
        check_adapter_config(config(**changes))


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"r":4,"r":5}', b"\xff"])
def test_malformed_settings_are_refused(content):
    with pytest.raises(CheckpointError):
        check_adapter_config(content)
