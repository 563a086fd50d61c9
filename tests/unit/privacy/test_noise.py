"""The noise: its keystream against RFC 8439, its distribution, its addresses, and the secrecy of its key."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from securetune.errors import PrivacyError
from securetune.privacy import noise
from securetune.privacy.noise import MAX_INDEX, NoiseSource, box_muller, keystream_words

KEY = bytes(range(32))
OTHER_KEY = bytes(range(1, 33))
LARGEST_WORD = 2**64 - 1


def draw(step=0, stream=0, start=0, count=8, stddev=1.0, key=KEY):
    return NoiseSource(key).normal(step=step, stream=stream, start=start, count=count, stddev=stddev)


def chacha20_block(key, words_12_to_15):
    """RFC 8439 section 2.3 in plain Python: the layout as a kernel will write it."""
    words = [0x61707865, 0x3320646E, 0x79622D32, 0x6B206574]
    words += [int.from_bytes(key[4 * i : 4 * i + 4], "little") for i in range(8)]
    words += words_12_to_15
    state = list(words)

    def rotate(x, n):
        return (x << n | x >> (32 - n)) & 0xFFFFFFFF

    def quarter_round(a, b, c, d):
        for target, other, mixed, shift in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            state[target] = (state[target] + state[other]) & 0xFFFFFFFF
            state[mixed] = rotate(state[mixed] ^ state[target], shift)

    for _ in range(10):
        for i in range(4):
            quarter_round(i, 4 + i, 8 + i, 12 + i)
        for i in range(4):
            quarter_round(i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4)
    block = [(x + y) & 0xFFFFFFFF for x, y in zip(state, words, strict=True)]
    return [block[i] | block[i + 1] << 32 for i in range(0, 16, 2)]


def test_reference_block_is_the_vector_of_rfc_8439():
    # section 2.3.2: counter 1, nonce 00:00:00:09:00:00:00:4a:00:00:00:00
    words = chacha20_block(KEY, [1, 0x09000000, 0x4A000000, 0])
    assert b"".join(word.to_bytes(8, "little") for word in words) == bytes.fromhex(
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"
    )


def test_keystream_is_the_vector_of_rfc_8439():
    # the same vector through the layout: block 1 + (0x09000000 << 32), step 0x4a000000, stream 0
    start = 8 * (1 + (0x09000000 << 32))
    words = keystream_words(KEY, stream=0, step=0x4A000000, start=start, count=8)
    assert words.tobytes() == bytes.fromhex(
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"
    )


def test_keystream_crosses_the_32_bit_counter_without_repeating():
    block = 2**32 - 1
    words = keystream_words(KEY, stream=3, step=7, start=8 * block, count=24)
    expected = [
        word for low, high in ((block, 0), (0, 1), (1, 1)) for word in chacha20_block(KEY, [low, high, 7, 3])
    ]
    assert words.tolist() == expected


@settings(max_examples=40)
@given(
    step=st.integers(0, 2**32 - 1),
    stream=st.integers(0, 2**31 - 1),
    block=st.integers(0, 2**40 // 8),
)
def test_address_layout(step, stream, block):
    words = keystream_words(KEY, stream=stream, step=step, start=8 * block, count=8)
    expected = chacha20_block(KEY, [block & 0xFFFFFFFF, block >> 32, step, stream])
    assert words.tolist() == expected
    normals = draw(step=step, stream=stream, start=8 * block)
    pairs = [
        math.sqrt(-2 * math.log((u + 1) / 2**64)) * turn(2 * math.pi * v / 2**64)
        for u, v in zip(expected[::2], expected[1::2], strict=True)
        for turn in (math.cos, math.sin)
    ]
    np.testing.assert_allclose(normals.numpy(), pairs, rtol=1e-6, atol=1e-7)


@settings(max_examples=60)
@given(start=st.integers(0, 3000), count=st.integers(0, 3000), offset=st.sampled_from([0, 5, 2**35 - 4]))
def test_a_slice_equals_the_slice_of_the_whole(start, count, offset):
    whole = draw(step=3, stream=1, start=offset, count=6000)
    assert torch.equal(
        draw(step=3, stream=1, start=offset + start, count=count), whole[start : start + count]
    )


def test_a_slice_across_chunks_equals_the_slice_of_the_whole():
    whole = draw(count=200_003)
    parts = [draw(start=start, count=min(70_001, 200_003 - start)) for start in range(0, 200_003, 70_001)]
    assert torch.equal(torch.cat(parts), whole)


def test_result_is_float32_and_scales_with_stddev():
    one, seven = draw(count=1001), draw(count=1001, stddev=7.0)
    assert one.dtype == torch.float32
    assert one.shape == (1001,)
    torch.testing.assert_close(seven, 7 * one, rtol=1e-6, atol=0)


def test_zero_stddev_and_zero_count():
    assert torch.equal(draw(stddev=0.0), torch.zeros(8))
    assert draw(count=0).shape == (0,)


@pytest.mark.parametrize("stddev", [1.0, 0.25])
def test_distribution_is_normal(stddev):
    sample = draw(count=400_000, stddev=stddev).double().numpy() / stddev
    assert stats.kstest(sample, "norm").pvalue > 1e-3
    # Anderson-Darling against a fully specified normal: 3.878 is the 1 % point (Stephens 1974, table 1, case
    # 0)
    log_cdf = stats.norm.logcdf(np.sort(sample))
    log_sf = stats.norm.logsf(np.sort(sample))[::-1]
    n = len(sample)
    anderson_darling = -n - np.mean((2 * np.arange(1, n + 1) - 1) * (log_cdf + log_sf))
    assert anderson_darling < 3.878
    for moment, expected in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
        spread = math.sqrt(math.prod(range(1, 2 * moment, 2)) / n)  # E[z^2k] = (2k - 1)!!
        assert abs(np.mean(sample**moment) - expected) < 5 * spread


def test_both_members_of_a_pair_and_all_lanes_are_uncorrelated():
    lanes = draw(count=800_000).reshape(-1, 8).double().numpy()
    correlation = np.corrcoef(lanes.T) - np.eye(8)
    squares = np.corrcoef((lanes**2).T) - np.eye(8)  # a shared radius would show here
    limit = 5 / math.sqrt(len(lanes))
    assert np.abs(correlation).max() < limit
    assert np.abs(squares).max() < limit


def test_tails_are_not_cut_at_32_bits():
    # 32-bit uniforms end at 6.66 sigma; the smallest word gives the largest normal
    words = np.array([0, 0, 0, 2**63, 1, 0], dtype=np.uint64)
    normals = box_muller(words)
    assert normals[0] == pytest.approx(math.sqrt(128 * math.log(2)))  # 9.42
    assert normals[2] == pytest.approx(-math.sqrt(128 * math.log(2)))
    assert normals[4] == pytest.approx(math.sqrt(126 * math.log(2)))


def test_tail_mass_of_a_word_is_that_of_the_normal():
    # P(r > x) = exp(-x^2 / 2): the word at quantile p must give exactly that radius, far out as well
    for exponent in (1, 10, 30, 50, 63):
        words = np.array([2 ** (64 - exponent) - 1, 0], dtype=np.uint64)
        assert box_muller(words)[0] == pytest.approx(math.sqrt(2 * exponent * math.log(2)))


def test_extreme_words_give_finite_normals():
    words = np.array([LARGEST_WORD, LARGEST_WORD, 0, LARGEST_WORD, LARGEST_WORD, 0], dtype=np.uint64)
    normals = box_muller(words)
    assert np.isfinite(normals).all()
    assert normals[0] == normals[4] == 0.0  # u1 = 1


def test_no_value_repeats_across_steps_streams_and_keys():
    draws = [draw(step, stream, count=1000) for step in range(4) for stream in range(4)]
    draws += [draw(start=2**35, count=1000), draw(key=OTHER_KEY, count=1000)]
    words = [
        keystream_words(KEY, stream=stream, step=step, start=0, count=4096)
        for step in (0, 1, 2**32 - 1)
        for stream in (0, 1, 2**32 - 1)
    ]
    assert len(np.unique(np.concatenate(words))) == 9 * 4096
    rows = torch.stack(draws).double().numpy()
    correlation = np.corrcoef(rows) - np.eye(len(rows))
    assert np.abs(correlation).max() < 5 / math.sqrt(1000)


@pytest.mark.gpu
def test_a_gpu_draws_the_same_noise():
    arguments = {"step": 3, "stream": 2, "start": 5, "count": 10_000, "stddev": 0.5}
    found = NoiseSource(KEY).normal(**arguments, device="cuda")
    torch.testing.assert_close(found.cpu(), draw(**arguments), rtol=0, atol=2e-6)


def test_new_sources_have_different_keys():
    first, second = (NoiseSource().normal(step=0, count=64, stddev=1.0) for _ in range(2))
    assert not torch.equal(first, second)


def test_steps_may_repeat_but_not_go_back():
    source = NoiseSource()
    first = source.normal(step=4, count=8, stddev=1.0)
    assert torch.equal(source.normal(step=4, count=8, stddev=1.0), first)
    source.normal(step=5, count=8, stddev=1.0)
    with pytest.raises(PrivacyError, match="noise for step 4 was asked for after step 5"):
        source.normal(step=4, count=8, stddev=1.0)


def test_fixed_key_reports_no_epsilon():
    assert NoiseSource().reportable_epsilon
    assert not NoiseSource(KEY).reportable_epsilon


def test_repr_hides_the_key():
    secret = NoiseSource()
    assert repr(secret) == "NoiseSource(key=<secret>)"
    assert repr(NoiseSource(KEY)) == "NoiseSource(key=<fixed, for tests>)"


@pytest.mark.parametrize("copy_it", [pickle.dumps, copy.copy, copy.deepcopy])
def test_source_cannot_be_pickled_or_copied(copy_it):
    with pytest.raises(TypeError, match="NoiseSource cannot be pickled or copied"):
        copy_it(NoiseSource())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stddev": -1.0}, "stddev must be a finite number from 0 to 1e37, got -1.0"),
        ({"stddev": math.inf}, "stddev must be a finite number from 0 to 1e37, got inf"),
        ({"stddev": math.nan}, "stddev must be a finite number from 0 to 1e37, got nan"),
        ({"step": -1}, "step must be from 0 to 4294967295, got -1"),
        ({"step": 2**32}, "step must be from 0 to 4294967295, got 4294967296"),
        ({"stream": -1}, "stream must be from 0 to 2147483647, got -1"),
        ({"stream": 2**31}, "stream must be from 0 to 2147483647, got 2147483648"),
        ({"start": -1}, "start and count must be >= 0"),
        ({"count": -1}, "start and count must be >= 0"),
        ({"start": MAX_INDEX, "count": 1}, "end by 281474976710656"),
    ],
)
def test_values_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(**arguments)


def test_short_key_is_refused():
    with pytest.raises(ValueError, match="key must be 32 bytes, got 16"):
        NoiseSource(bytes(16))


def test_noise_of_a_small_shard_starts_no_thread(monkeypatch):
    """A shard's many small draws would each pay for a new thread's first operation of torch."""
    monkeypatch.setattr(noise, "ThreadPoolExecutor", lambda *_: pytest.fail("a thread was started"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    source = NoiseSource(bytes(32))
    drawn = source.normal(step=0, start=5, count=2048, stddev=1.0)
    assert torch.equal(drawn[3:], source.normal(step=0, start=8, count=2045, stddev=1.0))
