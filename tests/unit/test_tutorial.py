"""The tutorial's code blocks run, one after the other, on a tiny model."""

import difflib
import re
from pathlib import Path

import pytest

from securetune.privacy.ledger import read_ledger
from tests.tiny import tiny_folder

ROOT = Path(__file__).resolve().parents[2]
TUTORIAL = (ROOT / "docs" / "private-training.md").read_text()
BLOCKS = re.findall(r'^```python(?: title="([\w.]+)")?\n(.*?)^```$', TUTORIAL, re.MULTILINE | re.DOTALL)
ALLOWED_CHANGES = 8


def test_every_block_runs_in_order(tmp_path, monkeypatch):
    tiny_folder(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for number, (title, code) in enumerate(BLOCKS):
        if title:
            namespace = {"__name__": title}
        exec(compile(code, f"block {number} {title}", "exec"), namespace)
    charged = {
        name: read_ledger(name).steps_charged for name in ("ledger.jsonl", "second.jsonl", "people.jsonl")
    }
    assert charged == {"ledger.jsonl": 20, "second.jsonl": 20, "people.jsonl": 5}
    assert read_ledger("out/ledger.jsonl").steps_charged == 10
    assert len(BLOCKS) == 9


def test_private_loop_changes_at_most_eight_lines_of_the_plain_one():
    blocks = dict(BLOCKS)
    changes = difflib.ndiff(blocks["plain.py"].splitlines(), blocks["private.py"].splitlines())
    signs = [line[0] for line in changes if line[2:].strip()]
    assert 0 < signs.count("+") <= ALLOWED_CHANGES
    assert signs.count("-") <= ALLOWED_CHANGES


@pytest.mark.parametrize("page", ["private-training.md", "sharp-edges.md", "distributed.md"])
def test_page_is_in_the_navigation(page):
    assert page in (ROOT / "mkdocs.yml").read_text()
