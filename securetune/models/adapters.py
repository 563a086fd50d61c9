"""LoRA adapters: put onto a base model, turned into files, opened again by plain transformers."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from securetune.errors import CheckpointError, ConfigError
from securetune.files import parse_json, write_atomic

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_BASE_KEY = "base_model_name_or_path"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


class LoraOptions(Protocol):
    """What the ``training.lora`` section of a recipe says."""

    @property
    def rank(self) -> int:
        """Rank of each adapter."""
        ...

    @property
    def alpha(self) -> float:
        """An adapter's output is scaled by ``alpha / rank``."""
        ...

    @property
    def dropout(self) -> float:
        """Dropout before each adapter."""
        ...

    @property
    def target_modules(self) -> Sequence[str]:
        """Names of the layers, or ``all-linear``."""
        ...


def adapt(model: "PreTrainedModel", lora: LoraOptions, *, seed: int = 0) -> "PeftModel":
    """Put fresh LoRA adapters onto a frozen base model.

    Guarantees:
        Exactly the adapters are trainable, in float32 whatever the base's dtype. The adapted model computes
        what the base computes until the first step. The global random state is left as it was.

    Args:
        model: The base model; changed in place.
        lora: The recipe's ``training.lora`` section.
        seed: Decides the adapters' initial weights, which are public.

    Returns:
        The peft model around ``model``, in evaluation mode.

    Raises:
        ConfigError: If a target module does not exist or must not be adapted.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    check_targets(model, lora.target_modules)
    targets = "all-linear" if lora.target_modules == "all-linear" else list(lora.target_modules)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=lora.dropout,
        target_modules=targets,
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
        task_type=TaskType.CAUSAL_LM,
    )
    model.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted.eval()


def check_targets(model: "PreTrainedModel", targets: Sequence[str]) -> None:
    """Refuse what adapters cannot be put on.

    Args:
        model: The base model.
        targets: ``training.lora.target_modules``: names, or ``"all-linear"``.

    Raises:
        ConfigError: If a target module does not exist or must not be adapted.
    """
    if targets == "all-linear":
        return
    output = model.get_output_embeddings()
    names: dict[str, list[nn.Module]] = {}
    for path, module in model.named_modules():
        # GPT-2 calls its linear layers Conv1D
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            names.setdefault(path.rpartition(".")[2], []).append(module)
    usable = sorted(
        name for name, modules in names.items() if not any(module is output for module in modules)
    )
    wrong = [target for target in targets if target.rpartition(".")[2] not in usable]
    if wrong:
        raise ConfigError(
            f"training.lora.target_modules: {', '.join(map(repr, wrong))} cannot be adapted in"
            f" {type(model).__name__}. Linear layers that can: {', '.join(usable)}; or use 'all-linear'."
        )


def adapter_files(
    model: "PeftModel", *, base_name: str, trained: Mapping[str, torch.Tensor] | None = None
) -> dict[str, bytes]:
    """Turn the adapters into the files peft itself would write.

    Args:
        model: From :func:`adapt` or :func:`load_adapter`.
        base_name: How the recipe names the base model; written instead of a path on this machine.
        trained: The adapters' weights by parameter name; None takes those of the model, which is then whole.

    Returns:
        ``adapter_config.json`` and ``adapter_model.safetensors``. Equal adapters give equal bytes.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save

    config = model.peft_config["default"].to_dict()
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    config |= {_BASE_KEY: base_name, "inference_mode": True}
    state = get_peft_model_state_dict(model, state_dict=trained, save_embedding_layers=False)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(state.items())}
    return {
        CONFIG_FILE: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
        WEIGHTS_FILE: save(tensors, metadata={"format": "pt"}),
    }


def load_adapter(model: "PreTrainedModel", files: Mapping[str, bytes]) -> "PeftModel":
    """Put saved adapters onto a base model.

    Args:
        model: The base model the adapters were trained on; changed in place.
        files: As from :func:`adapter_files`.

    Returns:
        The peft model, its adapters in float32 and trainable, in evaluation mode.

    Raises:
        CheckpointError: If a file is missing or damaged, or the adapters do not fit the model.
    """
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load

    missing = {CONFIG_FILE, WEIGHTS_FILE} - set(files)
    if missing:
        raise CheckpointError(f"The adapter lacks {', '.join(sorted(missing))}.")
    settings = _adapter_settings(files[CONFIG_FILE])
    try:
        config = LoraConfig(**settings | {"inference_mode": False, _BASE_KEY: None})
        model.requires_grad_(False)
        with torch.random.fork_rng():
            adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
        tensors = load(files[WEIGHTS_FILE])
    except (SafetensorError, TypeError, ValueError) as error:
        raise CheckpointError(f"The adapter cannot be loaded: {error}") from error
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    wrong = set(expected) ^ set(tensors)
    wrong |= {name for name in set(expected) & set(tensors) if expected[name].shape != tensors[name].shape}
    if wrong:
        raise CheckpointError(
            f"The adapter does not fit {type(model).__name__}: {len(wrong)} tensors are missing, unknown or"
            f" of another shape, such as {min(wrong)!r}. Load it onto the base model it was trained on."
        )
    set_peft_model_state_dict(adapted, tensors)
    return adapted.eval()


def open_adapter_folder(folder: Path, base_folder: Path) -> None:
    """Make a folder of adapter files loadable with ``AutoModelForCausalLM.from_pretrained(folder)``.

    Writes the path of the base into ``adapter_config.json`` and copies the base's tokenizer files that are
    missing.

    Args:
        folder: Holds the files of :func:`adapter_files`; changed in place.
        base_folder: A local folder of the base model.

    Raises:
        CheckpointError: If ``folder`` holds no adapter.
    """
    path = folder / CONFIG_FILE
    if not path.is_file() or not (folder / WEIGHTS_FILE).is_file():
        raise CheckpointError(
            f"{folder} holds no adapter: {CONFIG_FILE} and {WEIGHTS_FILE} are expected there."
        )
    settings = _adapter_settings(path.read_bytes()) | {_BASE_KEY: str(base_folder.resolve())}
    write_atomic(path, json.dumps(settings, indent=2, sort_keys=True) + "\n")
    for name in _TOKENIZER_FILES:
        if (base_folder / name).is_file() and not (folder / name).exists():
            shutil.copyfile(base_folder / name, folder / name)


def merge_adapter(model: "PeftModel") -> "PreTrainedModel":
    """Fold the adapters into the base weights, for use without peft.

    Args:
        model: Changed in place; its base should be in float32, since merging rounds to the base's dtype.

    Returns:
        The plain transformers model.
    """
    return model.merge_and_unload(safe_merge=True)  # pyright: ignore[reportCallIssue, reportReturnType]


def _adapter_settings(content: bytes) -> dict[str, Any]:
    try:
        settings = parse_json(content, CONFIG_FILE)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        raise CheckpointError(f"{CONFIG_FILE} does not describe a LoRA adapter.")
    return settings
