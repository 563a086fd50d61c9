import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from securetune.checkpoints import (
    generate_recipient_key,
    generate_signing_key,
    load_identity,
    load_public_key,
    load_recipient,
    load_signing_key,
    open_vault,
    seal,
    verify,
)
from securetune.errors import CheckpointError, GateFailed, PrivacyError, SignatureError
from securetune.publishing import publish, what_would_leave
from securetune.report import load_report
from tests.sample_report import DIGESTS, SampleRule, make_evidence, sample_report

ADAPTER = json.dumps({"note": "stands for an adapter"}).encode()
RULES = [SampleRule("epsilon", at_most=8.0), SampleRule("accuracy", at_least=0.75)]
IMPOSSIBLE = [SampleRule("accuracy", at_least=0.99)]


class Run:
    """A run folder with keys and a sealed checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint = folder / "checkpoint"
        self.published = folder / "published"
        keys = folder / "keys"
        keys.mkdir()
        self.public_key_file = generate_signing_key(keys / "signing.key")
        recipient = generate_recipient_key(keys / "recipient.key")
        self.signing_key = load_signing_key(keys / "signing.key")
        self.public_key = load_public_key(self.public_key_file)
        self.identity = load_identity(keys / "recipient.key")
        self.recipient = load_recipient(recipient)
        self.seal()

    def seal(self, *, sealed=None, public=None, signing_key=None) -> None:
        seal(
            self.checkpoint,
            sealed={"adapter": {"adapter.json": ADAPTER}, "evidence": {"ledger.jsonl": b"{}\n"}}
            if sealed is None
            else sealed,
            signing_key=signing_key or self.signing_key,
            recipients=[self.recipient],
            public_files={"ledger.jsonl": b'{"unit": "record"}\n'} if public is None else public,
        )

    def publish(self, report=None, *, rules=RULES, destination=None, released=()):
        return publish(
            self.checkpoint,
            destination or self.published,
            report or sample_report(),
            rules=rules,
            signing_key=self.signing_key,
            released=released,
        )


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_published_folder_opens_like_the_checkpoint(run):
    run.publish()
    with open_vault(run.published, public_key=run.public_key, identity=run.identity) as vault:
        assert vault.read("adapter", "adapter.json") == ADAPTER
        assert vault.read_public("README.md").startswith(b"---\n")


def test_sealed_files_are_copied_as_they_are(run):
    before = files_of(run.checkpoint)
    run.publish()
    after = files_of(run.published)
    unchanged = {name for name, content in before.items() if after.get(name) == content}
    assert unchanged == set(before) - {"vault.json", "model.sig"}


def test_stock_verifier_accepts_the_published_folder(run):
    pytest.importorskip("model_signing")
    run.publish()
    command = [sys.executable, "-m", "model_signing", "verify", "key", run.published]
    command += ["--signature", run.published / "model.sig", "--public_key", run.public_key_file]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_published_report_is_the_shareable_one(run):
    run.publish(sample_report(notes=["a private remark"]))
    report = load_report(run.published / "report.json")
    assert report.audience == "shareable"
    everything = b"".join(files_of(run.published).values())
    for secret in (b"a private remark", b"0.8402", b"10543", b"183.2"):
        assert secret not in everything


def test_released_figures_are_published(run):
    item = make_evidence(
        "accuracy",
        "hardened",
        0.83,
        0.05,
        1000,
        private_statistic=False,
        release_epsilon=1.0,
        method="Laplace",
    )
    run.publish(released=[item])
    assert item in load_report(run.published / "report.json").evidence


def test_figures_without_noise_are_refused(run):
    item = make_evidence("accuracy", "hardened", 0.83, 0.05, 1000)
    with pytest.raises(PrivacyError, match="release_epsilon"):
        run.publish(released=[item])
    assert not run.published.exists()


def test_a_failed_gate_publishes_nothing(run):
    with pytest.raises(GateFailed, match="nothing was published"):
        run.publish(rules=IMPOSSIBLE)
    assert not run.published.exists()


def test_a_failed_gate_leaves_the_earlier_publication(run):
    run.publish()
    before = files_of(run.published)
    with pytest.raises(GateFailed):
        run.publish(rules=IMPOSSIBLE)
    assert files_of(run.published) == before


def test_the_gate_is_checked_again_whatever_the_report_says(run):
    report = sample_report()
    assert report.gate is not None
    assert report.gate.passed
    with pytest.raises(GateFailed):
        run.publish(report, rules=IMPOSSIBLE)


def test_evidence_about_two_models_is_refused(run):
    other = make_evidence("accuracy", "hardened", 0.9, 0.02, 1000, artefact=DIGESTS["plain"])
    with pytest.raises(GateFailed, match="2 different hardened models"):
        run.publish(sample_report(evidence=[*sample_report().evidence, other]))


def test_publishing_again_replaces_and_counts_on(run):
    first = run.publish()
    second = run.publish(sample_report(reproduce="another command"))
    assert second.manifest.generation == first.manifest.generation + 1
    assert b"another command" in (run.published / "report.json").read_bytes()
    assert verify(run.published, run.public_key) == second.manifest


def test_a_folder_with_other_content_is_not_replaced(run):
    run.published.mkdir()
    (run.published / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="not replaced"):
        run.publish()
    assert (run.published / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("inside", ["checkpoint/published", ".", "checkpoint"])
def test_checkpoint_and_destination_must_lie_apart(run, inside):
    with pytest.raises(CheckpointError, match="one lies inside the other"):
        run.publish(destination=run.folder / inside)
    verify(run.checkpoint, run.public_key)


def test_a_missing_parent_folder_is_made(run):
    run.publish(destination=run.folder / "a" / "b" / "published")
    verify(run.folder / "a" / "b" / "published", run.public_key)


@pytest.mark.parametrize("change", ["README.md", "report.json", "shards/adapter.adapter.json.c256"])
def test_a_changed_byte_in_the_published_folder_is_found(run, change):
    run.publish()
    path = run.published / change
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(SignatureError, match=path.name):
        verify(run.published, run.public_key)


def test_a_changed_checkpoint_is_not_published(run):
    path = run.checkpoint / "shards" / "adapter.adapter.json.c256"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(SignatureError):
        run.publish()
    assert not run.published.exists()


def test_a_checkpoint_of_another_owner_is_not_published(run):
    generate_signing_key(run.folder / "keys" / "other.key")
    run.seal(signing_key=load_signing_key(run.folder / "keys" / "other.key"))
    with pytest.raises(SignatureError):
        run.publish()


@pytest.mark.parametrize(
    ("sealed", "public", "message"),
    [
        ({"adapter": {"a.json": b"{}"}, "optimizer": {"state.json": b"{}"}}, {}, "'optimizer' can reveal"),
        ({"adapter": {"a.json": b"{}"}, "rng": {"state.json": b"{}"}}, {}, "'rng' can reveal"),
        (
            {"adapter": {"a.json": b"{}"}, "evidence": {"metrics.jsonl": b"{}"}},
            {},
            "jsonl file can hold records",
        ),
        ({"adapter": {"a.json": b"{}"}, "evidence": {"report.json": b"{}"}}, {}, "un-noised measurements"),
        ({"adapter": {"a.json": b"{}"}}, {"train.jsonl": b"{}"}, "jsonl file can hold records"),
        ({"adapter": {"a.json": b"{}"}}, {"notes.txt": b"hello"}, "only LICENSE"),
        (
            {"adapter": {"a.json": b"{}"}},
            {"NOTICE": b"x\n-----BEGIN EC PRIVATE KEY-----\nMHc"},
            "holds a private key",
        ),
    ],
)
def test_what_must_not_leave_is_refused(run, sealed, public, message):
    run.seal(sealed=sealed, public=public)
    with pytest.raises(CheckpointError, match=message):
        run.publish()
    with pytest.raises(CheckpointError, match=message):
        what_would_leave(run.checkpoint, sample_report(), rules=RULES, public_key=run.public_key)
    assert not run.published.exists()


def test_a_symbolic_link_is_refused(run):
    secret = run.folder / "keys" / "signing.key"
    (run.checkpoint / "LICENSE").symlink_to(secret)
    with pytest.raises(CheckpointError, match="symbolic link"):
        run.publish()


def test_the_dry_run_lists_exactly_what_is_published_and_writes_nothing(run):
    before = files_of(run.folder)
    planned = what_would_leave(run.checkpoint, sample_report(), rules=RULES, public_key=run.public_key)
    assert files_of(run.folder) == before
    published = run.publish()
    after = files_of(run.published)
    assert [file.path for file in planned] == sorted(after)
    assert planned == published.files
    for file in planned:
        if file.size is not None:
            assert file.size == len(after[file.path]), file.path


def test_the_dry_run_refuses_what_the_gate_refuses(run):
    with pytest.raises(GateFailed):
        what_would_leave(run.checkpoint, sample_report(), rules=IMPOSSIBLE, public_key=run.public_key)


def test_published_files_are_readable_by_others_and_not_writable(run):
    run.publish()
    for path in [run.published, *run.published.rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644)


def test_a_full_disk_leaves_the_earlier_publication(run, monkeypatch):
    run.publish()
    before = files_of(run.published)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(CheckpointError, match="No space left on device"):
            run.publish()
    assert files_of(run.published) == before
    run.publish()


def test_no_private_key_leaves(run):
    run.publish()
    assert b"PRIVATE KEY" not in b"".join(files_of(run.published).values())
