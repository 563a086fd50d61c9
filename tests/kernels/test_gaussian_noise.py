"""``gaussian_noise``: published vectors, the reference, and each line of its guarantees."""

import importlib
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from securetune_kernels import gaussian_noise
from securetune_kernels.gaussian_noise import (
    chacha20_words_reference,
    gaussian_noise_reference,
    philox_words_reference,
)

triton = pytest.importorskip("triton")
tl = importlib.import_module("triton.language")
_rng = importlib.import_module("securetune_kernels._rng")

ROOT = Path(__file__).resolve().parents[2]
KEY_BYTES = bytes(range(32))
KEY = torch.tensor([int.from_bytes(KEY_BYTES[i : i + 4], "little") for i in range(0, 32, 4)]).int()
BACKENDS = ("triton", "torch")
# of a unit normal: float32 Box-Muller against float64
TOLERANCE = 2e-6


@triton.jit
def _words_kernel(key_ptr, chacha_ptr, philox_ptr, step, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    low = lane.to(tl.uint32) * 0x9E3779B9
    high = low ^ 0x5A5A5A5A
    steps = (low ^ low) + tl.cast(step, tl.uint32)
    words = _rng.chacha20(key_ptr, low, high, steps, high)
    for index in tl.static_range(16):
        tl.store(chacha_ptr + lane * 16 + index, words[index].to(tl.int32, bitcast=True))
    words = _rng.philox(key_ptr, low, high, steps, high)
    for index in tl.static_range(4):
        tl.store(philox_ptr + lane * 4 + index, words[index].to(tl.int32, bitcast=True))


@triton.jit
def _pair_kernel(words_ptr, out_ptr, BLOCK: tl.constexpr):
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(words_ptr + lane * 4).to(tl.uint32, bitcast=True)
    b = tl.load(words_ptr + lane * 4 + 1).to(tl.uint32, bitcast=True)
    c = tl.load(words_ptr + lane * 4 + 2).to(tl.uint32, bitcast=True)
    d = tl.load(words_ptr + lane * 4 + 3).to(tl.uint32, bitcast=True)
    first, second = _rng.normal_pair(a, b, c, d)
    tl.store(out_ptr + lane * 2, first)
    tl.store(out_ptr + lane * 2 + 1, second)


def draw(count, device, *, step=0, key=KEY, backend="triton", stddev=1.0, **options):
    out = torch.zeros(count, device=device)
    now = torch.tensor([step], device=device)
    return gaussian_noise(out, key=key.to(device), step=now, stddev=stddev, backend=backend, **options)


def exact(count, *, step=0, key=KEY, stddev=1.0, **options):
    out = torch.zeros(count, dtype=torch.float64)
    return gaussian_noise_reference(out, key=key, step=torch.tensor(step), stddev=stddev, **options)


def test_chacha20_block_of_rfc_8439_section_2_3_2():
    words = chacha20_words_reference(KEY, torch.tensor([1]), torch.tensor([0x09000000]), 0x4A000000, 0)
    expected = (
        "e4e7f110 15593bd1 1fdd0f50 c47120a3 c7f4d1c7 0368c033 9aaa2204 4e6cd4c3 "
        "466482d2 09aa9f07 05d7c214 a2028bd9 d19c12b5 b94e16de e883d0cb 4e3c50a2"
    )
    assert [f"{word:08x}" for word in words[0].tolist()] == expected.split()


@pytest.mark.parametrize(
    ("block", "nonce", "key", "expected"),
    [  # RFC 8439, appendix A.1, vectors 1, 2 and 4: the first words of the keystream
        (0, (0, 0, 0), bytes(32), "ade0b876 903df1a0 e56a5d40 28bd8653"),
        (1, (0, 0, 0), bytes(32), "bee7079f 7a385155 7c97ba98 0d082d73"),
        (2, (0, 0, 0), bytes([0, 0xFF, *[0] * 30]), "fb4dd572 4bc42ef1 df922636 327f1394"),
    ],
)
def test_chacha20_vectors_of_rfc_8439_appendix(block, nonce, key, expected):
    words = torch.tensor([int.from_bytes(key[i : i + 4], "little") for i in range(0, 32, 4)]).int()
    found = chacha20_words_reference(words, torch.tensor([block]), torch.tensor([nonce[0]]), *nonce[1:])
    assert [f"{word:08x}" for word in found[0, :4].tolist()] == expected.split()


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers that the authors publish with Random123
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    words = torch.tensor([*key, *[0] * 6]).to(torch.int32)
    found = philox_words_reference(
        words, torch.tensor([counter[0]]), torch.tensor([counter[1]]), counter[2], counter[3]
    )
    assert [f"{word:08x}" for word in found[0].tolist()] == expected.split()


@pytest.mark.parametrize("start", [0, 3, 8 * 2**32 - 5, 2**48 - 40])
def test_reference_is_the_noise_source_of_the_library(start):
    pytest.importorskip("cryptography")  # kernels are also tested where the library is not installed
    from securetune.privacy.noise import NoiseSource

    found = exact(40, step=7, stream=3, start=start, stddev=0.5)
    truth = NoiseSource(KEY_BYTES).normal(step=7, stream=3, start=start, count=40, stddev=0.5)
    assert torch.equal(found.float(), truth)


@pytest.mark.parametrize("generator", ["chacha20", "philox"])
@pytest.mark.parametrize(
    ("count", "start"),
    [(1, 0), (1, 7), (8, 0), (13, 5), (1024, 0), (1025, 1023), (2100, 3), (9, 8 * 2**32 - 4), (5, 2**48 - 5)],
)
def test_kernel_agrees_with_the_reference(count, start, generator, kernel_device):
    options = {"step": 2**32 - 1, "stream": 2**32 - 2, "start": start, "generator": generator}
    found = draw(count, kernel_device, **options)
    truth = exact(count, **options)
    assert (found.double().cpu() - truth).abs().max() < TOLERANCE


def test_kernels_words_are_those_of_the_reference(kernel_device):
    """A wrong bit in any of a pair's words moves its two normals visibly, whatever the bit."""
    lanes, step = 64, 0xDEADBEEF
    chacha = torch.zeros(lanes, 16, dtype=torch.int32, device=kernel_device)
    philox = torch.zeros(lanes, 4, dtype=torch.int32, device=kernel_device)
    _words_kernel[(1,)](KEY.to(kernel_device), chacha, philox, step, BLOCK=lanes)
    low = torch.arange(lanes) * 0x9E3779B9 & 0xFFFFFFFF
    high = low ^ 0x5A5A5A5A
    for index in range(lanes):
        one = slice(index, index + 1)
        stream = int(high[index])
        expected = chacha20_words_reference(KEY, low[one], high[one], step, stream)
        assert torch.equal(chacha[one].cpu().long() & 0xFFFFFFFF, expected)
        expected = philox_words_reference(KEY, low[one], high[one], step, stream)
        assert torch.equal(philox[one].cpu().long() & 0xFFFFFFFF, expected)


def test_normals_are_accurate_over_the_whole_range_of_words(kernel_device):
    generator = torch.Generator().manual_seed(0)
    edge = [0, 1, 2, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1, 2**29, 2**29 - 1, 3 * 2**29, 7 * 2**29]
    edges = torch.cartesian_prod(*[torch.tensor(edge)] * 4)
    random = torch.randint(0, 2**32, (2**14 - len(edges) % 2**10, 4), generator=generator)
    words = torch.cat([edges, random])
    words = words[: len(words) // 512 * 512]
    out = torch.zeros(len(words), 2, device=kernel_device)
    device_words = words.to(torch.int32).to(kernel_device)  # wraps: the same bits
    _pair_kernel[(len(words) // 512,)](device_words, out, BLOCK=512)
    first = words[:, 1].double() * 2.0**32 + words[:, 0]
    # near 1 float64 loses the distance to 1: take it from the complement, exactly
    distance = ((2**32 - 1 - words[:, 1]).double() * 2.0**32 + (2**32 - 1 - words[:, 0])) * 2.0**-64
    log = torch.where(first < 2.0**63, torch.log((first + 1) * 2.0**-64), torch.log1p(-distance))
    radius = torch.sqrt(-2 * log)
    angle = (words[:, 3].double() * 2.0**32 + words[:, 2]) * (2.0**-64 * 2 * math.pi)
    truth = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    error = (out.double().cpu() - truth).abs() / radius.clamp(min=1e-30)[:, None]
    assert error.max() < 4e-7
    assert out.abs().max() > 9.4


@settings(max_examples=10)
@given(start=st.integers(0, 2000), cut=st.integers(0, 60), step=st.integers(0, 2**32 - 1))
def test_shards_get_the_noise_of_the_whole(start, cut, step, kernel_device):
    whole = draw(60, kernel_device, step=step, start=start)
    first = draw(cut, kernel_device, step=step, start=start)
    second = draw(60 - cut, kernel_device, step=step, start=start + cut)
    assert torch.equal(torch.cat([first, second]), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_is_added_and_scaled(backend, kernel_device):
    before = torch.linspace(-3, 3, 100, device=kernel_device)
    out = before.clone()
    now = torch.zeros((), dtype=torch.int64, device=kernel_device)
    result = gaussian_noise(out, key=KEY.to(kernel_device), step=now, stddev=0.25, backend=backend)
    assert result is out
    unit = draw(100, kernel_device, backend=backend)
    torch.testing.assert_close(out, before + 0.25 * unit, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_deviation_and_empty_output_change_nothing(backend, kernel_device):
    assert draw(0, kernel_device, backend=backend).numel() == 0
    assert draw(5, kernel_device, backend=backend, stddev=0.0).equal(torch.zeros(5, device=kernel_device))


@pytest.mark.parametrize("generator", ["chacha20", "philox"])
def test_no_value_comes_twice(generator, kernel_device):
    other_key = KEY.clone()
    other_key[1] += 1
    parts = [
        draw(1000, kernel_device, generator=generator, step=step, stream=stream, key=key, start=start)
        for step, stream, key, start in [
            (0, 0, KEY, 0), (1, 0, KEY, 0), (0, 1, KEY, 0), (0, 0, other_key, 0), (0, 0, KEY, 1000),
            (0, 0, KEY, 8 * 2**32),
        ]
    ]  # fmt: skip
    bits = torch.cat(parts).view(torch.int32)
    repeats = len(bits) - len(bits.unique())
    # two of 6,000 float32 normals are equal by chance with probability near 1, twenty almost never
    assert repeats < 20
    for i in range(len(parts)):
        for j in range(i):
            assert abs(torch.corrcoef(torch.stack([parts[i], parts[j]]))[0, 1]) < 5 / math.sqrt(1000)


def anderson_darling(z):
    """Anderson and Darling's statistic against the standard normal, which weighs the tails most."""
    z = np.sort(z)
    odd = 2 * np.arange(1, len(z) + 1) - 1
    return -len(z) - (odd * (stats.norm.logcdf(z) + stats.norm.logsf(z[::-1]))).mean()


@pytest.mark.parametrize("summands", [1, 4])
@pytest.mark.parametrize("generator", ["chacha20", "philox"])
def test_values_are_standard_normal(generator, summands, kernel_device):
    z = draw(20_000 // summands, kernel_device, generator=generator, summands=summands).double().cpu().numpy()
    assert stats.kstest(z, "norm").pvalue > 1e-4
    assert anderson_darling(z) < 3.857  # 1 % of normal samples are above (Stephens 1974, all known)
    assert abs((z**2).mean() - 1) < 5 * math.sqrt(2 / len(z))
    neighbours = (z[:-1] * z[1:]).mean()
    assert abs(neighbours) < 5 / math.sqrt(len(z))


@pytest.mark.parametrize("backend", BACKENDS)
def test_four_summands_are_four_independent_draws_over_two(backend, kernel_device):
    found = draw(50, kernel_device, summands=4, backend=backend)
    truth = exact(50, summands=4)
    assert (found.double().cpu() - truth).abs().max() < 2 * TOLERANCE
    assert not torch.allclose(truth, exact(50), atol=0.1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("step", [0, 1, 2, 9])
def test_coefficients_mix_the_noise_of_past_steps(step, backend, kernel_device):
    coefficients = torch.tensor([1.0, -0.5, 0.25])
    found = draw(30, kernel_device, step=step, coefficients=coefficients.to(kernel_device), backend=backend)
    truth = sum(c * exact(30, step=step - k) for k, c in enumerate(coefficients.tolist()) if step - k >= 0)
    assert (found.double().cpu() - truth).abs().max() < 3 * TOLERANCE


def test_the_same_call_gives_the_same_bits(kernel_device):
    assert torch.equal(draw(3000, kernel_device, step=5), draw(3000, kernel_device, step=5))


@pytest.mark.gpu
def test_a_replayed_graph_draws_fresh_noise():
    device = torch.device("cuda")
    out, key = torch.zeros(5000, device=device), KEY.to(device)
    step = torch.zeros(1, dtype=torch.int64, device=device)
    gaussian_noise(out, key=key, step=step, stddev=1.0)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out.zero_()
        gaussian_noise(out, key=key, step=step, stddev=1.0)
        step += 1
    seen = []
    for _ in range(3):
        graph.replay()
        seen.append(out.clone())
    first = int(step) - 3
    for index, values in enumerate(seen):
        assert torch.equal(values, draw(5000, device, step=first + index))


def test_no_key_reaches_the_compile_cache(tmp_path):
    """Compiled for a chip that is not here, with a key in reach: no file of the cache holds its bytes."""
    script = (
        "import sys; sys.path.insert(0, 'tests/kernels'); sys.path.insert(0, 'kernels')\n"
        "import resources\n"
        "found = [v for v in resources.variants('sm_90') if v.kernel == '_gaussian_noise_kernel']\n"
        "assert found\n"
        "for variant in found:\n"
        "    assert variant.tensors['key_ptr'] == '*i32' and variant.tensors['step_ptr'] == '*i64'\n"
        "    resources.compile_variant(variant, 'sm_90')\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, cwd=ROOT)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert KEY_BYTES[:8] not in path.read_bytes()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"out": torch.zeros(3, dtype=torch.bfloat16)}, TypeError, r"out must be float32.*bfloat16"),
        ({"out": torch.zeros(3, 2)}, ValueError, r"out must be 1-D \[N\].*\(3, 2\)"),
        ({"out": torch.zeros(6)[::2]}, ValueError, "contiguous"),
        ({"start": -1}, ValueError, "start must be >= 0.*got start -1"),
        ({"start": 2**48 - 2}, ValueError, "at most 281474976710656, got start 281474976710654 and N 3"),
        ({"key": KEY.long()}, TypeError, "key must be int32.*int64"),
        ({"key": KEY[:7]}, ValueError, r"key must be \[8\].*\(7,\)"),
        ({"step": torch.tensor([0], dtype=torch.int32)}, TypeError, "step must be one int64.*int32"),
        ({"step": torch.tensor([0, 1])}, TypeError, r"step must be one int64.*\(2,\)"),
        ({"step": torch.tensor([-1])}, ValueError, r"step must be from 0 to 2\^32 - 1, got -1"),
        ({"step": torch.tensor([2**32])}, ValueError, "got 4294967296"),
        ({"stddev": -0.5}, ValueError, "stddev must be from 0 to 1e.37, got -0.5"),
        ({"stddev": math.nan}, ValueError, "got nan"),
        ({"stddev": math.inf}, ValueError, "got inf"),
        ({"stream": -1}, ValueError, "stream must be from 0 to 2.32 - 1, got -1"),
        ({"stream": 2**32}, ValueError, "got 4294967296"),
        ({"generator": "mt19937"}, ValueError, "generator must be 'chacha20' or 'philox', got 'mt19937'"),
        ({"summands": 2}, ValueError, "summands must be 1 or 4, got 2"),
        ({"coefficients": torch.ones(2).double()}, TypeError, "coefficients must be float32.*float64"),
        ({"coefficients": torch.ones(0)}, ValueError, r"coefficients must be \[K\] with K >= 1.*\(0,\)"),
        ({"key": KEY.to("meta")}, ValueError, "key is on meta and the values on cpu"),
        ({"backend": "cuda"}, ValueError, "backend must be"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_drawn(change, error, message):
    options = {"out": torch.zeros(3), "key": KEY, "step": torch.tensor([0]), "stddev": 1.0, **change}
    out = options.pop("out")
    before = out.clone()
    with pytest.raises(error, match=message):
        gaussian_noise(out, **options)
    assert torch.equal(out, before)
