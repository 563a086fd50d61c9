"""Cobblestone-256: the official vectors, tampering, and random access against plain slices."""

import hashlib
import io
import json
import os
import zlib
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securetune.checkpoints.cobblestone import (
    CHUNK_BYTES,
    RangeDecryptor,
    ciphertext_length,
    decrypt,
    decrypt_stream,
    encrypt,
    encrypt_stream,
    plaintext_length,
)
from securetune.errors import CheckpointError

VECTORS = Path(__file__).resolve().parents[3].parent / "shared" / "vectors" / "chunked_encryption"
KEY = bytes(range(32))
SEALED_CHUNK = CHUNK_BYTES + 16


@cache
def load_vectors(name):
    path = VECTORS / name
    if not path.is_file():
        return []
    groups = json.loads(path.read_text())["testGroups"]
    return [test for group in groups for test in group["tests"]]


AES_256 = load_vectors("c2sp_chunked_encryption_aes_256_gcm_test.json")
AES_128 = load_vectors("c2sp_chunked_encryption_aes_128_gcm_test.json")
needs_vectors = pytest.mark.skipif(not AES_256, reason=f"the official vectors are not in {VECTORS}")


def case(test):
    return {
        "message": zlib.decompress(bytes.fromhex(test["ct"])),
        "key": bytes.fromhex(test["key"]),
        "context": bytes.fromhex(test["ctx"]),
    }


def read_at(message):
    return lambda offset, count: message[offset : offset + count]


def by_range(message, *, key, context):
    decryptor = RangeDecryptor(read_at(message), len(message), key=key, context=context)
    return decryptor.read(0, decryptor.length)


def by_stream(message, *, key, context):
    plain = io.BytesIO()
    decrypt_stream(io.BytesIO(message), plain, key=key, context=context)
    return plain.getvalue()


@needs_vectors
def test_all_official_vectors_are_found():
    assert (len(AES_256), len(AES_128)) == (35, 35)


@needs_vectors
@pytest.mark.parametrize(
    "open_message", [decrypt, by_stream, by_range], ids=lambda function: function.__name__
)
@pytest.mark.parametrize("test", AES_256, ids=lambda test: f"{test['tcId']}-{test['result']}")
def test_official_vector(test, open_message):
    if test["result"] == "valid":
        plain = open_message(**case(test))
        assert (len(plain), hashlib.sha512(plain).hexdigest()) == (test["msgLength"], test["msgSha512"])
    else:
        with pytest.raises((CheckpointError, ValueError)):
            open_message(**case(test))


@needs_vectors
@pytest.mark.parametrize("test", AES_128, ids=lambda test: str(test["tcId"]))
def test_vector_of_the_128_bit_variant_is_refused(test):
    with pytest.raises((CheckpointError, ValueError)):
        decrypt(**case(test))


@needs_vectors
@pytest.mark.parametrize(
    "test", [t for t in AES_256 if "PartialPlaintext" in t["flags"]], ids=lambda test: str(test["tcId"])
)
def test_stream_gives_out_no_byte_beyond_the_valid_prefix(test):
    plain = io.BytesIO()
    arguments = case(test)
    with pytest.raises(CheckpointError):
        decrypt_stream(io.BytesIO(arguments.pop("message")), plain, **arguments)
    assert len(plain.getvalue()) <= test["msgLength"]
    if len(plain.getvalue()) == test["msgLength"]:
        assert hashlib.sha512(plain.getvalue()).hexdigest() == test["msgSha512"]


@needs_vectors
@pytest.mark.parametrize(
    "test", [t for t in AES_256 if t["result"] == "invalid"], ids=lambda test: str(test["tcId"])
)
def test_length_is_authenticated_before_anything_is_read(test):
    arguments = case(test)
    message = arguments.pop("message")
    if "ValidFinalChunk" in test["flags"]:
        RangeDecryptor(read_at(message), len(message), **arguments)
    else:
        with pytest.raises((CheckpointError, ValueError)):
            RangeDecryptor(read_at(message), len(message), **arguments)


@pytest.mark.parametrize("size", [0, 1, 16383, 16384, 16385, 32768, 256 * 16384, 257 * 16384 + 5])
def test_roundtrip_at_chunk_borders(size):
    plain = os.urandom(size)
    message = encrypt(plain, key=KEY, context=b"c")
    assert len(message) == ciphertext_length(size)
    assert plaintext_length(len(message)) == size
    assert by_stream(message, key=KEY, context=b"c") == by_range(message, key=KEY, context=b"c") == plain


def test_stream_and_one_shot_write_the_same_format():
    plain = os.urandom(3_000_000)
    message = io.BytesIO()
    assert encrypt_stream(io.BytesIO(plain), message, key=KEY, context=b"c") == len(plain)
    assert decrypt(message.getvalue(), key=KEY, context=b"c") == plain


@settings(max_examples=60)
@given(size=st.integers(0, 70_000), start=st.integers(0, 70_000), count=st.integers(0, 70_000))
def test_range_equals_slice_of_the_whole(size, start, count):
    plain = bytes(i * 31 % 251 for i in range(size))
    start = min(start, size)
    count = min(count, size - start)
    message = encrypt(plain, key=KEY, context=b"c")
    decryptor = RangeDecryptor(read_at(message), len(message), key=KEY, context=b"c")
    assert decryptor.read(start, count) == plain[start : start + count]


@pytest.mark.parametrize(("offset", "count"), [(-1, 1), (0, -1), (0, 101), (100, 1), (101, 0)])
def test_range_outside_the_plaintext_is_refused(offset, count):
    message = encrypt(bytes(100), key=KEY, context=b"")
    with pytest.raises(ValueError, match="outside the 100 bytes"):
        RangeDecryptor(read_at(message), len(message), key=KEY, context=b"").read(offset, count)


def test_message_cut_at_any_byte_is_refused():
    message = encrypt(bytes(2 * CHUNK_BYTES + 100), key=KEY, context=b"")
    for length in range(len(message)):
        with pytest.raises(CheckpointError):
            decrypt(message[:length], key=KEY, context=b"")


def rearranged():
    message = encrypt(os.urandom(3 * CHUNK_BYTES + 100), key=KEY, context=b"")
    header, body = message[:56], message[56:]
    chunks = [body[i : i + SEALED_CHUNK] for i in range(0, len(body), SEALED_CHUNK)]
    return {
        "last chunk dropped": header + b"".join(chunks[:-1]),
        "middle chunk dropped": header + chunks[0] + chunks[2] + chunks[3],
        "chunk doubled": header + chunks[0] + chunks[0] + b"".join(chunks[2:]),
        "chunks swapped": header + chunks[1] + chunks[0] + b"".join(chunks[2:]),
        "last chunk twice": message + chunks[3],
        "full chunk after the end": message + chunks[0],
    } | {f"{size} bytes added": message + bytes(size) for size in (1, 12, 16, 20)}


@pytest.mark.parametrize(("what", "message"), rearranged().items())
@pytest.mark.parametrize(
    "open_message", [decrypt, by_stream, by_range], ids=lambda function: function.__name__
)
def test_rearranged_message_is_refused(what, message, open_message):
    with pytest.raises(CheckpointError):
        open_message(message, key=KEY, context=b"")


@pytest.mark.parametrize("position", [0, 23, 24, 55, 56, 56 + 500, 56 + CHUNK_BYTES, -17, -1])
@pytest.mark.parametrize(
    "open_message", [decrypt, by_stream, by_range], ids=lambda function: function.__name__
)
def test_changed_bit_is_refused(position, open_message):
    message = bytearray(encrypt(os.urandom(CHUNK_BYTES + 100), key=KEY, context=b""))
    message[position] ^= 1
    with pytest.raises(CheckpointError):
        open_message(bytes(message), key=KEY, context=b"")


@pytest.mark.parametrize(("key", "context"), [(bytes(32), b"right"), (KEY, b"wrong"), (KEY, b"")])
@pytest.mark.parametrize(
    "open_message", [decrypt, by_stream, by_range], ids=lambda function: function.__name__
)
def test_other_key_or_context_is_refused(key, context, open_message):
    with pytest.raises(CheckpointError, match="key or its context does not fit"):
        open_message(encrypt(b"secret", key=KEY, context=b"right"), key=key, context=context)


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_key_of_another_length_is_refused(size):
    with pytest.raises(ValueError, match=f"32 bytes, got {size}"):
        encrypt(b"", key=bytes(size), context=b"")


def test_intact_range_is_read_although_another_chunk_is_bad():
    plain = os.urandom(3 * CHUNK_BYTES)
    message = bytearray(encrypt(plain, key=KEY, context=b""))
    message[56 + SEALED_CHUNK + 5] ^= 1
    message = bytes(message)
    decryptor = RangeDecryptor(read_at(message), len(message), key=KEY, context=b"")
    assert decryptor.read(10, 1000) == plain[10:1010]
    with pytest.raises(CheckpointError, match="chunk 1"):
        decryptor.read(10, CHUNK_BYTES)
    with pytest.raises(CheckpointError):
        decrypt(message, key=KEY, context=b"")


def test_every_message_has_its_own_salt():
    salts = {encrypt(b"", key=KEY, context=b"")[:24] for _ in range(20_000)}
    assert len(salts) == 20_000


def test_forked_process_draws_other_salts():
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, encrypt(b"", key=KEY, context=b"")[:24])
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 24) != encrypt(b"", key=KEY, context=b"")[:24]
    os.close(reader)
    os.close(writer)
