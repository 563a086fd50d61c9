"""The demo keys of a run: made once, whole again after a kill, never replaced where they were lost."""

import pytest

from securetune.config import parse_recipe
from securetune.errors import ConfigError
from securetune.training.access import prepare_access
from securetune.training.folder import RunFolder
from tests.sample_recipe import recipe_text


@pytest.fixture
def recipe(tmp_path):
    changes = {"run_dir": str(tmp_path / "run"), "checkpoint": {"demo_keys": True}}
    return parse_recipe(recipe_text(changes), "recipe.yaml")


@pytest.fixture
def run(recipe):
    with RunFolder.open(recipe, resume=False) as run:
        yield run


def test_demo_keys_are_made_once(recipe, run):
    first, again = (prepare_access(recipe, run) for _ in range(2))
    assert [key.public_bytes_raw() for key in first.recipients] == [
        key.public_bytes_raw() for key in again.recipients
    ]
    assert first.passphrase == again.passphrase


@pytest.mark.parametrize("name", ["recipient.key.pub", "publisher.key.pub"])
def test_a_kill_before_the_public_key_was_written_loses_nothing(recipe, run, name):
    first = prepare_access(recipe, run)
    (run.keys / name).unlink()
    again = prepare_access(recipe, run)
    assert again.recipients[0].public_bytes_raw() == first.recipients[0].public_bytes_raw()
    assert again.public_key == first.public_key


@pytest.mark.parametrize("name", ["recipient.key", "publisher.key"])
def test_a_lost_demo_key_is_named(recipe, run, name):
    prepare_access(recipe, run)
    (run.keys / name).unlink()
    with pytest.raises(ConfigError, match=rf"{name} is gone, .* Restore it, or start a new run"):
        prepare_access(recipe, run)
