"""A tiny model, private records and a recipe for a whole run in seconds."""

import json
import random
from pathlib import Path
from typing import Any

import yaml

from tests.tiny import tiny_folder

STEPS = 5
SECRET = "zanzibar"  # stands in every record, so that it must stand nowhere in what is published
RECIPE = {
    "name": "tiny",
    "task": "classify",
    "data": {
        "labels": ["negative", "positive"],
        "prompt": "{text}\nLabel:",
        "held_out_fraction": 0.3,
    },
    "privacy": {
        "target_epsilon": 8.0,
        "delta": 1e-3,
        "expected_batch_size": 48,
        "sample_rate": 0.15,
        "steps": STEPS,
    },
    "training": {"learning_rate": 0.01, "lora": {"rank": 2, "alpha": 4}},
    "adversarial": {"method": "fgsm", "radius": 0.05},
    "evaluation": {
        "num_texts": 60,
        "num_membership": 120,
        "num_attacked": 20,
        "pgd_radii": [0.05, 0.1],
        "pgd_steps": 2,
        "character_queries": 8,
        "character_edits": 1,
    },
    "checkpoint": {"demo_keys": True},
    "gate": {"rules": [{"metric": "epsilon", "at_most": 8.0}]},
    "publish": {"release_epsilon": 4.0},
}


def make_workshop(folder: Path) -> Path:
    """Make a base model and two files with the same 460 records."""
    tiny_folder(folder / "model")
    rng = random.Random(0)
    words = {"positive": ["good", "great", "fine"], "negative": ["bad", "dull", "weak"]}
    rows = []
    for number in range(460):
        label = rng.choice(list(words))
        text = f"{SECRET} {rng.choice(['film', 'plot'])} {number} was {rng.choice(words[label])}"
        rows.append({"text": text, "label": label, "prompt": text, "completion": label})
    lines = [json.dumps({key: row[key] for key in ("text", "label")}) for row in rows]
    (folder / "labelled.jsonl").write_text("\n".join(lines) + "\n")
    lines = [json.dumps({key: row[key] for key in ("prompt", "completion")}) for row in rows]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_recipe(workshop: Path, name: str, **changes: Any) -> Path:
    """Write a recipe; ``section__option=value`` sets an option, ``section=value`` a whole section."""
    recipe = json.loads(json.dumps(RECIPE))
    recipe |= {"name": name, "run_dir": str(workshop / name), "model": {"name": str(workshop / "model")}}
    recipe["model"]["dtype"] = "float32"
    recipe["data"]["private"] = {"path": str(workshop / "labelled.jsonl")}
    for path, value in changes.items():
        section, _, option = path.partition("__")
        if option:
            recipe[section][option] = value
        else:
            recipe[section] = value
    path = workshop / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path
