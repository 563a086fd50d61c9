"""Files that must survive a full disk, a kill and hostile content."""

import errno
import hashlib
import os
import stat

import pytest

from securetune import files
from securetune.errors import DataError


def test_write_atomic_writes_bytes_and_text_with_the_mode(tmp_path):
    files.write_atomic(tmp_path / "a", b"\x00\xff")
    files.write_atomic(tmp_path / "b", "grüße", mode=0o644)
    assert (tmp_path / "a").read_bytes() == b"\x00\xff"
    assert (tmp_path / "b").read_text(encoding="utf-8") == "grüße"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o644


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_failing_disk_leaves_the_old_file_whole_and_no_rest(tmp_path, monkeypatch, call):
    target = tmp_path / "state.json"
    files.write_atomic(target, "old")

    def fail(*_args, **_options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, call, fail)
    with pytest.raises(OSError, match=r"No space left.*state\.json"):
        files.write_atomic(target, "new")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_write_atomic_finishes_short_writes(tmp_path, monkeypatch):
    real_write = os.write
    monkeypatch.setattr(files.os, "write", lambda descriptor, data: real_write(descriptor, bytes(data[:3])))
    files.write_atomic(tmp_path / "a", b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"


def test_append_durable_appends_lines(tmp_path):
    path = tmp_path / "ledger"
    files.append_durable(path, "one")
    files.append_durable(path, "two")
    assert path.read_text() == "one\ntwo\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_append_durable_syncs_before_it_returns(tmp_path, monkeypatch):
    synced = []
    real_fsync = os.fsync
    monkeypatch.setattr(
        files.os, "fsync", lambda descriptor: (synced.append(descriptor), real_fsync(descriptor))
    )
    files.append_durable(tmp_path / "ledger", "one")
    assert len(synced) == 2  # the file, and the folder of a new file


def test_a_torn_line_does_not_swallow_the_next(tmp_path):
    path = tmp_path / "ledger"
    path.write_text('{"step": 1}\n{"ste')
    files.append_durable(path, '{"step": 2}')
    assert path.read_text().splitlines() == ['{"step": 1}', '{"ste', '{"step": 2}']


def test_a_failed_append_is_cut_back(tmp_path, monkeypatch):
    path = tmp_path / "ledger"
    files.append_durable(path, "one")
    real_write = os.write
    calls = []

    def write_half_then_fail(descriptor, data):
        if calls:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        calls.append(1)
        return real_write(descriptor, bytes(data[:2]))

    monkeypatch.setattr(files.os, "write", write_half_then_fail)
    with pytest.raises(OSError, match=r"No space left.*ledger"):
        files.append_durable(path, "two")
    assert path.read_text() == "one\n"


@pytest.mark.parametrize("line", ["a\nb", "a\r", "\n"])
def test_append_durable_refuses_line_breaks(tmp_path, line):
    with pytest.raises(ValueError, match="line break"):
        files.append_durable(tmp_path / "ledger", line)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1, "a": 2}', "key 'a' twice"),
        (b'{"a": NaN}', "NaN; only finite"),
        (b"[-Infinity]", "-Infinity; only finite"),
        (b"[1e999]", "too large"),
        (b"[" + b"9" * 5000 + b"]", "whole number of more digits"),
        (b'{"a": ', "not valid JSON: Expecting value"),
        (b'"\xff"', "not valid UTF-8: byte 1"),
        (b"[" * 100_000, "nested too deeply"),
        (b" " * 200, "larger than 100 bytes"),
    ],
)
def test_read_json_refuses(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        files.read_json(path, max_bytes=100 if content.isspace() else 1 << 20)


def test_read_json_reads(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"a": [1, 2.5, "ü", null, true]}', encoding="utf-8")
    assert files.read_json(path, max_bytes=100) == {"a": [1, 2.5, "ü", None, True]}


def test_canonical_json_does_not_depend_on_order():
    assert files.canonical_json({"b": 1.0, "a": [None]}) == b'{"a":[null],"b":1}'


def test_sha256_file(tmp_path):
    content = b"x" * (3 << 20)
    (tmp_path / "big").write_bytes(content)
    assert files.sha256_file(tmp_path / "big") == hashlib.sha256(content).hexdigest()


def test_lazy_files_are_made_when_they_are_taken_out():
    made = []

    def maker(name):
        return lambda: made.append(name) or name.encode()

    lazy = files.LazyFiles({name: maker(name) for name in ("a", "b")})
    assert (len(lazy), list(lazy), made) == (2, ["a", "b"], [])
    assert lazy["b"] == b"b"
    assert made == ["b"]
    with pytest.raises(KeyError):
        lazy["c"]
