"""Shard files and training states: runs wherever they lie, random access, and what is refused."""

import io

import pytest
import torch
from safetensors.torch import load as load_safetensors

from securetune.checkpoints import (
    Sealer,
    generate_signing_key,
    load_signing_key,
    open_vault,
)
from securetune.errors import CheckpointError
from securetune.privacy.reduction import Address
from securetune.training import shard_files, state
from securetune.training.shard_files import ShardFiles, ShardStream, check_cover, runs_of
from securetune.training.state_shards import ReplicaShards, fill
from tests.distributed.state_worker import OWNER, PASSPHRASE, Setup, make_access, truth
from tests.thread_peers import run_together


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("state")
    generate_signing_key(made / "owner")
    return made


def parts_of(vector, *addresses):
    return [(a, vector.as_strided(a.shape, a.strides, a.base).contiguous()) for a in addresses]


def test_neighbouring_runs_are_joined():
    addresses = [Address(0, (3,), (1,)), Address(3, (2, 2), (2, 1)), Address(10, (2, 2), (5, 1))]
    assert runs_of(addresses) == [(0, 7), (10, 2), (15, 2)]


def test_a_stream_is_a_plain_safetensors_file():
    vector = torch.arange(40, dtype=torch.float32)
    columns, row = Address(1, (3, 2), (10, 1)), Address(30, (10,), (1,))
    stream = ShardStream(
        {"b": parts_of(vector.bfloat16(), row), "a": parts_of(vector, columns, row), "none": []}
    )
    content = stream.read(-1)
    assert stream.seek(0, io.SEEK_END) == len(content)
    found = load_safetensors(content)
    assert found["a"].tolist() == [1, 2, 11, 12, 21, 22, *range(30, 40)]
    assert found["a.runs"].tolist() == [[1, 2], [11, 2], [21, 2], [30, 10]]
    assert torch.equal(found["b"], vector[30:].bfloat16())
    assert found["none"].numel() == 0
    stream.seek(5)
    assert stream.read(20) == content[5:25]


def seal_files(path, folder, *files):
    with Sealer(signing_key=load_signing_key(folder / "owner"), passphrase=PASSPHRASE) as sealer:
        sealer.seal(
            path, {"optimizer": {f"f{i}.safetensors": ShardStream(file) for i, file in enumerate(files)}}
        )
    public_key = load_signing_key(folder / "owner").public_key()
    return open_vault(path, public_key=public_key, passphrase=PASSPHRASE)


@pytest.mark.parametrize("window", [16, 1 << 24])
@pytest.mark.parametrize("gap", [0, 1 << 16])
def test_any_part_is_read_from_any_number_of_files(folder, tmp_path, monkeypatch, window, gap):
    monkeypatch.setattr(shard_files, "_WINDOW_BYTES", window)
    monkeypatch.setattr(shard_files, "_GAP_BYTES", gap)
    vector = torch.randn(70)
    files = (
        {
            "x": parts_of(vector, Address(0, (5, 4), (10, 1)), Address(60, (10,), (1,)))
        },  # columns 0 to 4 of 10
        {"x": parts_of(vector, Address(4, (5, 6), (10, 1)))},
        {"x": parts_of(vector, Address(50, (10,), (1,)))},
    )
    with seal_files(tmp_path / "x", folder, *files) as vault:
        read = ShardFiles(vault).read
        for address in (
            Address(0, (70,), (1,)), Address(13, (30,), (1,)), Address(2, (7, 3), (10, 1)),
            Address(3, (7,), (10,)), Address(69, (1,), (1,)), Address(20, (0,), (1,)),
        ):  # fmt: skip
            assert torch.equal(
                read("x", address), vector.as_strided(address.shape, address.strides, address.base)
            )


def test_no_more_is_decrypted_than_asked_for(folder, tmp_path):
    vector = torch.randn(1_000_000)
    with seal_files(
        tmp_path / "x", folder, {"x": parts_of(vector, Address(0, (len(vector),), (1,)))}
    ) as vault:
        files, asked = ShardFiles(vault), []
        read_range = vault.read_range

        def noting(compartment, name, offset, count):
            asked.append(count)
            return read_range(compartment, name, offset, count)

        vault.read_range = noting
        assert torch.equal(files.read("x", Address(500_000, (1000,), (1,))), vector[500_000:501_000])
    assert asked == [4000]


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([(0, 4), (5, 5)], r"entries 4 to 5 are missing"),
        ([(0, 6), (5, 5)], r"entries 5 to 6 are there twice"),
        ([(0, 9)], r"entries 9 to 10 are missing"),
        ([(0, 5), (5, 5), (0, 5)], r"are there twice"),
        ([], r"the 10 entries of 'x' once each: entries 0 to 10 are missing"),
    ],
)
def test_runs_that_do_not_cover_are_refused(runs, message):
    with pytest.raises(CheckpointError, match=message):
        check_cover("x", runs, 10)
    check_cover("x", [(5, 5), (0, 5), (3, 0)], 10)


def test_unknown_arrays_and_entries_are_named(folder, tmp_path):
    vector = torch.randn(10)
    with seal_files(tmp_path / "x", folder, {"x": parts_of(vector, Address(0, (10,), (1,)))}) as vault:
        files = ShardFiles(vault)
        with pytest.raises(CheckpointError, match="has no 'y'; it has: x"):
            files.read("y", Address(0, (1,), (1,)))
        with pytest.raises(CheckpointError, match="entries 0 to 10 of 'x', and 8 to 11 were asked for"):
            files.read("x", Address(8, (3,), (1,)))


def test_a_file_without_runs_is_refused(folder, tmp_path):
    from safetensors.torch import save

    with Sealer(signing_key=load_signing_key(folder / "owner"), passphrase=PASSPHRASE) as sealer:
        sealer.seal(tmp_path / "x", {"adapter": {"flat.safetensors": save({"params": torch.zeros(3)})}})
    public_key = load_signing_key(folder / "owner").public_key()
    with (
        open_vault(tmp_path / "x", public_key=public_key, passphrase=PASSPHRASE) as vault,
        pytest.raises(CheckpointError, match="not a file of this version's training states: 'params' is F32"),
    ):
        ShardFiles(vault)


def test_a_narrower_dtype_is_refused_and_a_wider_one_is_exact():
    def read(name, address):
        return torch.full(address.shape, 1 / 3)

    with pytest.raises(
        CheckpointError, match=r"holds 'params' as torch\.float32, and this run as torch\.bfloat16"
    ):
        fill(torch.zeros(3, dtype=torch.bfloat16), "params", read, 0)
    wide = torch.zeros(2, 3, dtype=torch.float64).t()
    fill(wide, "params", read, 0)
    assert torch.equal(wide, torch.full((3, 2), torch.tensor(1 / 3).double().item(), dtype=torch.float64))


def save(path, folder, number=3, strategy="single", **options):
    setup = Setup(strategy, None)
    setup.set(number)
    sealer = make_access(folder).sealer()
    state.save_state(
        path, sealer, setup.shards, owner=OWNER, steps_done=number, steps_charged=number, **options
    )


def test_owner_and_size_are_checked_before_anything_changes(folder, tmp_path):
    save(tmp_path / "x", folder)
    setup = Setup("single", None)
    before = setup.grads.flat_params.detach().clone()
    with pytest.raises(CheckpointError, match="holds the training state of something else"):
        state.load_state(tmp_path / "x", make_access(folder), setup.shards, owner={"subject": "plain"})
    other = Setup("single", None, width=6)
    with pytest.raises(CheckpointError, match=r"holds 64 trained parameters, this recipe has \d+"):
        state.load_state(tmp_path / "x", make_access(folder), other.shards, owner=OWNER)
    assert torch.equal(setup.grads.flat_params, before)


def test_an_optimizer_without_moments_is_refused(folder, tmp_path):
    setup = Setup("single", None)
    with pytest.raises(CheckpointError, match="AdamW has no exp_avg and no exp_avg_sq"):
        state.save_state(
            tmp_path / "x",
            make_access(folder).sealer(),
            setup.shards,
            owner=OWNER,
            steps_done=0,
            steps_charged=0,
        )
    assert not state.has_state(tmp_path / "x")


def test_a_state_between_two_renames_is_found(folder, tmp_path):
    save(tmp_path / "x", folder)
    (tmp_path / "x").rename(tmp_path / ".x.old")
    assert state.has_state(tmp_path / "x")


class Stopping:
    """Stands for early stopping."""

    def __init__(self, best=None):
        self.best_params = best

    def state(self):
        return {"best_step": 2}

    def load(self, metadata, best):
        self.metadata, self.best_params = metadata, best


@pytest.mark.parametrize("has_best", [True, False])
def test_best_parameters_come_back_whole_from_parts(folder, tmp_path, has_best):
    best = truth("best_params", Setup("single", None).grads.num_params, 2) if has_best else None

    def saving(peers):
        setup = Setup("single", None)
        setup.set(3)
        shards = ReplicaShards(setup.grads, setup.optimizer, peers)
        sealer = None if peers.rank else make_access(folder).sealer()
        state.save_state(
            tmp_path / "x",
            sealer,
            shards,
            owner=OWNER,
            steps_done=3,
            steps_charged=3,
            stopping=Stopping(None if best is None else [best]),
        )

    assert run_together(3, saving) == [None] * 3
    setup, stopping = Setup("each", None), Stopping()
    state.load_state(tmp_path / "x", make_access(folder), setup.shards, owner=OWNER, stopping=stopping)
    setup.check(3)
    assert stopping.metadata == {"best_step": 2}
    assert (
        (stopping.best_params is None) if best is None else torch.equal(torch.cat(stopping.best_params), best)
    )


def test_shards_that_leave_a_gap_are_never_saved(folder, tmp_path):
    save(tmp_path / "x", folder, 1)

    def saving(peers):
        setup = Setup("single", None)
        setup.set(2)
        shards = ReplicaShards(setup.grads, setup.optimizer, peers)
        if peers.rank:
            shards.owned = list
        sealer = None if peers.rank else make_access(folder).sealer()
        state.save_state(tmp_path / "x", sealer, shards, owner=OWNER, steps_done=2, steps_charged=2)

    errors = run_together(2, saving)
    assert all("entries 32 to 64 are missing" in str(error) for error in errors), errors
    setup = Setup("single", None)
    assert state.load_state(tmp_path / "x", make_access(folder), setup.shards, owner=OWNER).steps_done == 1
