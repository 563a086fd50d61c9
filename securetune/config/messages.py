"""Plain-English messages for what pydantic finds wrong in a recipe."""

import difflib
import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from securetune.config.yaml_text import OptionPath

_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "a section with options",
    "float_type": "a number",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "list_type": "a list",
    "model_type": "a section with options",
    "path_type": "a path",
    "string_type": "text",
    "tuple_type": "a list of two numbers",
}
_COMPARED = {
    "greater_than": (">", "gt"),
    "greater_than_equal": (">=", "ge"),
    "less_than": ("<", "lt"),
    "less_than_equal": ("<=", "le"),
}


def real_path(root: type[BaseModel], location: tuple[str | int, ...]) -> OptionPath:
    """Drop what pydantic adds to a location for its own use, such as the member of a union.

    Args:
        root: The model that was validated.
        location: Location of an error.

    Returns:
        Option names and list positions only.
    """
    path: list[str | int] = []
    model: type[BaseModel] | None = root
    for part in location:
        if model is not None and isinstance(part, str):
            path.append(part)
            field = model.model_fields.get(part)
            model = model_in(field.annotation) if field else None
        elif isinstance(part, int):
            path.append(part)
    return tuple(path)


def model_in(annotation: Any) -> type[BaseModel] | None:
    """Find the section type in an annotation such as ``list[GateRule]``.

    Args:
        annotation: A type.

    Returns:
        The pydantic model in it, if there is one.
    """
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    return next(filter(None, map(model_in, typing.get_args(annotation))), None)


def expectation(error: ErrorDetails) -> str | None:
    """Say what a value must be, as the end of "must be".

    Args:
        error: One pydantic error.

    Returns:
        The text, or ``None`` where the error is not about a single value's type or range.
    """
    kind, context = error["type"], error.get("ctx", {})
    if kind in _EXPECTED:
        return _EXPECTED[kind]
    if kind in _COMPARED:
        sign, name = _COMPARED[kind]
        return f"{sign} {context[name]:g}"
    if kind == "literal_error":
        return context["expected"]
    if kind == "finite_number":
        return "a finite number"
    return None


def message_for(errors: list[ErrorDetails], root: type[BaseModel], path: OptionPath) -> str:
    """Describe all errors of one option in one sentence.

    Args:
        errors: The errors; more than one where the option may have several types.
        root: The model that was validated.
        path: The option.

    Returns:
        What is wrong, the value, what is allowed and what to do.
    """
    first = errors[0]
    context = first.get("ctx", {})
    if first["type"] == "extra_forbidden":
        return _unknown_option(root, path)
    if first["type"] == "missing" and isinstance(path[-1], int):
        return "missing: the list is too short."
    if first["type"] == "missing":
        return f"required, but missing. {_description(root, path)}".strip()
    if first["type"] == "string_pattern_mismatch":
        return f"not allowed: {show(first['input'])}. {_description(root, path)}".strip()
    if first["type"] in ("string_too_short", "too_short"):
        return f"must not be shorter than {context['min_length']}, got {show(first['input'])}."
    if first["type"] == "too_long":
        return f"must not be longer than {context['max_length']}, got {show(first['input'])}."
    expected = list(dict.fromkeys(text for error in errors if (text := expectation(error))))
    if not expected:
        return f"{first['msg']}, got {show(first['input'])}."
    hint = ""
    if first["type"] == "literal_error" and isinstance(first["input"], str):
        hint = _did_you_mean(first["input"], [word.strip("'") for word in _words(first)])
    if first["type"] == "string_type" and isinstance(first["input"], dict | list):
        hint = " Put text that holds {, [ or ': ' in quotes: it is read as YAML."
    entry = f" for {first['loc'][-1]!r}" if _is_mapping(root, path) and len(first["loc"]) > len(path) else ""
    return f"must be {' or '.join(expected)}, got {show(first['input'])}{entry}.{hint}"


def show(value: Any) -> str:
    """Show a value as it would stand in YAML, shortened.

    Args:
        value: Any value.

    Returns:
        At most about 80 characters.
    """
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _unknown_option(root: type[BaseModel], path: OptionPath) -> str:
    name = str(path[-1])
    model = _model_at(root, path[:-1])
    known = list(model.model_fields) if model else []
    hint = _did_you_mean(name, known) or _did_you_mean_elsewhere(root, name)
    return f"unknown option.{hint or ' Allowed here: ' + ', '.join(known) + '.'}"


def _did_you_mean(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def _did_you_mean_elsewhere(root: type[BaseModel], name: str) -> str:
    places = dict(reversed([(path.rpartition(".")[2], path) for path in _all_options(root, "")]))
    close = difflib.get_close_matches(name, places, n=1, cutoff=0.75)
    return f" Did you mean '{places[close[0]]}'?" if close else ""


def _all_options(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _all_options(field.annotation, f"{prefix}{name}.")


def _model_at(root: type[BaseModel], path: OptionPath) -> type[BaseModel] | None:
    model: type[BaseModel] | None = root
    for part in path:
        if model is not None and isinstance(part, str):
            field = model.model_fields.get(part)
            model = model_in(field.annotation) if field else None
    return model


def _field_at(root: type[BaseModel], path: OptionPath) -> FieldInfo | None:
    model = _model_at(root, path[:-1])
    return model.model_fields.get(str(path[-1])) if model else None


def _description(root: type[BaseModel], path: OptionPath) -> str:
    field = _field_at(root, path)
    return " ".join((field.description or "").split()) if field else ""


def _is_mapping(root: type[BaseModel], path: OptionPath) -> bool:
    field = _field_at(root, path)
    return field is not None and typing.get_origin(field.annotation) is dict


def _words(error: ErrorDetails) -> list[str]:
    return error.get("ctx", {})["expected"].replace(" or ", ", ").split(", ")
