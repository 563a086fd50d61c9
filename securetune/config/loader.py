"""Load a recipe: YAML and overrides in, a checked :class:`Recipe` or the list of all its problems out."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from securetune.config.messages import message_for, real_path, show
from securetune.config.overrides import Overridden, apply_overrides
from securetune.config.rules import Problem, broken_rules
from securetune.config.schema import BrokenRules, Recipe
from securetune.config.yaml_text import OptionPath, format_yaml, parse_yaml
from securetune.errors import ConfigError
from securetune.files import canonical_json

_MAX_BYTES = 1 << 20


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Load and check a recipe.

    Relative paths in a recipe are relative to the current folder.

    Args:
        path: A YAML file.
        overrides: Changes such as ``privacy.steps=30``, applied in order.

    Returns:
        The recipe, with every default filled in.

    Raises:
        ConfigError: With all problems at once: file, dotted option, value, what is allowed and what to do.
    """
    name = os.fspath(path)
    return parse_recipe(_read_text(name), name, overrides)


def parse_recipe(text: str, name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Check a recipe given as text; see :func:`load_recipe`.

    Args:
        text: YAML.
        name: What to call the text in an error message.
        overrides: Changes such as ``privacy.steps=30``, applied in order.

    Returns:
        The recipe, with every default filled in.

    Raises:
        ConfigError: With all problems at once.
    """
    parsed = parse_yaml(text, name)
    if not isinstance(parsed.value, dict):
        found = "is empty" if parsed.value is None else f"is {show(parsed.value)}"
        raise ConfigError(
            f"{name}: a recipe is a list of options such as 'name: my-run', but this file {found}. "
            "Make one with 'securetune init --data FILE'."
        )
    changed = apply_overrides(parsed.value, overrides)
    problems = list(changed.problems)
    try:
        recipe = Recipe.model_validate(changed.values)
    except ValidationError as error:
        problems += _problems_of(error, changed.values)
    else:
        if not problems:
            return recipe
    lines = [f"  {path}: {message}{_origin(path, changed, parsed.lines)}" for path, message in problems]
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    raise ConfigError("\n".join([f"{count} in {name}", *lines]))


def dump_recipe(recipe: Recipe) -> str:
    """Write a recipe with every option resolved.

    Args:
        recipe: The recipe.

    Returns:
        YAML that :func:`parse_recipe` turns into an equal recipe.
    """
    return format_yaml(recipe.model_dump(mode="json"))


def recipe_digest(recipe: Recipe) -> str:
    """Identify a recipe by its content.

    Args:
        recipe: The recipe.

    Returns:
        SHA-256 of the canonical JSON of all options, as 64 hexadecimal digits.
    """
    return hashlib.sha256(canonical_json(recipe.model_dump(mode="json"))).hexdigest()


def recipe_json_schema() -> dict[str, Any]:
    """Describe recipes for editors, which then complete and check them.

    Returns:
        A JSON schema (draft 2020-12).
    """
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def _read_text(name: str) -> str:
    try:
        with open(name, "rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(
            f"{name}: no such file. 'securetune ls' lists the recipes that come with securetune, "
            "'securetune init --data FILE' writes one for your data."
        ) from None
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read: {error.strerror}.") from error
    if len(content) > _MAX_BYTES:
        raise ConfigError(f"{name}: larger than {_MAX_BYTES} bytes, which no recipe is.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(f"{name}, line {line}: not valid UTF-8 (byte {error.start}).") from error


def _problems_of(error: ValidationError, values: dict[str, Any]) -> Iterator[Problem]:
    by_path: dict[OptionPath, list[ErrorDetails]] = {}
    for details in error.errors(include_url=False):
        cause = details.get("ctx", {}).get("error")
        if isinstance(cause, BrokenRules):
            yield from cause.problems
        else:
            by_path.setdefault(real_path(Recipe, details["loc"]), []).append(details)
    for path, errors in by_path.items():
        yield ".".join(map(str, path)), message_for(errors, Recipe, path)
    if by_path:
        yield from broken_rules(_valid_sections(values, {str(path[0]) for path in by_path if path}))


def _valid_sections(values: Mapping[str, Any], with_errors: set[str]) -> dict[str, Any]:
    sections: dict[str, Any] = {}
    for name, field in Recipe.model_fields.items():
        if name in with_errors:
            continue
        if name in values:
            sections[name] = TypeAdapter(field.rebuild_annotation()).validate_python(values[name])
        else:
            sections[name] = field.get_default(call_default_factory=True)
    return sections


def _origin(path: str, changed: Overridden, lines: Mapping[OptionPath, int]) -> str:
    key: OptionPath = tuple(int(part) if part.isdecimal() else part for part in path.split("."))
    for set_path, override in changed.origins.items():
        if set_path[: len(key)] == key or key[: len(set_path)] == set_path:
            return f" (from --set {override})"
    return f" (line {lines[key]})" if key in lines else ""
