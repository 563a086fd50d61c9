import json
import os
import re
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
from securetune.publishing import check_gate, publish, what_would_leave
from securetune.report import load_report
from tests.sample_report import gate_rule, make_evidence, report_about, sample_ledger

ADAPTER = json.dumps({"note": "stands for an adapter"}).encode()
RULES = [gate_rule("epsilon", at_most=8.0), gate_rule("accuracy", at_least=0.75)]
IMPOSSIBLE = [gate_rule("accuracy", at_least=0.99)]


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
        manifest = seal(
            self.checkpoint,
            sealed={"adapter": {"adapter.json": ADAPTER}, "evidence": {"ledger.jsonl": b"{}\n"}}
            if sealed is None
            else sealed,
            signing_key=signing_key or self.signing_key,
            recipients=[self.recipient],
            public_files={"ledger.jsonl": sample_ledger()} if public is None else public,
        )
        self.digest = manifest.digest

    def report(self, **changes):
        return report_about(self.digest, **changes)

    def would_leave(self, report=None, *, rules=RULES):
        return what_would_leave(
            self.checkpoint, report or self.report(), rules=rules, public_key=self.public_key
        )

    def publish(self, report=None, *, rules=RULES, destination=None, released=()):
        return publish(
            self.checkpoint,
            destination or self.published,
            report or self.report(),
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
    run.publish()
    report = load_report(run.published / "report.json")
    assert report.audience == "shareable"
    everything = b"".join(files_of(run.published).values())
    for secret in (b"0.8402", b"10543", b"183.2"):
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
        artefact=run.digest,
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
    report = run.report()
    assert report.gate is not None
    assert report.gate.passed
    with pytest.raises(GateFailed):
        run.publish(report, rules=IMPOSSIBLE)


@pytest.mark.parametrize("place", ["first", "last", "epsilon", "pair", "released"])
def test_evidence_about_another_checkpoint_is_refused(run, place):
    report, released = run.report(), []
    evidence = list(report.evidence)
    hardened = [index for index, item in enumerate(evidence) if item.subject == "hardened"]
    places = {"first": hardened[0], "last": hardened[-1]}
    places["epsilon"] = next(index for index in hardened if evidence[index].metric == "epsilon")
    places["pair"] = next(i for i, item in enumerate(evidence) if item.subject == "hardened - base")
    if place == "released":
        released = [
            make_evidence("accuracy", "hardened", 0.8, 0.1, 200, private_statistic=False, release_epsilon=1.0)
        ]
    else:
        evidence[places[place]] = evidence[places[place]].model_copy(update={"artefact": "d" * 64})
    report = report.model_copy(update={"evidence": evidence})
    with pytest.raises(GateFailed, match=f"{'d' * 12}.*{run.digest[:12]}.*[Ee]valuate"):
        run.publish(report, released=released)
    assert not run.published.exists()
    if not released:
        with pytest.raises(GateFailed, match="d" * 12):
            run.would_leave(report)


def test_a_report_of_an_earlier_seal_is_refused(run):
    report = run.report()
    run.seal()
    with pytest.raises(GateFailed, match=report.evidence[2].artefact[:12]):
        run.publish(report)


@pytest.mark.parametrize(
    ("ledger", "message"),
    [
        (sample_ledger(steps=14), "steps_charged: 14 in the ledger, 15 in the report"),
        (sample_ledger(noise_multiplier=0.3), "noise_multiplier: 0.3 in the ledger"),
        (sample_ledger(sample_rate=0.5), "sample_rate: 0.5 in the ledger"),
        (sample_ledger(clipping="normalized"), "clipping: normalized: .* in the ledger, flat: "),
        (sample_ledger(delta=1e-3), "delta: 0.001 in the ledger"),
        (sample_ledger(releases=()), "release_epsilon: 0.0 in the ledger, 1.0 in the report"),
        (sample_ledger(releases=(1.0, 1.0)), "release_epsilon: 2.0 in the ledger"),
        (b"{}\n", "not a ledger"),
        (None, "holds no public ledger.jsonl"),
    ],
)
def test_a_ledger_that_does_not_bear_out_the_report_is_refused(run, ledger, message):
    run.seal(public={} if ledger is None else {"ledger.jsonl": ledger})
    with pytest.raises(CheckpointError, match=message):
        run.publish()
    with pytest.raises(CheckpointError, match=message):
        run.would_leave()
    assert not run.published.exists()


def test_a_ledger_without_a_privacy_statement_is_refused(run):
    with pytest.raises(CheckpointError, match="no privacy statement"):
        run.publish(run.report(privacy=None))


def test_a_run_without_privacy_has_no_ledger(run):
    run.seal(sealed={"adapter": {"adapter.json": ADAPTER}}, public={})
    run.publish(run.report(privacy=None))
    verify(run.published, run.public_key)


SENTINEL = "73129"


def test_nothing_measured_leaves_beside_the_value(run):
    """Settings and words of un-noised evidence, and of the gate that cites it, stay in the run folder."""
    number = float(f"0.{SENTINEL}")
    measured = {
        "radius": 0.2,
        "steps": 5,
        "mean_queries": number,
        "errors": int(SENTINEL),
        "attack": SENTINEL,
    }
    private = {"params": measured, "method": f"invalid: {SENTINEL}", "artefact": run.digest}
    evidence = [
        make_evidence(metric, "hardened", number, 0.0, int(SENTINEL), **private)
        for metric in ("accuracy", "accuracy_pgd", "membership_auc")
    ]
    evidence.append(
        make_evidence("accuracy_difference", "hardened - base", 0.1, 0.0, int(SENTINEL), **private)
    )
    released = make_evidence(
        "accuracy_pgd",
        "hardened",
        0.8,
        0.1,
        200,
        params=measured,
        artefact=run.digest,
        private_statistic=False,
        release_epsilon=1.0,
    )
    rules = [
        gate_rule("accuracy", at_least=0.5),
        gate_rule("accuracy_pgd", at_least=0.5),
        gate_rule("membership_auc", at_most=0.9),
        gate_rule("accuracy_difference", at_least=0.0),
    ]
    report = run.report(evidence=evidence, gate=check_gate(rules, evidence))
    run.publish(report, rules=rules, released=[released])
    for name in ("report.json", "report.html", "README.md"):
        # digests are as random as the keys, and one in some thousands holds the sentinel
        text = re.sub(r"\b[0-9a-f]{12,}\b", "", (run.published / name).read_text())
        assert SENTINEL not in text, name
        assert "mean_queries" not in text, name
        assert "mean queries" not in text, name
        assert "0.2" in text, name  # settings stay


def test_publishing_again_replaces_and_counts_on(run):
    first = run.publish()
    second = run.publish(run.report(reproduce="another command"))
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
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
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
        ({"adapter": {"a.json": b"{}"}}, {"plan.json": b"{}"}, "only LICENSE"),
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
        run.would_leave()
    assert not run.published.exists()


def test_a_symbolic_link_is_refused(run):
    secret = run.folder / "keys" / "signing.key"
    (run.checkpoint / "LICENSE").symlink_to(secret)
    with pytest.raises(CheckpointError, match="symbolic link"):
        run.publish()


def test_the_dry_run_lists_exactly_what_is_published_and_writes_nothing(run):
    before = files_of(run.folder)
    planned = run.would_leave()
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
        run.would_leave(rules=IMPOSSIBLE)


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
