"""Position-addressed Gaussian noise from a ChaCha20 keystream.

Every normal has an address ``(stream, step, index)``, and its value depends on the secret key and the address
alone. So replicas agree and shards never overlap without talking to each other, whatever the sharding or the
micro-batch.

Layout, to be reproduced word for word by a kernel (RFC 8439, section 2.3; 32-bit words, little-endian):

* words 0-3: the constants; words 4-11: the 256-bit key;
* word 12 (block counter) and word 13 (first nonce word): low and high half of the 64-bit block number ``index
  // 8``;
* word 14: ``step``; word 15: ``stream``.

A block is 64 bytes, that is eight 64-bit little-endian words ``w[0..7]``, and gives eight normals. Lanes
``2p`` and ``2p + 1`` are one Box-Muller pair: ``u1 = (w[2p] + 1) / 2**64`` in (0, 1], ``u2 = w[2p + 1] /
2**64`` in [0, 1], ``r = sqrt(-2 ln u1)``; lane ``2p`` is ``r cos(2 pi u2)`` and lane ``2p + 1`` is ``r sin(2
pi u2)``, in float64, times the standard deviation, rounded to float32 last. The largest magnitude is
``sqrt(128 ln 2) = 9.42``: the tail that is cut has mass below 1e-20 per draw, where 32-bit uniforms would cut
3e-11.

Not covered: attacks on the least significant bits of floating-point noise (Mironov 2012,
https://doi.org/10.1145/2382196.2382264), and an attacker who reads this process's memory.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, NoReturn, Protocol

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from torch import Tensor

from securetune.errors import PrivacyError
from securetune_kernels import gaussian_noise

__all__ = ["KEY_BYTES", "SAMPLING_STREAM", "Noise", "NoiseSource", "SecretKey", "keystream_words"]

KEY_BYTES = 32
SAMPLING_STREAM = 2**32 - 1  # the sampler's; noise uses the streams below 2**31
MAX_STEP = 2**32 - 1
MAX_NOISE_STREAM = 2**31 - 1
MAX_INDEX = 2**48  # far above any model, far below the 2**67 that the layout holds
_WORDS_PER_BLOCK = 8
_BLOCK_BYTES = 64
_CHUNK_WORDS = 1 << 16  # 512 KiB of float64: stays in cache and bounds memory


class Noise(Protocol):
    """Position-addressed Gaussian noise: independent (:class:`NoiseSource`) or correlated over steps."""

    @property
    def reportable_epsilon(self) -> bool:
        """Whether an epsilon may be reported for what this noise hides."""
        ...

    def begin_run(self) -> None:
        """Belong to one run from now on; see :meth:`NoiseSource.begin_run`."""
        ...

    def normal(
        self,
        *,
        step: int,
        stream: int = 0,
        start: int = 0,
        count: int,
        stddev: float,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Return the noise of the entries ``[start, start + count)``; see :meth:`NoiseSource.normal`."""
        ...


class NoiseSource:
    """Draw Gaussian noise by address under a secret key of its own.

    Use one source per training run: the same address always gives the same noise, so two sums that shared an
    address would reveal their difference.

    Guarantees:
        Any slice ``[start, start + count)`` equals that slice of the whole. Different ``(stream, step, index
        // 8)`` never share a keystream block. Steps never go back, so no address is used for a second sum by
        mistake. The key is not shown by ``repr`` and cannot be pickled or copied.

    Args:
        key: 32 bytes, for tests only: a run with a fixed key reports no epsilon. By default a new key from
            the operating system, kept in memory and nowhere else; a :class:`SecretKey` where processes share
            one.

    Raises:
        ValueError: If ``key`` has the wrong length.
    """

    def __init__(self, key: "bytes | SecretKey | None" = None) -> None:
        self._key = secret_key(key)
        self._has_secret_key = not isinstance(key, bytes)
        self._last_step = 0
        self._has_run = False

    def __repr__(self) -> str:
        return f"NoiseSource(key={'<secret>' if self._has_secret_key else '<fixed, for tests>'})"

    def __reduce__(self) -> NoReturn:
        raise refuse_to_copy("NoiseSource")

    @property
    def reportable_epsilon(self) -> bool:
        """Whether an epsilon may be reported for what this source noised: false for a fixed test key."""
        return self._has_secret_key

    def begin_run(self) -> None:
        """Belong to one run from now on: it counts its steps from 0, and its addresses are its own.

        Raises:
            PrivacyError: If another run has begun with this source.
        """
        if self._has_run:
            raise reused_noise("NoiseSource")
        self._has_run = True

    def normal(
        self,
        *,
        step: int,
        stream: int = 0,
        start: int = 0,
        count: int,
        stddev: float,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Draw ``count`` independent normals of mean 0 at consecutive addresses.

        Args:
            step: Logical step of the run, from 0; may repeat (shards of one step) but never go back.
            stream: Keeps several uses within one step apart, from 0 to 2**31 - 1.
            start: Flat index of the first normal, >= 0.
            count: How many, >= 0; ``start + count`` at most 2**48.
            stddev: Standard deviation >= 0, in the units of what is noised (``noise_multiplier *
                max_grad_norm``).
            device: Where to draw. A GPU draws with the same words of the generator; its normals differ from
                the CPU's by a few units in the last place.

        Returns:
            ``[count]``, float32, on ``device``.

        Raises:
            ValueError: If an argument is out of range.
            PrivacyError: If ``step`` is below one already drawn.
        """
        if not 0 <= stddev <= 1e37:  # 9.42 stddevs must fit into float32
            raise ValueError(f"stddev must be a finite number from 0 to 1e37, got {stddev}.")
        if start < 0 or count < 0 or start + count > MAX_INDEX:
            raise ValueError(f"start and count must be >= 0 and end by {MAX_INDEX}, got {start} and {count}.")
        self._go_to(step, stream)
        if torch.device(device).type != "cpu":
            key, now = self.on_device(step=step, stream=stream, device=device)
            return gaussian_noise(
                torch.zeros(count, device=device),
                key=key,
                step=now,
                stddev=stddev,
                stream=stream,
                start=start,
            )
        out = np.empty(count, dtype=np.float32)
        first_word = start // _WORDS_PER_BLOCK * _WORDS_PER_BLOCK  # pairs never straddle a block
        last_word = start + count + (-(start + count)) % _WORDS_PER_BLOCK

        def fill(word: int) -> None:
            end = min(word + _CHUNK_WORDS, last_word)
            words = keystream_words(self._key, stream=stream, step=step, start=word, count=end - word)
            normals = box_muller(words)
            normals *= stddev
            low, high = max(word, start), min(end, start + count)
            out[low - start : high - start] = normals[low - word : high - word]

        chunks, threads = range(first_word, last_word, _CHUNK_WORDS), torch.get_num_threads()
        if min(threads, len(chunks)) <= 1:  # a thread's first operation of torch costs milliseconds
            for word in chunks:
                fill(word)
            return torch.from_numpy(out)
        # the address decides each value, so chunks may be drawn in any order and in parallel
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(fill, chunks):
                pass
        return torch.from_numpy(out)

    def on_device(self, *, step: int, stream: int, device: torch.device | str) -> "KeyAndStep":
        """Return the secret key and a step for an op that draws on a device by itself.

        Args:
            step: As in :meth:`normal`; may repeat but never go back.
            stream: As in :meth:`normal`.
            device: Where the op runs.

        Returns:
            The key, to be kept in memory and nowhere else, and the step.

        Raises:
            ValueError: If an argument is out of range.
            PrivacyError: If ``step`` is below one already drawn.
        """
        self._go_to(step, stream)
        words = torch.from_numpy(np.frombuffer(self._key, dtype="<i4").astype(np.int32))
        return KeyAndStep(words.to(device), torch.tensor([step], device=device))

    def _go_to(self, step: int, stream: int) -> None:
        if not 0 <= stream <= MAX_NOISE_STREAM:
            raise ValueError(f"stream must be from 0 to {MAX_NOISE_STREAM}, got {stream}.")
        check_step(step)
        if step < self._last_step:
            raise PrivacyError(
                f"noise for step {step} was asked for after step {self._last_step}: noise that is used for "
                "two different sums reveals their difference. Use a new NoiseSource for a new run, and count "
                "its steps upwards."
            )
        self._last_step = step


class KeyAndStep(NamedTuple):
    """What an op needs to draw the noise of a step.

    Attributes:
        key: ``[8]``, int32: the little-endian words of the secret key.
        step: ``[1]``, int64.
    """

    key: Tensor
    step: Tensor


def box_muller(words: np.ndarray) -> np.ndarray:
    """Turn 64-bit uniform words into standard normals, pair by pair (Box and Muller 1958).

    Args:
        words: ``[N]``, uint64, ``N`` even.

    Returns:
        ``[N]``, float64.
    """
    uniform = words.astype(np.float64)
    radius = uniform[0::2]
    radius += 1.0
    radius *= 2.0**-64
    radius = np.log(radius)
    radius *= -2.0
    radius = np.sqrt(radius)
    # torch's cosine is five times as fast as numpy's
    angle = torch.from_numpy(uniform[1::2] * (2.0**-64 * 2.0 * math.pi))
    normals = np.empty(len(words), dtype=np.float64)
    np.multiply(angle.cos().numpy(), radius, out=normals[0::2])
    np.multiply(angle.sin().numpy(), radius, out=normals[1::2])
    return normals


def keystream_words(key: bytes, *, stream: int, step: int, start: int, count: int) -> np.ndarray:
    """Read ``count`` 64-bit keystream words from word ``start`` of a ``(stream, step)``.

    Args:
        key: 32 bytes.
        stream: Word 15 of the ChaCha20 state, below 2**32.
        step: Word 14 of the state, below 2**32.
        start: First 64-bit word, a multiple of 8 (a whole block).
        count: How many words, >= 0.

    Returns:
        ``[count]``, uint64.
    """
    assert start % _WORDS_PER_BLOCK == 0
    parts: list[bytes] = []
    block = start // _WORDS_PER_BLOCK
    end = block + -(-count // _WORDS_PER_BLOCK)
    while block < end:
        # RFC 8439 leaves open what follows block counter 2**32 - 1, so no call runs over it.
        stop = min(end, (block // 2**32 + 1) * 2**32)
        state = block.to_bytes(8, "little") + step.to_bytes(4, "little") + stream.to_bytes(4, "little")
        encryptor = Cipher(ChaCha20(key, state), mode=None).encryptor()
        parts.append(encryptor.update(bytes((stop - block) * _BLOCK_BYTES)))
        block = stop
    return np.frombuffer(b"".join(parts), dtype="<u8")[:count]


class SecretKey:
    """A new key from the operating system that the processes of one run share, in memory only.

    It is not shown by ``repr`` and cannot be pickled or copied.

    Args:
        secret: 32 bytes that no other run has.

    Raises:
        ValueError: If ``secret`` has the wrong length.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret_key(secret)

    def __repr__(self) -> str:
        return "SecretKey(<secret>)"

    def __reduce__(self) -> NoReturn:
        raise refuse_to_copy("SecretKey")


def secret_key(key: bytes | SecretKey | None) -> bytes:
    """Check a test key, or take a new secret one from the operating system.

    Args:
        key: 32 bytes, a shared secret, or ``None``.

    Returns:
        32 bytes.

    Raises:
        ValueError: If ``key`` has the wrong length.
    """
    if key is None:
        return os.urandom(KEY_BYTES)
    if isinstance(key, SecretKey):
        return key._secret
    if len(key) != KEY_BYTES:
        raise ValueError(f"key must be {KEY_BYTES} bytes, got {len(key)}.")
    return key


def reused_noise(name: str) -> PrivacyError:
    """Explain why a second run gets no noise from the source of the first.

    Args:
        name: Its class.

    Returns:
        The error to raise.
    """
    return PrivacyError(
        f"this {name} belongs to another run: its noise at step 0 would be used for two different sums and "
        f"reveal their difference. Make a new {name} for each run."
    )


def check_step(step: int) -> None:
    """Refuse a step that the keystream layout cannot address.

    Args:
        step: Logical step of the run.

    Raises:
        ValueError: If ``step`` is outside 0 .. 2**32 - 1.
    """
    if not 0 <= step <= MAX_STEP:
        raise ValueError(f"step must be from 0 to {MAX_STEP}, got {step}.")


def refuse_to_copy(name: str) -> TypeError:
    """Explain why an object with a secret key is not pickled.

    Args:
        name: Its class.

    Returns:
        The error to raise.
    """
    return TypeError(
        f"{name} cannot be pickled or copied: its key must not leave this process. Make a new one instead; a "
        "resumed run draws a new key."
    )
