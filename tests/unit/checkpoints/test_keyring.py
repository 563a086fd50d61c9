"""The keyring: who opens what, and that every way to fail looks the same from outside."""

import base64
import json
import os

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

from securetune.checkpoints import keyring
from securetune.checkpoints.keyring import Argon2Params, PassphraseKey, Recipient, build_keyring, open_keyring
from securetune.errors import AccessDenied, CheckpointError, ConfigError
from securetune.files import canonical_json

CKPT = "11111111-2222-4333-8444-555555555555"


@pytest.fixture
def ceks():
    return {name: bytearray(os.urandom(32)) for name in ("adapter", "optimizer", "meta")}


@pytest.fixture
def build(ceks, keys, cheap_argon2):
    def call(**options):
        arguments = {
            "ckpt": CKPT,
            "epoch": 1,
            "recipients": [Recipient(keys.recipient_public)],
            "passphrase": PassphraseKey.derive(keys.passphrase, cheap_argon2),
        } | options
        return build_keyring(ceks, **arguments)

    return call


def opened(content, *, ckpt=CKPT, epoch=1, identity=None, passphrase=None, compartments=None):
    return open_keyring(
        content,
        name="keyring.json",
        ckpt=ckpt,
        epoch=epoch,
        identity=identity,
        passphrase=passphrase,
        compartments=compartments,
    )


def edited(content, change, *, mac_key=None):
    """Apply ``change`` to the parsed keyring; with ``mac_key`` the MAC is made to fit again."""
    document = json.loads(content)
    change(document)
    if mac_key is not None:
        body = {name: value for name, value in document.items() if name != "mac"}
        document["mac"] = keyring._mac(mac_key, body)
    return canonical_json(document)


def test_recipient_and_passphrase_open_every_compartment(build, ceks, keys):
    content = build()
    assert opened(content, identity=keys.recipient) == ceks
    assert opened(content, passphrase=keys.passphrase) == ceks
    assert opened(content, passphrase=bytearray(keys.passphrase)) == ceks


def test_recipient_opens_only_what_was_granted(build, ceks, keys):
    evaluator = Recipient(keys.evaluator_public, frozenset({"adapter"}))
    content = build(recipients=[Recipient(keys.recipient_public), evaluator])
    assert opened(content, identity=keys.evaluator) == {name: ceks[name] for name in ("adapter", "meta")}
    with pytest.raises(AccessDenied):
        opened(content, identity=keys.evaluator, compartments=["optimizer"])


def test_only_the_wanted_keys_come_back(build, keys):
    assert set(opened(build(), identity=keys.recipient, compartments=["adapter"])) == {"adapter", "meta"}


def test_every_failure_looks_the_same(build, ceks, keys):
    content = build()

    def tamper(document):
        for slot in document["slots"]:
            raw = bytearray(base64.b64decode(slot["ct"]))
            raw[-1] ^= 1
            slot["ct"] = base64.b64encode(raw).decode()

    def move(document):
        for slot in document["slots"]:
            slot["comp"] = {"adapter": "optimizer", "optimizer": "adapter", "meta": "meta"}[slot["comp"]]

    def zero_share(document):
        for slot in document["slots"]:
            slot["ct"] = base64.b64encode(bytes(32) + base64.b64decode(slot["ct"])[32:]).decode()

    def cut(document):
        for slot in document["slots"]:
            slot["ct"] = base64.b64encode(base64.b64decode(slot["ct"])[:-1]).decode()

    def lengthen(document):
        for slot in document["slots"]:
            slot["ct"] = base64.b64encode(base64.b64decode(slot["ct"]) + b"x").decode()

    def not_base64(document):
        for slot in document["slots"]:
            slot["ct"] = "!!"

    def drop(document):
        document["slots"] = [slot for slot in document["slots"] if slot["comp"] != "adapter"]

    def add(document):
        document["slots"].append(document["slots"][0] | {"id": "0" * 16})

    failures = {
        "wrong key": (content, {"identity": keys.stranger}),
        "wrong passphrase": (content, {"passphrase": b"wrong"}),
        "no such compartment": (content, {"identity": keys.recipient, "compartments": ["rng"]}),
        "no passphrase slot": (build(passphrase=None), {"passphrase": keys.passphrase}),
        "changed MAC": (edited(content, lambda d: d.update(mac="0" * 64)), {"identity": keys.recipient}),
        "slot removed": (edited(content, drop), {"identity": keys.recipient}),
        "slot added": (edited(content, add), {"identity": keys.recipient}),
    }
    for change in (tamper, move, zero_share, cut, lengthen, not_base64):
        changed = edited(content, change, mac_key=ceks["meta"])
        failures[change.__name__] = (changed, {"identity": keys.recipient})
        failures[change.__name__ + " with passphrase"] = (changed, {"passphrase": keys.passphrase})
    messages = set()
    for what, (keyring_content, credentials) in failures.items():
        with pytest.raises(AccessDenied) as caught:
            opened(keyring_content, **credentials)
        assert type(caught.value) is AccessDenied, what
        messages.add(str(caught.value))
    assert len(messages) == 1
    assert "no key slot could be opened" in messages.pop()


def test_wrong_key_costs_the_same_work_as_a_tampered_slot(build, keys, monkeypatch):
    good = build()
    bad = edited(good, lambda d: d.update(mac="0" * 64))
    suite, tried = keyring._SUITE, []

    class CountingSuite:
        def decrypt(self, *arguments):
            tried.append(arguments)
            return suite.decrypt(*arguments)

    monkeypatch.setattr(keyring, "_SUITE", CountingSuite())
    for content, identity in [(good, keys.stranger), (bad, keys.recipient)]:
        tried.clear()
        with pytest.raises(AccessDenied):
            opened(content, identity=identity)
        assert len(tried) == 3


@pytest.mark.parametrize(("ckpt", "epoch"), [("9" + CKPT[1:], 1), (CKPT, 2)])
def test_slots_of_another_checkpoint_or_epoch_do_not_open(ckpt, epoch, build, ceks, keys):
    content = build()
    with pytest.raises(CheckpointError, match="another checkpoint or epoch"):
        opened(content, ckpt=ckpt, epoch=epoch, identity=keys.recipient)

    def move(document):
        document["ckpt"], document["epoch"] = ckpt, epoch
        for slot in document["slots"]:
            slot["epoch"] = epoch

    moved = edited(content, move, mac_key=ceks["meta"])
    with pytest.raises(AccessDenied):
        opened(moved, ckpt=ckpt, epoch=epoch, identity=keys.recipient)


def test_two_slots_with_different_keys_for_one_compartment_are_refused(build, ceks, keys):
    content = build()
    other = build_keyring(
        ceks | {"adapter": bytearray(32)},
        ckpt=CKPT,
        epoch=1,
        recipients=[Recipient(keys.recipient_public)],
        passphrase=None,
    )
    foreign = next(slot for slot in json.loads(other)["slots"] if slot["comp"] == "adapter")
    mixed = edited(content, lambda d: d["slots"].append(foreign), mac_key=ceks["meta"])
    with pytest.raises(AccessDenied):
        opened(mixed, identity=keys.recipient)


@pytest.mark.parametrize(
    "cost",
    [
        {"m": 1 << 30}, {"m": (1 << 20) + 1}, {"m": 0}, {"m": 7}, {"m": -8}, {"m": 2**50}, {"m": "0x10"},
        {"m": "08"},
        {"t": 0}, {"t": 11}, {"t": 2**31}, {"t": -1}, {"p": 0}, {"p": 17}, {"p": 2**24}, {"p": True},
        {"m": 16, "p": 4},
        {"salt": "AAAA"}, {"salt": ""},
    ],
    ids=str,
)  # fmt: skip
def test_cost_out_of_bounds_is_refused_before_argon2_runs(cost, build, ceks, keys, monkeypatch):
    content = edited(
        build(), lambda d: [s.update(cost) for s in d["slots"] if "salt" in s], mac_key=ceks["meta"]
    )
    monkeypatch.setattr(keyring, "Argon2id", lambda **_: pytest.fail("Argon2id ran"))
    with pytest.raises(CheckpointError):
        opened(content, passphrase=keys.passphrase)


@pytest.mark.parametrize("count", [65, 20_000])
def test_too_many_slots_are_refused(count, build, keys):
    def flood(document):
        document["slots"] = [document["slots"][0]] * count

    with pytest.raises(CheckpointError, match=r"slots|bytes"):
        opened(edited(build(), flood), identity=keys.recipient)


def test_too_many_passphrases_are_refused_before_argon2_runs(build, ceks, keys, monkeypatch):
    def flood(document):
        slot = next(slot for slot in document["slots"] if "salt" in slot)
        document["slots"] += [
            slot | {"id": f"{i:016x}", "salt": base64.b64encode(bytes([i]) * 16).decode()} for i in range(4)
        ]

    content = edited(build(), flood, mac_key=ceks["meta"])
    monkeypatch.setattr(keyring, "Argon2id", lambda **_: pytest.fail("Argon2id ran"))
    with pytest.raises(CheckpointError, match="5 passphrases; at most 4"):
        opened(content, passphrase=keys.passphrase)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(v="securetune.vault/2"),
        lambda d: d.update(extra=1),
        lambda d: d["slots"][0].update(role="owner"),
        lambda d: d["slots"][0].update(kind="plain"),
        lambda d: d["slots"][0].update(kind="../plugin"),
        lambda d: d["slots"][0].pop("epoch"),
        lambda d: d["slots"][0].update(comp="other"),
        lambda d: d.update(slots=[]),
        lambda d: d.update(mac="zz"),
        lambda d: d.pop("mac"),
    ],
)
def test_unknown_or_missing_field_is_refused(change, build, keys):
    with pytest.raises(CheckpointError, match="not a valid keyring"):
        opened(edited(build(), change), identity=keys.recipient)


def test_keyring_that_is_not_canonical_is_refused(build, keys):
    with pytest.raises(CheckpointError, match="canonical"):
        opened(json.dumps(json.loads(build()), indent=1).encode(), identity=keys.recipient)


def test_passphrase_wrapping_commits_to_the_key(ceks, cheap_argon2):
    # a slot that opens under two passphrases would let an attacker test many passphrases at once
    one = PassphraseKey.derive(b"one", cheap_argon2, bytes(16))
    two = PassphraseKey.derive(b"two", cheap_argon2, bytes(16))
    wrapped = keyring.encrypt(ceks["adapter"], key=one.key, context=b"slot")
    with pytest.raises(CheckpointError):
        keyring.decrypt(wrapped, key=two.key, context=b"slot")


def test_recipient_key_of_low_order_is_refused(build):
    with pytest.raises(ConfigError, match="not usable"):
        build(recipients=[Recipient(X25519PublicKey.from_public_bytes(bytes(32)))])


def test_compartment_that_nobody_can_open_is_refused(build, keys):
    with pytest.raises(ConfigError, match=r"nobody could open \['optimizer'\]"):
        build(recipients=[Recipient(keys.evaluator_public, frozenset({"adapter"}))], passphrase=None)


def test_unknown_compartment_of_a_recipient_is_refused(keys):
    with pytest.raises(ConfigError, match=r"unknown compartments \['wieghts'\]"):
        Recipient(keys.recipient_public, frozenset({"wieghts"}))


@pytest.mark.parametrize(
    "cost", [(4, 1, 1), (32, 0, 1), (32, 11, 1), (32, 1, 0), (32, 1, 17), (16, 1, 4), (1 << 21, 1, 1)]
)
def test_writer_refuses_the_costs_that_readers_refuse(cost):
    with pytest.raises(ConfigError, match="Argon2id"):
        Argon2Params(*cost)


def test_repr_shows_no_key(cheap_argon2):
    derived = PassphraseKey.derive(b"secret", cheap_argon2)
    assert "key=" not in repr(derived)
    assert bytes(derived.key).hex() not in repr(derived)
