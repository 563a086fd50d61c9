"""``--set section.option=value``: changes to a recipe from the command line."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

from securetune.config.rules import Problem
from securetune.config.yaml_text import OptionPath, parse_yaml
from securetune.errors import ConfigError


class Overridden(NamedTuple):
    """A recipe's values after its overrides."""

    values: dict[str, Any]
    """The changed values; the input is left as it was."""
    origins: dict[OptionPath, str]
    """The override, as typed, that set each path."""
    problems: list[Problem]
    """Overrides that could not be applied."""


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> Overridden:
    """Apply overrides in order, the last one wins.

    Args:
        values: The values of a recipe, not checked yet.
        overrides: Texts such as ``privacy.steps=30``; the value is read as YAML.

    Returns:
        The changed values. Whether the option exists is checked later, together with all others.
    """
    result = Overridden(copy.deepcopy(values), {}, [])
    for override in overrides:
        dotted, equals, text = override.partition("=")
        dotted = dotted.strip()
        if not equals or not all(dotted.split(".")):
            result.problems.append(
                (f"--set {override}", "must look like section.option=value, such as privacy.steps=30.")
            )
            continue
        try:
            value = parse_yaml(text, f"--set {dotted}").value
        except ConfigError as error:
            hint = f"Put text in quotes of its own: --set \"{dotted}='...'\"."
            result.problems.append((f"--set {override}", f"{error} {hint}"))
            continue
        problem = _assign(result, dotted.split("."), value, override)
        if problem:
            result.problems.append((f"--set {override}", problem))
    return result


def _assign(result: Overridden, keys: list[str], value: Any, override: str) -> str | None:
    container: Any = result.values
    path: OptionPath = ()
    for position, name in enumerate(keys):
        is_last = position == len(keys) - 1
        if isinstance(container, list):
            if not name.isdecimal() or int(name) >= len(container):
                where = ".".join(map(str, path))
                return f"{where} is a list of {len(container)}: {name!r} is not one of its numbers from 0."
            key: Any = int(name)
        elif isinstance(container, dict):
            key = name
            if not is_last and container.get(name) is None:
                container[name] = {}
        else:
            return f"{'.'.join(map(str, path))} is one value and has no option {name!r}."
        path = (*path, key)
        if is_last:
            container[key] = value
            result.origins[path] = override
        else:
            container = container[key]
    return None
