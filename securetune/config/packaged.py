"""The recipes and configs that come with securetune: in the checkout, or inside the installed wheel."""

import difflib
from pathlib import Path
from typing import NamedTuple

import securetune
from securetune.errors import ConfigError, MachineError

_ENDINGS = {".py": "recipe", ".yaml": "config", ".yml": "config"}


class PackagedFile(NamedTuple):
    """A recipe or config that comes with securetune."""

    name: str
    """What the user types, such as ``quickstart`` or ``harden.py``."""
    path: Path
    """Where the file lies."""
    kind: str
    """``"recipe"`` (Python) or ``"config"`` (YAML)."""
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
        Recipes first, then configs, each group by name.
    """
    folder = recipes_folder()
    found = []
    for path in sorted([*folder.glob("*.py"), *folder.glob("configs/**/*.y*ml")]):
        kind = _ENDINGS[path.suffix]
        name = (
            path.name if kind == "recipe" else path.relative_to(folder / "configs").with_suffix("").as_posix()
        )
        found.append(PackagedFile(name, path, kind, _summary(path)))
    return sorted(found, key=lambda file: (file.kind != "recipe", file.name))


def find_packaged(name: str) -> PackagedFile:
    """Find a recipe or config by the name ``securetune ls`` shows.

    Args:
        name: The name; the ending of a config may be left out or given.

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
    raise ConfigError(f"no recipe or config named '{name}' comes with securetune. {hint}")


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


def _summary(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        line = file.readline().strip()
    return line.strip('#"').strip()
