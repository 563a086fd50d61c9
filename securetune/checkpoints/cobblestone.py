"""Cobblestone-256: bulk encryption with key commitment and random access.

C2SP chunked encryption, https://c2sp.org/chunked-encryption@v1, with AES-256-GCM and HKDF-Expand-SHA512: a
24-byte random salt, a 32-byte commitment to key, salt and context, then chunks of 16 KiB; the last chunk is
always shorter, which marks the end. Streams go through ``cryptography.cobblestone``; random access, which it
does not offer, is done here.
"""

import hmac
from collections.abc import Callable
from typing import Protocol

from cryptography.cobblestone import Cobblestone256Decryptor, Cobblestone256Encryptor
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from securetune.errors import CheckpointError

KEY_BYTES = 32
CHUNK_BYTES = 16384
_TAG_BYTES = 16
_NONCE_BYTES = 12
_SALT_BYTES = 24
_COMMITMENT_BYTES = 32
_HEADER_BYTES = _SALT_BYTES + _COMMITMENT_BYTES
_SEALED_CHUNK_BYTES = CHUNK_BYTES + _TAG_BYTES
_MAX_CHUNKS = 2**38
_INFO_PREFIX = b"c2sp.org/chunked-encryption@v1+AEAD_AES_256_GCM\0"
_BLOCK_BYTES = 64 * CHUNK_BYTES  # 1 MiB: large enough to hide call overhead, small enough to stay in cache
_REFUSED = "cannot be decrypted: it was changed or cut, or the key or its context does not fit."


class Source(Protocol):
    """Where a stream is read from, such as a file opened unbuffered."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Fill ``buffer`` with the next bytes and return how many; 0 at the end."""
        ...


class Sink(Protocol):
    """Where a stream is written to; every call takes all the bytes."""

    def write(self, data: memoryview | bytes, /) -> object:
        """Take the next bytes; the buffer may be reused after the call."""
        ...


def ciphertext_length(length: int) -> int:
    """Return the size in bytes of the message for ``length`` bytes of plaintext."""
    return _HEADER_BYTES + length + _TAG_BYTES * (length // CHUNK_BYTES + 1)


def plaintext_length(length: int) -> int:
    """Return how many bytes of plaintext a message of ``length`` bytes holds.

    Args:
        length: Size of the message in bytes.

    Returns:
        The plaintext's size in bytes.

    Raises:
        CheckpointError: If no message has this size; it was cut.
    """
    chunks, rest = divmod(length - _HEADER_BYTES, _SEALED_CHUNK_BYTES)
    if length < _HEADER_BYTES or rest < _TAG_BYTES or chunks >= _MAX_CHUNKS:
        raise CheckpointError(f"a message of {length} bytes {_REFUSED}")
    return chunks * CHUNK_BYTES + rest - _TAG_BYTES


def encrypt_stream(source: Source, sink: Sink, *, key: bytes | bytearray, context: bytes) -> int:
    """Encrypt a stream, in bounded memory.

    Guarantees:
        Each call draws a new random salt, so key and nonce pairs never repeat, also after a crash or in a
        forked process.

    Args:
        source: The plaintext.
        sink: Takes the message.
        key: 32 uniformly random bytes; it may encrypt any number of messages.
        context: What the message is bound to. It is not stored: decryption needs exactly the same bytes.

    Returns:
        How many bytes of plaintext were read.

    Raises:
        ValueError: If ``key`` is not 32 bytes long.
    """
    _check_key(key)
    encryptor = Cobblestone256Encryptor(key, context)
    plain = memoryview(bytearray(_BLOCK_BYTES))
    message = memoryview(
        bytearray(_BLOCK_BYTES + _BLOCK_BYTES // 1024 + 16456)
    )  # the bound update_into asks for
    total = 0
    while count := source.readinto(plain):
        total += count
        sink.write(message[: encryptor.update_into(plain[:count], message)])
    sink.write(encryptor.finalize())
    _wipe_view(plain)
    return total


def decrypt_stream(source: Source, sink: Sink, *, key: bytes | bytearray, context: bytes) -> int:
    """Decrypt a stream, in bounded memory.

    Guarantees:
        Only authenticated bytes reach ``sink``. That the message is complete is known only after a normal
        return: after an error the caller must throw away what ``sink`` got.

    Args:
        source: The message.
        sink: Takes the plaintext.
        key: The 32 bytes it was encrypted with.
        context: The context it was encrypted with.

    Returns:
        How many bytes of plaintext were written.

    Raises:
        ValueError: If ``key`` is not 32 bytes long.
        CheckpointError: If the message was changed or cut, or the key or context is another.
    """
    _check_key(key)
    decryptor = Cobblestone256Decryptor(key, context)
    message = memoryview(bytearray(_BLOCK_BYTES))
    plain = memoryview(bytearray(_BLOCK_BYTES + _SEALED_CHUNK_BYTES))
    total = 0
    try:
        while count := source.readinto(message):
            produced = decryptor.update_into(message[:count], plain)
            total += produced
            sink.write(plain[:produced])
        last = decryptor.finalize()
    except InvalidTag as error:
        raise CheckpointError(f"the message {_REFUSED}") from error
    finally:
        _wipe_view(plain)
    sink.write(last)
    return total + len(last)


def encrypt(plaintext: bytes | bytearray, *, key: bytes | bytearray, context: bytes) -> bytes:
    """Encrypt bytes in memory; see :func:`encrypt_stream`."""
    _check_key(key)
    encryptor = Cobblestone256Encryptor(key, context)
    return encryptor.update(plaintext) + encryptor.finalize()


def decrypt(message: bytes, *, key: bytes | bytearray, context: bytes) -> bytes:
    """Decrypt bytes in memory: all of the plaintext or an error; see :func:`decrypt_stream`."""
    _check_key(key)
    decryptor = Cobblestone256Decryptor(key, context)
    try:
        return decryptor.update(message) + decryptor.finalize()
    except InvalidTag as error:
        raise CheckpointError(f"the message {_REFUSED}") from error


class RangeDecryptor:
    """Read parts of a message without decrypting the rest.

    Guarantees:
        The commitment and the last chunk are checked before anything else, so ``length`` is authenticated.
        Every byte returned is authenticated. Chunks outside the parts that are read are not looked at.
    """

    def __init__(
        self, read_at: Callable[[int, int], bytes], size: int, *, key: bytes | bytearray, context: bytes
    ) -> None:
        """Check the message's header and end.

        Args:
            read_at: ``read_at(offset, count)`` returns ``count`` bytes of the message, fewer only at its end.
            size: Size of the message in bytes.
            key: The 32 bytes it was encrypted with.
            context: The context it was encrypted with.

        Raises:
            ValueError: If ``key`` is not 32 bytes long.
            CheckpointError: If the header or the end was changed, or the key or context is another.
        """
        _check_key(key)
        self.length = plaintext_length(size)
        self._read_at = read_at
        header = read_at(0, _HEADER_BYTES)
        salt, commitment = header[:_SALT_BYTES], header[_SALT_BYTES:]
        derived = HKDFExpand(
            SHA512(), KEY_BYTES + _NONCE_BYTES + _COMMITMENT_BYTES, _INFO_PREFIX + salt + context
        ).derive(key)
        if not hmac.compare_digest(derived[KEY_BYTES + _NONCE_BYTES :], commitment):
            raise CheckpointError(f"the message {_REFUSED}")
        self._aead = AESGCM(derived[:KEY_BYTES])
        self._base_nonce = int.from_bytes(derived[KEY_BYTES : KEY_BYTES + _NONCE_BYTES], "big")
        self._decrypt_chunks(self.length // CHUNK_BYTES, 1)

    def read(self, offset: int, count: int) -> bytes:
        """Decrypt one part of the message.

        Args:
            offset: Where the part starts in the plaintext.
            count: How many bytes to return.

        Returns:
            Exactly ``count`` bytes.

        Raises:
            ValueError: If the part does not lie within the plaintext.
            CheckpointError: If a chunk it touches was changed.
        """
        if offset < 0 or count < 0 or offset + count > self.length:
            raise ValueError(
                f"bytes {offset}..{offset + count} lie outside the {self.length} bytes of plaintext."
            )
        if count == 0:
            return b""
        first = offset // CHUNK_BYTES
        chunks = (offset + count - 1) // CHUNK_BYTES - first + 1
        plain = self._decrypt_chunks(first, chunks)
        start = offset - first * CHUNK_BYTES
        return bytes(memoryview(plain)[start : start + count])

    def _decrypt_chunks(self, first: int, chunks: int) -> bytearray:
        plain = bytearray(min(chunks * CHUNK_BYTES, self.length - first * CHUNK_BYTES))
        view = memoryview(plain)
        block_chunks = _BLOCK_BYTES // CHUNK_BYTES
        for block in range(first, first + chunks, block_chunks):
            wanted = min(block_chunks, first + chunks - block)
            message = memoryview(
                self._read_at(_HEADER_BYTES + block * _SEALED_CHUNK_BYTES, wanted * _SEALED_CHUNK_BYTES)
            )
            for index in range(wanted):
                sealed = message[index * _SEALED_CHUNK_BYTES : (index + 1) * _SEALED_CHUNK_BYTES]
                start = (block - first + index) * CHUNK_BYTES
                nonce = (self._base_nonce ^ (block + index)).to_bytes(_NONCE_BYTES, "big")
                out = view[start : start + CHUNK_BYTES]
                if len(sealed) != len(out) + _TAG_BYTES:
                    raise CheckpointError(f"chunk {block + index} {_REFUSED}")
                try:
                    self._aead.decrypt_into(nonce, sealed, None, out)
                except InvalidTag as error:
                    raise CheckpointError(f"chunk {block + index} {_REFUSED}") from error
        return plain


def _check_key(key: bytes | bytearray) -> None:
    if len(key) != KEY_BYTES:
        raise ValueError(f"a Cobblestone-256 key has {KEY_BYTES} bytes, got {len(key)}.")


def _wipe_view(view: memoryview) -> None:
    view[:] = bytes(len(view))
