"""All weights of a model: unfrozen for training, turned into files, put back."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from securetune.errors import CheckpointError
from securetune.files import LazyFiles, read_json
from securetune.models.base import TOKENIZER_FILES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG_FILE = "config.json"
_COPIED = ("generation_config.json", *TOKENIZER_FILES)
_SUFFIX = ".safetensors"
_INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 1 << 30  # a shard is held in memory while it is sealed
_MAX_CONFIG_BYTES = 16 << 20
# the code of another model, where this one was, and what it was stored as
_NOT_KEPT = ("auto_map", "_name_or_path", "torch_dtype")


def unfreeze(model: "PreTrainedModel") -> "PreTrainedModel":
    """Make all weights of a model trainable, in float32.

    Args:
        model: The model; changed in place.

    Returns:
        The same model, in evaluation mode.
    """
    return model.float().requires_grad_(True).eval()  # pyright: ignore[reportReturnType]


def weight_files(
    model: nn.Module,
    base_folder: Path,
    *,
    trained: Mapping[str, Tensor] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> LazyFiles:
    """Turn a whole model into the files that transformers reads.

    Guarantees:
        A folder of these files loads with ``from_pretrained`` and is the model, tokenizer included. It names
        no folder of this machine and no code. Equal models give equal bytes.

    Args:
        model: The model, with its buffers; a tied weight is written once.
        base_folder: The folder it was loaded from, for its configuration and its tokenizer.
        trained: Its weights by name; None takes those of the model, which is then whole.
        shard_bytes: Size from which on weights are split; a larger weight has a shard of its own.

    Returns:
        The files by name, each made when it is taken out.
    """
    tensors = {**_own_tensors(model), **(trained or {})}
    shards: list[list[str]] = []
    room = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if not shards or size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    count = len(shards)
    named = {
        f"model{_SUFFIX}" if count == 1 else f"model-{number:05}-of-{count:05}{_SUFFIX}": names
        for number, names in enumerate(shards, start=1)
    }
    makers = {CONFIG_FILE: partial(_config, base_folder, next(iter(tensors.values())).dtype)}
    copied = [path for name in _COPIED if (path := base_folder / name).is_file()]
    makers |= {path.name: path.read_bytes for path in copied}
    if count > 1:
        makers[_INDEX_FILE] = partial(_index, tensors, named)
    makers |= {
        file: partial(_shard, {name: tensors[name] for name in names}) for file, names in named.items()
    }
    return LazyFiles(makers)


def load_weights(
    model: "PreTrainedModel", names: Sequence[str], read: Callable[[str], bytes]
) -> "PreTrainedModel":
    """Put saved weights into a model, one shard after another.

    Args:
        model: A model of the same architecture; changed in place.
        names: Names of the saved files.
        read: Reads one of them.

    Returns:
        The same model.

    Raises:
        CheckpointError: If the files are damaged, or their weights are not exactly those of the model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    own = _own_tensors(model)
    missing = set(own)
    for name in names:
        if not name.endswith(_SUFFIX):
            continue
        try:
            tensors = load(read(name))
        except (SafetensorError, ValueError) as error:
            raise CheckpointError(f"The weights in {name} cannot be loaded: {error}") from error
        wrong = {key for key in tensors if key not in missing or own[key].shape != tensors[key].shape}
        if wrong:
            raise CheckpointError(
                f"The weights do not fit {type(model).__name__}: {len(wrong)} tensors of {name} are unknown, "
                f"there twice or of another shape, such as {min(wrong)!r}. Load them into the model they "
                "were trained from."
            )
        missing -= tensors.keys()
        with torch.no_grad():
            for key, tensor in tensors.items():
                own[key].copy_(tensor)
    if missing:
        raise CheckpointError(
            f"The weights do not fit {type(model).__name__}: {len(missing)} tensors are missing, such as "
            f"{min(missing)!r}. The checkpoint is not of this model, or not whole."
        )
    return model


def _shard(tensors: Mapping[str, Tensor]) -> bytes:
    from safetensors.torch import save

    contents = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save(contents, metadata={"format": "pt"})


def _index(tensors: Mapping[str, Tensor], shards: Mapping[str, Sequence[str]]) -> bytes:
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    where = {name: file for file, names in shards.items() for name in names}
    return _json({"metadata": {"total_size": total}, "weight_map": where})


def _own_tensors(model: nn.Module) -> Mapping[str, Tensor]:
    """Weights and saved buffers by name, a tied weight under the first of its names."""
    parameters = dict(model.named_parameters())
    shared = {id(parameter) for parameter in parameters.values()}
    saved = model.state_dict(keep_vars=True)
    return parameters | {name: tensor for name, tensor in saved.items() if id(tensor) not in shared}


def _config(base_folder: Path, dtype: torch.dtype) -> bytes:
    config = read_json(base_folder / CONFIG_FILE, _MAX_CONFIG_BYTES)
    stored_as = str(dtype).removeprefix("torch.")
    kept = {key: config[key] for key in config if key not in _NOT_KEPT} | {"dtype": stored_as}
    return _json(kept)


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
