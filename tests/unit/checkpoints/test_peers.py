"""Several processes that write or open one checkpoint: all of it on all of them, or nothing on any."""

import errno
import shutil

import pytest

from securetune.checkpoints import Sealer, folders, open_vault, seal_part, sealing, verify
from securetune.checkpoints.peers import ALONE, agreement
from securetune.errors import AccessDenied, CheckpointError, ConfigError, MachineError, SignatureError
from tests.thread_peers import run_together

SIZE = 3


def content_of(rank, text="new"):
    return {
        "adapter": {f"part-{rank}.json": f"{text} {rank}".encode()},
        "optimizer": {f"part-{rank}.json": f"{text} moments {rank}".encode() * 10_000},
    }


@pytest.fixture
def save(tmp_path, keys):
    """Save one checkpoint by three threads; return what each of them got."""

    def saving(sealed=content_of, folder=tmp_path / "checkpoint", **options):
        def work(peers):
            if peers.rank:
                return seal_part(sealed(peers.rank), peers)
            with Sealer(signing_key=keys.owner, recipients=[keys.recipient_public]) as sealer:
                return sealer.seal(folder, sealed(0), peers=peers, **options)

        return run_together(SIZE, work)

    return saving


def read_all(path, keys):
    with open_vault(path, public_key=keys.owner_public, identity=keys.recipient) as vault:
        return {
            name: {file: vault.read(name, file) for file in vault.names(name)} for name in vault.compartments
        }


def merged(text):
    parts = [content_of(rank, text) for rank in range(SIZE)]
    return {name: {k: v for part in parts for k, v in part[name].items()} for name in parts[0]}


def test_what_several_processes_wrote_one_reads(save, tmp_path, keys):
    manifest, *others = save(metadata={"step": 3})
    assert others == [None, None]
    assert verify(tmp_path / "checkpoint", keys.owner_public) == manifest
    assert read_all(tmp_path / "checkpoint", keys) == merged("new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


def test_several_processes_open_and_only_the_first_has_a_key(save, tmp_path, keys):
    save(metadata={"step": 3})

    def read(peers):
        identity = None if peers.rank else keys.recipient
        with open_vault(
            tmp_path / "checkpoint", public_key=keys.owner_public, identity=identity, peers=peers
        ) as vault:
            return vault.metadata, vault.read("optimizer", f"part-{(peers.rank + 1) % SIZE}.json")

    for rank, found in enumerate(run_together(SIZE, read)):
        expected = content_of((rank + 1) % SIZE)["optimizer"].popitem()[1]
        assert found == ({"step": 3}, expected)


def test_each_file_is_hashed_by_one_process(save, tmp_path, keys, monkeypatch):
    save()
    hashed = []
    sha256 = folders.FolderReader.sha256

    def noting(reader, name):
        hashed.append(name)
        return sha256(reader, name)

    monkeypatch.setattr(folders.FolderReader, "sha256", noting)

    def read(peers):
        open_vault(
            tmp_path / "checkpoint", public_key=keys.owner_public, identity=keys.recipient, peers=peers
        ).close()

    assert run_together(SIZE, read) == [None] * SIZE
    assert len(hashed) == len(set(hashed)) == 2 * SIZE + 2  # the parts, the metadata and the keyring


def test_changed_byte_in_any_file_is_refused_by_all(save, tmp_path, keys):
    save()
    files = [path for path in (tmp_path / "checkpoint").rglob("*") if path.is_file()]
    assert len(files) == 2 * SIZE + 4

    def read(peers):
        open_vault(
            tmp_path / "checkpoint", public_key=keys.owner_public, identity=keys.recipient, peers=peers
        ).close()

    for path in files:
        whole = path.read_bytes()
        path.write_bytes(whole[:-10] + bytes([whole[-10] ^ 1]) + whole[-9:])
        errors = run_together(SIZE, read)
        assert all(isinstance(error, CheckpointError) for error in errors), (path, errors)
        assert any(isinstance(error, SignatureError) for error in errors), (path, errors)
        path.write_bytes(whole)
    assert run_together(SIZE, read) == [None] * SIZE


def test_missing_part_is_refused_by_all(save, tmp_path, keys):
    save()
    (tmp_path / "checkpoint" / "shards" / "adapter.part-1.json.c256").unlink()
    errors = run_together(
        SIZE,
        lambda peers: open_vault(
            tmp_path / "checkpoint", public_key=keys.owner_public, identity=keys.recipient, peers=peers
        ),
    )
    assert all(isinstance(error, SignatureError) for error in errors)
    assert all("adapter.part-1.json.c256 is missing, but it was signed" in str(error) for error in errors)


def test_part_of_another_save_is_refused(save, tmp_path, keys):
    save(folder=tmp_path / "one")
    save(folder=tmp_path / "two")
    part = "shards/adapter.part-1.json.c256"
    shutil.copy(tmp_path / "two" / part, tmp_path / "one" / part)
    with pytest.raises(SignatureError, match=r"adapter\.part-1\.json\.c256"):
        verify(tmp_path / "one", keys.owner_public)


def test_processes_that_open_different_checkpoints_are_refused(save, tmp_path, keys):
    save(folder=tmp_path / "one")
    save(folder=tmp_path / "two")

    def read(peers):
        path = tmp_path / ("two" if peers.rank == 2 else "one")
        open_vault(path, public_key=keys.owner_public, identity=keys.recipient, peers=peers)

    errors = run_together(SIZE, read)
    assert all("two was replaced while it was opened. Try again." in str(error) for error in errors)
    assert str(errors[0]).startswith("process 2: ")


@pytest.mark.parametrize("identity", ["stranger", None])
def test_a_key_that_opens_nothing_is_refused_on_all(save, tmp_path, keys, identity):
    save()
    key = None if identity is None else keys.stranger
    kind = ConfigError if identity is None else AccessDenied
    errors = run_together(
        SIZE,
        lambda peers: open_vault(
            tmp_path / "checkpoint", public_key=keys.owner_public, identity=key, peers=peers
        ),
    )
    assert [type(error) for error in errors] == [kind] * SIZE


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_full_disk_on_one_process_keeps_the_old_checkpoint_on_all(failing, save, tmp_path, keys, monkeypatch):
    save(lambda rank: content_of(rank, "old"))
    create = folders.create_file

    def fail(path, mode):
        if path.name == f"adapter.part-{failing}.json.c256":
            raise OSError(errno.ENOSPC, "No space left on device")
        return create(path, mode)

    monkeypatch.setattr(folders, "create_file", fail)
    errors = save()
    assert all(isinstance(error, CheckpointError) for error in errors)
    assert all("No space left on device" in str(error) for error in errors)
    assert all(str(error).startswith("process") == (rank != failing) for rank, error in enumerate(errors))
    assert read_all(tmp_path / "checkpoint", keys) == merged("old")
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


def test_failed_start_ends_all(save, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("precious")
    errors = save(folder=tmp_path / "taken")
    assert all("holds other files and no vault.json" in str(error) for error in errors)


def test_failed_commit_is_told_to_all(save, tmp_path, keys, monkeypatch):
    save(lambda rank: content_of(rank, "old"))

    def fail(building, target):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(folders, "_swap_in", fail)
    errors = save()
    assert all("Input/output error. What was there before is whole" in str(error) for error in errors)
    assert read_all(tmp_path / "checkpoint", keys) == merged("old")


def test_a_process_that_leaves_keeps_the_old_checkpoint(save, tmp_path, keys):
    save(lambda rank: content_of(rank, "old"))

    def work(peers):
        if peers.rank == 2:
            return peers.leave()
        if peers.rank == 1:
            return seal_part(content_of(1), peers)
        sealer = Sealer(signing_key=keys.owner, recipients=[keys.recipient_public])
        return sealer.seal(tmp_path / "checkpoint", content_of(0), peers=peers)

    errors = run_together(SIZE, work)
    assert [type(error) for error in errors] == [MachineError, MachineError, type(None)]
    assert read_all(tmp_path / "checkpoint", keys) == merged("old")
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


def test_compartment_without_a_key_is_refused(save):
    errors = save(lambda rank: content_of(rank) if rank else {"adapter": content_of(0)["adapter"]})
    assert all(
        "the first process seals nothing in optimizer, so it made no key for it; allowed: adapter, meta."
        in str(error)
        for error in errors
    )


def test_one_name_of_two_processes_is_refused(save):
    errors = save(lambda rank: content_of(min(rank, 1)))
    assert all(isinstance(error, CheckpointError) for error in errors)


def test_folder_that_is_not_shared_is_named_with_the_remedy(save, monkeypatch):
    """Stands for machines with a disk each: the first process' folder is not there for the others."""
    add_all = sealing._Writer.add_all

    def elsewhere(writer, sealed):
        if "part-0.json" not in sealed["adapter"]:
            writer._folder = writer._folder / "elsewhere"
        add_all(writer, sealed)

    monkeypatch.setattr(sealing._Writer, "add_all", elsewhere)
    errors = save()
    assert all("choose a folder (run_dir) that every machine mounts" in str(error) for error in errors)


def test_a_part_that_does_not_arrive_is_refused(save, tmp_path, monkeypatch):
    add_all = sealing._Writer.add_all

    def lose(writer, sealed):
        add_all(writer, sealed)
        if "part-1.json" in sealed["adapter"]:
            (writer._folder / "shards" / "adapter.part-1.json.c256").unlink()

    monkeypatch.setattr(sealing._Writer, "add_all", lose)
    errors = save()
    assert all("process 1 wrote" in str(error) for error in errors)
    assert not list(tmp_path.iterdir())


def test_agreement_with_oneself_raises_what_was_raised():
    with pytest.raises(ZeroDivisionError), agreement(ALONE, "nothing"):
        _ = 1 / 0


def test_error_of_another_kind_stays_itself_and_is_a_checkpoint_error_elsewhere():
    def work(peers):
        with agreement(peers, "the sum"):
            if peers.rank == 1:
                _ = 1 / 0

    errors = run_together(SIZE, work)
    assert [type(error) for error in errors] == [CheckpointError, ZeroDivisionError, CheckpointError]
    assert str(errors[0]) == "process 1: division by zero"
