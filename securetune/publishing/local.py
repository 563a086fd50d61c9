"""Publish to a folder: sealed files, model card and shareable report, signed as one and swapped in as one."""

import contextlib
import dataclasses
import hashlib
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple

from cryptography.hazmat.primitives.asymmetric import ec

from securetune.checkpoints import replace_folder, signer_id, verify
from securetune.checkpoints.folders import FolderReader, create_file, write_all, write_file
from securetune.checkpoints.manifest import (
    SHARD_FOLDER,
    VAULT_NAME,
    FileEntry,
    Manifest,
    sign_manifest,
    utc_now,
)
from securetune.checkpoints.safe_loading import check_public_payload
from securetune.checkpoints.signing import SIGNATURE_NAME, build_signature
from securetune.config.schema import GateRule
from securetune.errors import CheckpointError, GateFailed, PrivacyError, SecuretuneError
from securetune.evidence import Evidence
from securetune.privacy.ledger import MAX_LEDGER_BYTES, read_ledger
from securetune.privacy.statements import noise_statement, sampling_statement
from securetune.publishing.card import render_card
from securetune.publishing.gate import check_gate, require_passed
from securetune.report.html import render_html
from securetune.report.summary import PrivacyStatement, Report, report_json, shareable

__all__ = ["OutgoingFile", "Published", "publish", "what_would_leave"]

_OWN_FILES: Final = ("README.md", "report.html", "report.json")
_LEDGER: Final = "ledger.jsonl"
_PUBLIC_FILES: Final = frozenset({"LICENSE", "NOTICE", _LEDGER, "recipe.yaml"})
"""Unsealed files of a checkpoint that may leave the machine; all others are refused by name."""
_COMPARTMENTS: Final = frozenset({"adapter", "evidence", "meta", "weights"})
_REPORT_NAMES: Final = re.compile(r"(?i)(report|metrics|evaluation|evidence|curves)\b.*")
_PRIVATE_KEY: Final = re.compile(rb"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----|AGE-SECRET-KEY-1")
_MAX_PUBLIC_BYTES: Final = 64 << 20


class OutgoingFile(NamedTuple):
    """One file that publishing would write; ``size`` is None for what exists only once it is signed."""

    path: str
    size: int | None
    what: str


class Published(NamedTuple):
    """What was published: the folder, what its owner signed, and every file in it."""

    folder: Path
    manifest: Manifest
    files: list[OutgoingFile]


def what_would_leave(
    checkpoint: str | os.PathLike[str],
    report: Report,
    *,
    rules: Sequence[GateRule],
    public_key: ec.EllipticCurvePublicKey,
    released: Sequence[Evidence] = (),
) -> list[OutgoingFile]:
    """List what publishing would let out, without writing anything and without the signing key.

    Args:
        checkpoint: The sealed checkpoint of the run.
        report: The report of the run.
        rules: The release rules of the recipe.
        public_key: The owner's public key.
        released: Held-out figures that were noised for release.

    Returns:
        Every file of the published folder, sorted by path.

    Raises:
        GateFailed: If a rule is not met, or evidence is about another checkpoint: then nothing would leave.
        CheckpointError: If the checkpoint does not verify, holds something that must not leave, or holds
            another ledger than the one behind the report.
        PrivacyError: If an item of ``released`` is not marked as released.
    """
    manifest = verify(checkpoint, public_key)
    documents = _make_documents(report, rules, public_key, released)
    with FolderReader(checkpoint) as reader:
        _check_may_leave(reader, manifest)
        _check_about_checkpoint(reader, manifest, report, released)
    return _list_outgoing(manifest, documents)


def publish(
    checkpoint: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    report: Report,
    *,
    rules: Sequence[GateRule],
    signing_key: ec.EllipticCurvePrivateKey,
    released: Sequence[Evidence] = (),
) -> Published:
    """Publish a sealed checkpoint to a folder, if the evidence meets the release gate.

    Guarantees:
        The gate is checked here, on the evidence of ``report``, whatever the report says about it; if it
        fails, nothing is written and what was published before stays. The evidence is about this checkpoint,
        by its digest, and the privacy statement is that of its ledger. Sealed files are copied as they are:
        nothing is decrypted, and no decryption key is needed. The folder holds them, the model card and the
        shareable report, all listed in ``vault.json`` and covered by ``model.sig``; it has been verified with
        the public key alone before it appears, complete, under ``destination``.

    Args:
        checkpoint: The sealed checkpoint of the run, signed by the owner of ``signing_key``.
        destination: The folder to publish to. An earlier publication there is replaced; any other folder that
            is not empty is refused.
        report: The report of the run (``audience`` internal).
        rules: The release rules of the recipe.
        signing_key: The owner's ECDSA P-256 private key.
        released: Held-out figures that were noised for release.

    Returns:
        What was published.

    Raises:
        GateFailed: If a rule is not met, or evidence is about another checkpoint.
        CheckpointError: If the checkpoint does not verify, holds something that must not leave, or holds
            another ledger than the one behind the report, or the destination cannot be written.
        PrivacyError: If an item of ``released`` is not marked as released.
    """
    public_key = signing_key.public_key()
    documents = _make_documents(report, rules, public_key, released)
    manifest = verify(checkpoint, public_key)
    target = Path(destination).absolute()
    _check_apart(Path(checkpoint), target)
    try:
        with FolderReader(checkpoint) as reader:
            _check_may_leave(reader, manifest)
            _check_about_checkpoint(reader, manifest, report, released)
            target.parent.mkdir(parents=True, exist_ok=True)
            with replace_folder(target, marker=VAULT_NAME, mode=0o755) as building:
                signed = dataclasses.replace(
                    manifest,
                    generation=_next_generation(manifest, target, public_key),
                    created=utc_now(),
                    files=_write_files(reader, manifest, documents, building),
                )
                _sign(signed, building, signing_key, target.name)
                if verify(building, public_key) != signed:
                    raise CheckpointError(f"{target} changed while it was published. Try again.")
    except OSError as error:
        raise CheckpointError(
            f"{target} could not be published: {error.strerror or error}. What was there before is whole."
        ) from error
    return Published(target, signed, _list_outgoing(manifest, documents))


def _make_documents(
    report: Report,
    rules: Sequence[GateRule],
    public_key: ec.EllipticCurvePublicKey,
    released: Sequence[Evidence],
) -> dict[str, bytes]:
    """Check the gate, then make the files that are published beside the sealed ones."""
    gate = check_gate(rules, report.evidence)
    require_passed(gate)
    public = shareable(report.model_copy(update={"gate": gate}), released)
    texts = {
        "README.md": render_card(public, signer=signer_id(public_key)),
        "report.html": render_html(public),
        "report.json": report_json(public),
    }
    return {name: text.encode() for name, text in texts.items()}


def _check_about_checkpoint(
    reader: FolderReader, manifest: Manifest, report: Report, released: Sequence[Evidence]
) -> None:
    """Refuse a report of another checkpoint, whose figures and epsilon say nothing about this one."""
    for item in (*report.evidence, *released):
        if item.subject.split(" ")[0] == "hardened" and item.artefact != manifest.digest:
            raise GateFailed(
                f"the evidence {item.metric} of {item.subject} is about {item.artefact[:12]}, not about the "
                f"checkpoint {manifest.digest[:12]} in {reader.path}, so nothing was published. Evaluate "
                "this checkpoint again, or publish the one that was evaluated."
            )
    held = [entry for entry in manifest.files if entry.name == _LEDGER]
    if report.privacy is None:
        if held:
            raise CheckpointError(
                f"{reader.path / held[0].path} is the ledger of a private run, but the report makes no "
                "privacy statement, so nothing was published. Make the report of this checkpoint's own run."
            )
        return
    _check_ledger(reader, next((entry for entry in held if entry.compartment is None), None), report.privacy)


def _check_ledger(reader: FolderReader, entry: FileEntry | None, privacy: PrivacyStatement) -> None:
    if entry is None:
        raise CheckpointError(
            f"{reader.path} holds no public {_LEDGER}, so nothing bears out the epsilon of the report and "
            "nothing was published. Seal the ledger of the run with the checkpoint."
        )
    where = reader.path / entry.path
    with tempfile.TemporaryDirectory() as folder:  # of the bytes that were opened, not of what lies there now
        copy = Path(folder) / _LEDGER
        copy.write_bytes(reader.read(entry.path, MAX_LEDGER_BYTES))
        try:
            state = read_ledger(copy)
        except PrivacyError as error:
            raise CheckpointError(f"{where} cannot be used: {error}".replace(str(copy), _LEDGER)) from error
    header, spent = state.header, math.fsum(state.release_epsilons)
    pairs = {
        "steps_charged": (state.steps_charged, privacy.steps_charged),
        "noise_multiplier": (header.noise_multiplier, privacy.noise_multiplier),
        "sample_rate": (header.sample_rate, privacy.sample_rate),
        "delta": (header.delta, privacy.delta),
        "release_epsilon": (spent, privacy.release_epsilon or 0.0),
    }
    different = [
        f"  {name}: {found} in the ledger, {stated} in the report"
        for name, (found, stated) in pairs.items()
        if not math.isclose(found, stated, rel_tol=1e-9)
    ]
    words = {"sampler": (header.sampler, privacy.sampler)}
    if privacy.sampling:
        words["sampling"] = (sampling_statement(header), privacy.sampling)
    if privacy.noise:
        words["noise"] = (noise_statement(header), privacy.noise)
    if privacy.clipping:
        words["clipping"] = (header.clipping_statement, privacy.clipping)
    different += [
        f"  {name}: {found} in the ledger, {stated} in the report"
        for name, (found, stated) in words.items()
        if found != stated
    ]
    if different:
        raise CheckpointError(
            f"{where} is not the ledger behind the report's privacy statement, so nothing was published:\n"
            + "\n".join(different)
            + "\nMake the report of this checkpoint's own run."
        )


def _check_apart(checkpoint: Path, target: Path) -> None:
    source, resolved = checkpoint.resolve(), target.resolve()
    if resolved.is_relative_to(source) or source.is_relative_to(resolved):
        raise CheckpointError(
            f"cannot publish {source} to {resolved}: one lies inside the other. Choose another destination."
        )


def _check_may_leave(reader: FolderReader, manifest: Manifest) -> None:
    for entry in manifest.files:
        where = f"{reader.path / entry.path} must not be published"
        if PurePosixPath(entry.name).suffix == ".jsonl" and entry.name != _LEDGER:
            raise CheckpointError(f"{where}: a *.jsonl file can hold records or un-noised statistics.")
        if entry.compartment is None:
            if entry.name not in _PUBLIC_FILES and entry.name not in _OWN_FILES:
                allowed = ", ".join(sorted(_PUBLIC_FILES))
                raise CheckpointError(
                    f"{where}: unsealed, only {allowed} may leave. Seal it, or leave it out."
                )
            content = reader.read(entry.path, _MAX_PUBLIC_BYTES)
            check_public_payload(entry.name, content[:4])
            if _PRIVATE_KEY.search(content):
                raise CheckpointError(
                    f"{where}: it holds a private key. Remove it and seal the checkpoint again."
                )
        elif entry.compartment not in _COMPARTMENTS:
            raise CheckpointError(
                f"{where}: the compartment {entry.compartment!r} can reveal training data even to those "
                "who may use the model. Seal the finished model without it."
            )
        elif entry.compartment == "evidence" and _REPORT_NAMES.fullmatch(entry.name):
            raise CheckpointError(
                f"{where}: it names un-noised measurements, which stay in the run folder even when sealed."
            )


def _list_outgoing(manifest: Manifest, documents: Mapping[str, bytes]) -> list[OutgoingFile]:
    made = {"README.md": "model card", "report.html": "shareable report", "report.json": "shareable report"}
    files = [OutgoingFile(name, len(content), made[name]) for name, content in documents.items()]
    for entry in (*manifest.files, manifest.keyring):
        if entry.compartment is not None:
            files.append(OutgoingFile(entry.path, entry.size, f"sealed, compartment {entry.compartment}"))
        elif entry.path not in documents:
            what = "wrapped keys" if entry is manifest.keyring else "public file of the checkpoint"
            files.append(OutgoingFile(entry.path, entry.size, what))
    files.append(OutgoingFile(VAULT_NAME, None, "signed list of files"))
    files.append(OutgoingFile(SIGNATURE_NAME, None, "signature over the folder"))
    return sorted(files)


def _next_generation(manifest: Manifest, target: Path, public_key: ec.EllipticCurvePublicKey) -> int:
    """Count on from the checkpoint and from what is published: a later folder is a later generation."""
    latest = manifest.generation
    if (target / VAULT_NAME).exists():
        with contextlib.suppress(SecuretuneError):  # an earlier publication by another key counts for nothing
            earlier = verify(target, public_key)
            if earlier.lineage == manifest.lineage:
                latest = max(latest, earlier.generation)
    return latest + 1


def _write_files(
    reader: FolderReader, manifest: Manifest, documents: Mapping[str, bytes], building: Path
) -> tuple[FileEntry, ...]:
    (building / SHARD_FOLDER).mkdir()
    (building / SHARD_FOLDER).chmod(0o755)
    entries = [entry for entry in manifest.files if entry.path not in documents]
    for entry in (*entries, manifest.keyring):
        _copy(reader, entry, building / entry.path)
    for path, content in documents.items():
        write_file(building / path, content, 0o644)
        entries.append(FileEntry(path, path, None, len(content), hashlib.sha256(content).hexdigest()))
    return tuple(sorted(entries, key=lambda entry: entry.path))


def _sign(manifest: Manifest, building: Path, signing_key: ec.EllipticCurvePrivateKey, name: str) -> None:
    vault = sign_manifest(manifest, signing_key)
    write_file(building / VAULT_NAME, vault, 0o644)
    digests = manifest.digests | {VAULT_NAME: hashlib.sha256(vault).hexdigest()}
    write_file(building / SIGNATURE_NAME, build_signature(digests, signing_key, name=name), 0o644)


def _copy(reader: FolderReader, entry: FileEntry, path: Path) -> None:
    digest = hashlib.sha256()
    descriptor = create_file(path, 0o644)
    try:
        for block in reader.blocks(entry.path):
            digest.update(block)
            write_all(descriptor, block)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if digest.hexdigest() != entry.sha256:
        raise CheckpointError(f"{reader.path / entry.path} changed while it was published. Try again.")
