"""Folders: what a reader refuses, and swapping a whole folder as one step."""

import os
import stat
import threading
from pathlib import Path

import pytest

from securetune.checkpoints import folders
from securetune.checkpoints.folders import FolderReader, check_name, replace_folder, write_file
from securetune.errors import CheckpointError


@pytest.fixture(params=["exchange", "two renames"])
def swap(request, monkeypatch):
    """Both ways to swap: one system call, and the fallback of file systems without it."""
    if request.param == "two renames":
        monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    return request.param


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "..", "../x", "/x", "a/b", "a\\b", "C:x", "x.", ".hidden", "x ", "a b", "CON",
        "con.txt", "nul",
        "Lpt1.json",        "a\0b", "a\nb", "x" * 101, "cafe\u0301", "\u202etxt",
    ],
)  # fmt: skip
def test_unsafe_name_is_refused(name):
    with pytest.raises(CheckpointError, match="not allowed"):
        check_name(name, "file")


@pytest.mark.parametrize(
    "name", ["a", "model-00001-of-00002.safetensors", "README.md", "-x", "console.txt", "x" * 100]
)
def test_ordinary_name_is_accepted(name):
    check_name(name, "file")


def make_symlink(folder):
    (folder / "link").symlink_to("/etc/passwd")


def make_folder_symlink(folder):
    (folder / "link").symlink_to(folder.parent)


def make_hard_link(folder):
    os.link(folder / "a", folder.parent / "second-name")


def make_pipe(folder):
    os.mkfifo(folder / "pipe")


def make_deep(folder):
    folder.joinpath(*"bcdefghijkl").mkdir(parents=True)


def make_many(folder):
    for number in range(513):
        (folder / f"f{number}").touch()


@pytest.mark.parametrize(
    "make", [make_symlink, make_folder_symlink, make_hard_link, make_pipe, make_deep, make_many]
)
def test_reader_refuses_what_is_not_a_plain_file(make, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").write_text("a")
    make(folder)
    with pytest.raises(CheckpointError):
        FolderReader(folder)


def test_reader_refuses_a_symlink_as_the_folder_itself(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(CheckpointError, match="is a symbolic link; give the folder it points to"):
        FolderReader(tmp_path / "link")


def test_reader_keeps_reading_the_files_it_opened(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a").write_bytes(b"first")
    with FolderReader(tmp_path) as reader:
        (tmp_path / "sub" / "a").unlink()
        (tmp_path / "sub" / "a").write_bytes(b"second")
        assert reader.read("sub/a", 100) == b"first"


def test_reader_leaves_no_descriptor_open(tmp_path):
    (tmp_path / "a").touch()
    (tmp_path / "link").symlink_to("a")
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(CheckpointError):
        FolderReader(tmp_path)
    (tmp_path / "link").unlink()
    FolderReader(tmp_path).close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_file_that_shrinks_is_refused(tmp_path):
    (tmp_path / "a").write_bytes(b"content")
    with FolderReader(tmp_path) as reader:
        os.truncate(tmp_path / "a", 3)
        with pytest.raises(CheckpointError, match="changed while it was read"):
            reader.read("a", 100)


def fill(target, content, **options):
    with replace_folder(target, **options) as building:
        (building / "sub").mkdir()
        write_file(building / "sub" / "data", content, 0o600)
        write_file(building / "marker", b"", 0o600)


def test_folder_is_replaced_and_nothing_is_left_beside_it(swap, tmp_path):
    fill(tmp_path / "out", b"one")
    fill(tmp_path / "out", b"two", marker="marker")
    assert (tmp_path / "out" / "sub" / "data").read_bytes() == b"two"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_error_while_building_keeps_the_old_folder(swap, tmp_path):
    fill(tmp_path / "out", b"one")
    with pytest.raises(KeyboardInterrupt), replace_folder(tmp_path / "out", marker="marker"):
        raise KeyboardInterrupt
    assert (tmp_path / "out" / "sub" / "data").read_bytes() == b"one"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_folder_with_other_files_is_never_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(CheckpointError, match=r"holds other files and no marker"):
        fill(tmp_path, b"x", marker="marker")
    with pytest.raises(CheckpointError, match="is not empty"):
        fill(tmp_path, b"x")
    assert (tmp_path / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize("make", [lambda path: path.write_text("x"), lambda path: path.symlink_to("/tmp")])
def test_target_that_is_not_a_folder_is_refused(make, tmp_path):
    make(tmp_path / "out")
    with pytest.raises(CheckpointError, match="not a folder"):
        fill(tmp_path / "out", b"x", marker="marker")


def test_empty_folder_is_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out", b"x")
    assert (tmp_path / "out" / "sub" / "data").exists()


def test_missing_parent_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        fill(tmp_path / "nowhere" / "out", b"x")


def test_second_writer_is_refused(tmp_path):
    with (
        replace_folder(tmp_path / "out"),
        pytest.raises(CheckpointError, match="another process is writing"),
        replace_folder(tmp_path / "out"),
    ):
        pass


def test_many_writers_leave_one_whole_folder_and_no_lock(tmp_path):
    refused = []

    def write(number):
        for _ in range(10):
            try:
                fill(tmp_path / "out", str(number).encode(), marker="marker")
            except CheckpointError as error:
                refused.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "out" / "sub" / "data").read_bytes() in (b"0", b"1", b"2", b"3")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert all("another process" in str(error) for error in refused)


def test_modes_hold_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        fill(tmp_path / "out", b"x")
        fill(tmp_path / "shared", b"x", mode=0o755)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "shared").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "out" / "marker").stat().st_mode) == 0o600


def test_reader_recovers_what_a_killed_writer_left(tmp_path):
    fill(tmp_path / "out", b"old")
    (tmp_path / "out").rename(tmp_path / ".out.old")  # as if killed between the two renames
    folders.recover_folder(tmp_path / "out")
    assert (tmp_path / "out" / "sub" / "data").read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_failed_second_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    fill(tmp_path / "out", b"old")
    monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    rename = os.rename

    def refuse_new(source, target):
        if ".out.new-" in str(source):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse_new)
    with pytest.raises(OSError, match="No space"):
        fill(tmp_path / "out", b"new", marker="marker")
    assert (tmp_path / "out" / "sub" / "data").read_bytes() == b"old"


@pytest.mark.parametrize("leftover", [[], ["a.txt"]])
def test_folder_swapped_away_while_it_is_opened_is_opened_again(tmp_path, monkeypatch, leftover):
    """The old folder is emptied after the swap: what is left in it is not a checkpoint."""
    folder, new = tmp_path / "folder", tmp_path / "new"
    for made, content in ((folder, "old"), (new, "new")):
        made.mkdir()
        for name in ("a.txt", "b.txt"):
            (made / name).write_text(content)
    listdir, listed = os.listdir, []

    def swap_then_list(path):
        if not listed:
            folder.rename(tmp_path / "old")
            new.rename(folder)
            for name in {"a.txt", "b.txt"} - set(leftover):
                (tmp_path / "old" / name).unlink()
        listed.append(listdir(path))
        return listed[-1]

    monkeypatch.setattr(os, "listdir", swap_then_list)
    with FolderReader(folder) as reader:
        assert {name: reader.read(name, 10) for name in reader.sizes} == {"a.txt": b"new", "b.txt": b"new"}
    assert sorted(listed[0]) == leftover
