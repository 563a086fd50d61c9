"""The recipes, configs and launch files that come with securetune: in the checkout, or in the wheel."""

import difflib
from pathlib import Path
from typing import NamedTuple

import securetune
from securetune.errors import ConfigError, MachineError

_KINDS = {"recipe": "*.py", "config": "configs/**/*.y*ml", "launch": "accelerate/*.yaml"}


class PackagedFile(NamedTuple):
    """A recipe, config or launch file that comes with securetune."""

    name: str
    """What the user types, such as ``quickstart``, ``harden.py`` or ``accelerate/ddp``."""
    path: Path
    """Where the file lies."""
    kind: str
    """``"recipe"`` (Python), ``"config"`` (YAML) or ``"launch"`` (YAML for accelerate)."""
    summary: str
    """Its first line of documentation."""


def recipes_folder() -> Path:
    """Find the folder of the recipes.

    Returns:
        ``recipes/`` of the checkout, or the copy inside the installed package.

    Raises:
        MachineError: If neither exists.
    """
    package = Path(securetune.__file__).resolve().parent
    candidates = (package / "_recipes", package.parent / "recipes")
    for folder in candidates:
        if (folder / "configs").is_dir():
            return folder
    raise MachineError(
        f"the recipes are missing: neither {candidates[0]} nor {candidates[1]} exists. Reinstall securetune."
    )


def packaged_files() -> list[PackagedFile]:
    """List what comes with securetune.

    Returns:
        Recipes first, then configs, then launch files, each group by name.
    """
    folder = recipes_folder()
    found = []
    for kind, pattern in _KINDS.items():
        for path in sorted(folder.glob(pattern)):
            place = path.relative_to(folder)
            name = place.as_posix() if kind == "recipe" else place.with_suffix("").as_posix()
            found.append(PackagedFile(name.removeprefix("configs/"), path, kind, _summary(path)))
    return found


def find_packaged(name: str) -> PackagedFile:
    """Find a recipe, config or launch file by the name ``securetune ls`` shows.

    Args:
        name: The name; the ending of a YAML file may be left out or given.

    Returns:
        The file.

    Raises:
        ConfigError: If there is none of that name, with the nearest one.
    """
    files = packaged_files()
    for file in files:
        if name in (file.name, file.path.name):
            return file
    names = [file.name for file in files]
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"Did you mean '{close[0]}'?" if close else f"There are: {', '.join(names)}."
    raise ConfigError(f"no recipe, config or launch file named '{name}' comes with securetune. {hint}")


def find_config(name_or_path: str) -> Path:
    """Find a config to run: a file, or one that comes with securetune.

    Args:
        name_or_path: A path, or a name such as ``quickstart``.

    Returns:
        The path of a YAML file.

    Raises:
        ConfigError: If there is neither such a file nor such a name.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    if path.suffix or len(path.parts) > 1:
        raise ConfigError(f"{name_or_path}: no such file. 'securetune ls' lists what comes with securetune.")
    found = find_packaged(name_or_path)
    if found.kind != "config":
        raise ConfigError(f"{name_or_path} is not a config. 'securetune ls' lists the configs.")
    return found.path


def find_launch_file(name_or_path: str) -> Path:
    """Find a configuration of ``accelerate launch``: a file, or one that comes with securetune.

    Args:
        name_or_path: A path, or a name such as ``accelerate/ddp``, or ``ddp`` for short.

    Returns:
        The path of a YAML or JSON file.

    Raises:
        ConfigError: If there is neither such a file nor such a name.
    """
    if Path(name_or_path).is_file():
        return Path(name_or_path)
    files = {file.name: file.path for file in packaged_files() if file.kind == "launch"}
    if found := files.get(name_or_path) or files.get(f"accelerate/{name_or_path}"):
        return found
    raise ConfigError(
        f"{name_or_path}: no such file, and no launch file that comes with securetune: {', '.join(files)}."
    )


def _summary(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        line = file.readline().strip()
    return line.strip('#"').strip()
