"""What may lie in a checkpoint: no pickles, no code, strict safetensors headers, inert adapter settings."""

import math
import os
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from securetune.errors import CheckpointError

from ._json import parse_strict

_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill", ".npy", ".npz"}
_CODE_SUFFIXES = {".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".sh", ".bat", ".ps1", ".exe", ".jar"}
_WEIGHT_SUFFIXES = {".safetensors", ".gguf", ".ggml", ".onnx", ".h5", ".msgpack", ".tflite"}
_ZIP_MAGIC = b"PK\x03\x04"
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_MAX_CONFIG_BYTES = 1 << 20
_MAX_TENSOR_NAME = 512
_DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
_MODULE_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")


def check_file_name(name: str) -> None:
    """Refuse names whose content a loader would execute.

    Args:
        name: Path or name of a file.

    Raises:
        CheckpointError: If the name says that the file is a pickle or code.
    """
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in _PICKLE_SUFFIXES:
        raise CheckpointError(
            f"{name} is in a format that can hold a pickle ({suffix}), and loading a pickle runs code. "
            "Store tensors as .safetensors and everything else as JSON."
        )
    if suffix in _CODE_SUFFIXES:
        raise CheckpointError(
            f"{name} is code ({suffix}), which does not belong into a checkpoint. Remove it."
        )


def check_public_payload(name: str, head: bytes) -> None:
    """Refuse what must not lie in a checkpoint unsealed.

    Args:
        name: The file's name.
        head: Its first bytes, at least 4 where it has them.

    Raises:
        CheckpointError: If the file holds weights, a pickle or code.
    """
    check_file_name(name)
    if PurePosixPath(name).suffix.lower() in _WEIGHT_SUFFIXES:
        raise CheckpointError(
            f"{name} holds tensors in clear where only sealed ones are allowed. Seal it instead."
        )
    _check_magic(name, head)


def check_payload(name: str, content: bytes) -> None:
    """Check one sealed file's content before anything loads it; see :func:`check_payload_at`."""
    check_payload_at(name, lambda offset, count: content[offset : offset + count], len(content))


def check_payload_at(name: str, read_at: Callable[[int, int], bytes], size: int) -> None:
    """Check one sealed file's content before anything loads it.

    Args:
        name: The file's name; ``*.safetensors`` and ``adapter_config.json`` are checked in full.
        read_at: ``read_at(offset, count)`` returns that part of the content.
        size: Size of the content in bytes.

    Raises:
        CheckpointError: If the content is a pickle, code, a malformed safetensors file or unsafe adapter
            settings.
    """
    check_file_name(name)
    if name.lower().endswith(".safetensors"):
        _check_safetensors(name, read_at, size)
    elif name == "adapter_config.json":
        check_adapter_config(read_at(0, _MAX_CONFIG_BYTES + 1), name=name)
    else:
        _check_magic(name, read_at(0, 4))


def check_safetensors_bytes(content: bytes, *, name: str = "the file") -> None:
    """Check a safetensors file in memory; see :func:`check_safetensors_file`."""
    _check_safetensors(name, lambda offset, count: content[offset : offset + count], len(content))


def check_safetensors_file(path: str | os.PathLike[str]) -> None:
    """Check the header of a safetensors file more strictly than the library does.

    Guarantees:
        Refused: duplicate keys, fields beyond ``dtype``, ``shape`` and ``data_offsets``, unknown dtypes,
            sizes that do not
        match shape and dtype, holes, overlaps, trailing bytes, metadata that is not text, and tensor names
        that are empty, longer than 512 characters, absolute, or hold ``..``, a backslash or control
        characters. Tensor values are not looked at.

    Args:
        path: The file.

    Raises:
        CheckpointError: If the header breaks one of the rules.
    """
    with Path(path).open("rb") as file:
        descriptor = file.fileno()
        _check_safetensors(
            os.fspath(path),
            lambda offset, count: os.pread(descriptor, count, offset),
            os.fstat(descriptor).st_size,
        )


def check_adapter_config(content: bytes, *, name: str = "adapter_config.json") -> dict[str, Any]:
    """Check the settings of a LoRA adapter against a list of what is allowed.

    Guarantees:
        Nothing in accepted settings names code, imports a module or is used as a regular expression:
        ``auto_mapping``, ``auto_map``, ``megatron_config``, a ``target_modules`` pattern and the like are
        refused. A field that is not known is accepted only if it says nothing (``null``, ``false``, empty).

    Args:
        content: The bytes of ``adapter_config.json``.
        name: What to call the file in an error message.

    Returns:
        The settings. ``base_model_name_or_path`` is information, not something to load without asking.

    Raises:
        CheckpointError: If a field is missing, unknown or has a value that is not allowed.
    """
    settings = parse_strict(content, name, max_bytes=_MAX_CONFIG_BYTES, floats=True)
    if not isinstance(settings, dict) or not {"peft_type", "r", "target_modules"} <= settings.keys():
        raise CheckpointError(f"{name} must be an object with peft_type, r and target_modules.")
    for field, value in settings.items():
        allowed = _ADAPTER_FIELDS.get(field)
        if value is None or value is False or value in ({}, []):
            if field in ("peft_type", "r", "target_modules"):
                raise CheckpointError(f"{name}: {field} must be set.")
        elif allowed is None or not allowed(value):
            raise CheckpointError(
                f"{name}: {field} = {str(value)[:80]!r} is not allowed in a checkpoint. Save a plain LoRA "
                "adapter with task_type set and target_modules given as a list of names."
            )
    return settings


def _check_magic(name: str, head: bytes) -> None:
    if len(head) >= 2 and head[0] == 0x80 and 2 <= head[1] <= 5:
        raise CheckpointError(
            f"{name} is a pickle, and loading a pickle runs code. Store tensors as .safetensors."
        )
    if head[:4] == _ZIP_MAGIC:
        raise CheckpointError(
            f"{name} is a zip archive, as torch.save writes them. Store tensors as .safetensors."
        )


def _check_safetensors(name: str, read_at: Callable[[int, int], bytes], size: int) -> None:
    header_bytes = int.from_bytes(read_at(0, 8), "little") if size >= 8 else 0
    if not 2 <= header_bytes <= min(_MAX_HEADER_BYTES, size - 8):
        raise CheckpointError(
            f"{name} is not a safetensors file: its header would have {header_bytes} bytes."
        )
    raw = read_at(8, header_bytes)
    if not raw.startswith(b"{"):
        raise CheckpointError(f"{name} is not a safetensors file: its header does not start with '{{'.")
    header = parse_strict(raw.rstrip(b" "), f"the header of {name}", max_bytes=_MAX_HEADER_BYTES)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{name}: __metadata__ must map text to text.")
    end = 0
    for start, stop, tensor in sorted(_check_tensor(name, *item) for item in header.items()):
        if start != end:
            raise CheckpointError(
                f"{name}: tensor {tensor!r} starts at byte {start}, but {end} was expected."
            )
        end = stop
    if end != size - 8 - header_bytes:
        raise CheckpointError(f"{name}: the tensors end at byte {end} of {size - 8 - header_bytes}.")


def _check_tensor(name: str, tensor: str, fields: Any) -> tuple[int, int, str]:
    if not 0 < len(tensor) <= _MAX_TENSOR_NAME or re.search(r"[\x00-\x1f\x7f\\]|^/|(^|/)\.\.(/|$)", tensor):
        raise CheckpointError(f"{name}: the tensor name {tensor[:80]!r} is not allowed.")
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"{name}: tensor {tensor!r} must have dtype, shape and data_offsets, nothing else."
        )
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPE_BYTES:
        raise CheckpointError(
            f"{name}: tensor {tensor!r} has the dtype {dtype!r}; known: {', '.join(_DTYPE_BYTES)}."
        )
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise CheckpointError(
            f"{name}: tensor {tensor!r} must have a list of sizes and two offsets, none negative."
        )
    if offsets[1] - offsets[0] != math.prod(shape) * _DTYPE_BYTES[dtype]:
        raise CheckpointError(
            f"{name}: tensor {tensor!r} has a size that does not match its shape and dtype."
        )
    return offsets[0], offsets[1], tensor


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 512


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 65536


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, str) and _MODULE_NAME.fullmatch(item) for item in value
    )


def _are_named_numbers(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _are_names(list(value))
        and all(_is_number(item) for item in value.values())
    )


# what peft 0.21 writes for a plain LoRA adapter; every field that is not here must say nothing
_ADAPTER_FIELDS: dict[str, Callable[[Any], bool]] = {
    "alpha_pattern": _are_named_numbers,
    "base_model_name_or_path": _is_text,
    "bias": lambda value: value in ("none", "all", "lora_only"),
    "ensure_weight_tying": _is_flag,
    "exclude_modules": _are_names,
    "fan_in_fan_out": _is_flag,
    "inference_mode": _is_flag,
    "init_lora_weights": lambda value: value is True or value == "gaussian",
    "layers_to_transform": lambda value: type(value) is int or _are_counts(value),
    "lora_alpha": _is_number,
    "lora_bias": _is_flag,
    "lora_dropout": lambda value: _is_number(value) and 0 <= value < 1,
    "megatron_core": lambda value: value == "megatron.core",
    "modules_to_save": _are_names,
    "peft_type": lambda value: value == "LORA",
    "peft_version": _is_text,
    "qalora_group_size": lambda value: type(value) is int,
    "r": _is_rank,
    "rank_pattern": _are_named_numbers,
    "revision": _is_text,
    "target_modules": lambda value: value == "all-linear" or _are_names(value),
    "task_type": lambda value: (
        value in ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")
    ),
    "use_dora": _is_flag,
    "use_rslora": _is_flag,
}
