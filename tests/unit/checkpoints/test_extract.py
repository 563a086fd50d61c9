"""Writing the content of an open checkpoint to plain files: private, complete, or not at all."""

import os
import stat

import pytest

from securetune.errors import AccessDenied, CheckpointError


def test_extract_writes_private_files_and_nothing_else(pristine, opened, tmp_path, tensors):
    before = os.umask(0)
    try:
        with opened(pristine) as vault:
            out = vault.extract(tmp_path / "out")
    finally:
        os.umask(before)
    files = {file.relative_to(out).as_posix(): file for file in out.rglob("*") if file.is_file()}
    assert set(files) == {"adapter/adapter_model.safetensors", "optimizer/state.json"}
    assert files["adapter/adapter_model.safetensors"].read_bytes() == tensors
    assert {stat.S_IMODE(file.stat().st_mode) for file in files.values()} == {0o600}
    assert stat.S_IMODE(out.stat().st_mode) == 0o700


def test_extract_takes_only_the_compartments_asked_for(pristine, opened, tmp_path):
    with opened(pristine) as vault:
        out = vault.extract(tmp_path / "out", compartments=["optimizer"])
    assert [entry.name for entry in out.iterdir()] == ["optimizer"]


def test_extract_of_a_compartment_that_was_not_opened_is_refused(pristine, opened, tmp_path):
    with opened(pristine, compartments=["adapter"]) as vault:
        with pytest.raises(AccessDenied, match=r"optimizer were not opened.*open now: adapter"):
            vault.extract(tmp_path / "out", compartments=["adapter", "optimizer"])
        assert [entry.name for entry in vault.extract(tmp_path / "out").iterdir()] == ["adapter"]


def test_extract_never_overwrites_a_folder(pristine, opened, tmp_path):
    (tmp_path / "precious").touch()
    with opened(pristine) as vault, pytest.raises(CheckpointError, match="not empty"):
        vault.extract(tmp_path)


def test_failed_extract_leaves_no_plaintext(sealed, opened, tmp_path):
    with opened(sealed) as vault:
        shard = sealed / "shards" / "optimizer.state.json.c256"
        with shard.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\0\0")
        with pytest.raises(CheckpointError):
            vault.extract(tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]
