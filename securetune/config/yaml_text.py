"""YAML as recipes use it: YAML 1.2 scalars, no aliases, no repeated keys, and the line of every option."""

import re
from typing import Any, NamedTuple

import yaml

from securetune.errors import ConfigError

OptionPath = tuple[str | int, ...]

_INT = "tag:yaml.org,2002:int"
_FLOAT = "tag:yaml.org,2002:float"
_BOOL = "tag:yaml.org,2002:bool"
_NULL = "tag:yaml.org,2002:null"
# PyYAML follows YAML 1.1, where 1e-5 is text, `no` is false and 010 is 8
_SCALARS = [
    (_BOOL, r"true|True|TRUE|false|False|FALSE", "tTfF"),
    (_INT, r"[-+]?[0-9]+", "-+0123456789"),
    (
        _FLOAT,
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    (_NULL, r"~|null|Null|NULL|", "~nN\0"),
]


class ParsedYaml(NamedTuple):
    """A YAML text as Python values."""

    value: Any
    """Nested dicts, lists and scalars."""
    lines: dict[OptionPath, int]
    """The line, counted from 1, on which each option stands."""


def parse_yaml(text: str, name: str) -> ParsedYaml:
    """Parse one YAML document.

    Args:
        text: The document.
        name: What to call it in an error message.

    Returns:
        The values and where they stand.

    Raises:
        ConfigError: With line and column, if the text is not YAML, uses aliases or tags, or repeats a key.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
        lines: dict[OptionPath, int] = {}
        return ParsedYaml(None if node is None else _convert(node, (), lines), lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{name}{where}: not valid YAML: {error.problem or error.context}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {' '.join(str(error).split())}.") from error
    except RecursionError as error:
        raise ConfigError(f"{name}: nested too deeply.") from error


def format_yaml(value: Any) -> str:
    """Write values as YAML that :func:`parse_yaml` reads back unchanged.

    Args:
        value: Nested dicts, lists and scalars.

    Returns:
        A YAML document.
    """
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 - PyYAML's own interface

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(
                problem=f"aliases (*{event.anchor}) cannot be used in a recipe", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    # text that looks like another type to YAML 1.1 or 1.2 is quoted, so any tool reads back the same values
    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own interface
        first: list(resolvers) for first, resolvers in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> Any:
        return super().increase_indent(flow, False)


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # line breaks of any kind are folded or lost in YAML's other styles
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


def _represent_list(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.Node:
    is_short = all(not isinstance(item, list | dict) for item in items) and len(repr(items)) <= 80
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=is_short)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(list, _represent_list)


for _class in (_Loader, _Dumper):
    for _tag, _pattern, _first in _SCALARS:
        _class.add_implicit_resolver(
            _tag, re.compile(rf"^(?:{_pattern})$"), list(_first) + [""] * ("\0" in _first)
        )


def _convert(node: yaml.Node, path: OptionPath, lines: dict[OptionPath, int]) -> Any:
    if isinstance(node, yaml.MappingNode):
        return _convert_mapping(node, path, lines)
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, item in enumerate(node.value):
            lines[(*path, index)] = item.start_mark.line + 1
            items.append(_convert(item, (*path, index), lines))
        return items
    return _scalar(node)


def _convert_mapping(
    node: yaml.MappingNode, path: OptionPath, lines: dict[OptionPath, int]
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise _problem("the name of an option must be plain text", key_node)
        key = key_node.value
        if key in result:
            raise _problem(f"{key!r} stands here twice; the first is on line {lines[(*path, key)]}", key_node)
        lines[(*path, key)] = key_node.start_mark.line + 1
        result[key] = _convert(value_node, (*path, key), lines)
    return result


def _scalar(node: yaml.Node) -> Any:
    text = node.value
    if node.tag == "tag:yaml.org,2002:str":
        return text
    if node.tag == _INT:
        return int(text)
    if node.tag == _FLOAT:
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    if node.tag == _BOOL:
        return text.lower() == "true"
    if node.tag == _NULL:
        return None
    raise _problem(f"the tag {node.tag} cannot be used in a recipe", node)


def _problem(message: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=message, problem_mark=node.start_mark)
