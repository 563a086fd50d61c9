"""``clipped_linear_grad``: both backends against float64, and each line of its guarantees."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from securetune_kernels import Segments, clipped_linear_grad
from securetune_kernels.clipped_linear_grad import clipped_linear_grad_reference
from tests.layer_factors import DTYPES, OFFSETS, SHAPES, factors, sparse_memory, with_strides

BACKENDS = ("triton", "torch")
# How much worse than the reference in the same dtype the sum may be, both against float64, relative to the
# truth: a few float32 roundings, since the order of additions differs.
EXTRA_ERROR = 5e-7


def weights(units, device="cpu", seed=0):
    """Factors of which every third is zero and some are negative."""
    values = torch.randn(units, generator=torch.Generator().manual_seed(seed))
    values[2::3] = 0.0
    return values.to(device)


def added(a, g, factors, *, backend, cu_seqlens=None, start=0.0):
    out = torch.full((g.shape[-1], a.shape[-1]), start, device=a.device)
    clipped_linear_grad(a, g, factors, out, cu_seqlens=cu_seqlens, backend=backend)
    return out


def exact(a, g, factors, segments=None, start=0.0):
    out = torch.full((g.shape[-1], a.shape[-1]), start, device=a.device, dtype=torch.float64)
    clipped_linear_grad_reference(a.double(), g.double(), factors.double(), out, segments=segments)
    return out


def error(actual, truth):
    return ((actual.double() - truth).norm() / truth.norm().clamp_min(1e-300)).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_no_worse_than_reference(backend, shape, dtype, kernel_device):
    tokens, d, p = shape
    a, g = factors(4, tokens, d=d, p=p, dtype=dtype, device=kernel_device)
    scale = weights(4, kernel_device)
    truth = exact(a, g, scale, start=0.5)
    expected = torch.full((p, d), 0.5, device=kernel_device)
    clipped_linear_grad_reference(a, g, scale, expected)
    actual = added(a, g, scale, backend=backend, start=0.5)
    assert error(actual, truth) <= error(expected, truth) + EXTRA_ERROR


def test_reference_agrees_with_autograd_of_one_sample_at_a_time():
    a, g = factors(3, 5, d=6, p=4, dtype=torch.float64)
    scale = weights(3, seed=1).double()
    weight = torch.zeros(4, 6, dtype=torch.float64, requires_grad=True)
    expected = torch.zeros(4, 6, dtype=torch.float64)
    for x, y, factor in zip(a, g, scale, strict=True):
        expected += factor * torch.autograd.grad((x @ weight.t() * y).sum(), weight)[0]
    torch.testing.assert_close(exact(a, g, scale), expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_units_are_as_if_alone(backend, dtype, index_dtype, kernel_device):
    a, g = factors(OFFSETS[-1], d=40, p=70, dtype=dtype, device=kernel_device)
    cu_seqlens = torch.tensor(OFFSETS, dtype=index_dtype, device=kernel_device)
    scale = weights(len(OFFSETS) - 1, kernel_device)
    actual = added(a, g, scale, backend=backend, cu_seqlens=cu_seqlens)
    assert error(actual, exact(a, g, scale, Segments.of(cu_seqlens, len(a)))) <= EXTRA_ERROR


@settings(max_examples=12)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5), d=st.integers(1, 40), p=st.integers(1, 40),
    seed=st.integers(0, 2**16),
)  # fmt: skip
def test_any_packing(lengths, d, p, seed, kernel_device):
    a, g = factors(sum(lengths), d=d, p=p, seed=seed, device=kernel_device)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device=kernel_device)
    segments, scale = Segments.of(cu_seqlens, len(a)), weights(len(lengths), kernel_device, seed)
    actual = added(a, g, scale, backend="triton", cu_seqlens=segments)
    size = exact(a.abs(), g.abs(), scale.abs(), segments).norm()  # few numbers may cancel in the sum itself
    assert (actual.double() - exact(a, g, scale, segments)).norm() <= EXTRA_ERROR * size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_factors_are_not_rounded_to_the_inputs_dtype(backend, dtype, kernel_device):
    ones = torch.ones(1, 20, 3, dtype=dtype, device=kernel_device)
    factor = torch.tensor([1 / 3], device=kernel_device)
    torch.testing.assert_close(
        added(ones, ones, factor, backend=backend), torch.full((3, 3), 20 / 3, device=kernel_device)
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_unit_with_factor_zero_adds_zero_whatever_it_holds(backend, is_packed, tokens, bad, kernel_device):
    a, g = factors(3, tokens, d=17, p=9, device=kernel_device)
    scale = torch.tensor([0.5, 0.0, 2.0], device=kernel_device)
    expected = exact(a, g, scale)
    a[1], g[1] = bad, bad
    if is_packed:
        offsets = torch.tensor([0, tokens, 2 * tokens, 3 * tokens], device=kernel_device)
        actual = added(a.flatten(0, 1), g.flatten(0, 1), scale, backend=backend, cu_seqlens=offsets)
    else:
        actual = added(a, g, scale, backend=backend)
    assert error(actual, expected) <= EXTRA_ERROR


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_factors_zero_leave_out_alone(backend, kernel_device):
    a, g = factors(3, 4, d=17, p=9, device=kernel_device)
    out = added(a * math.nan, g, torch.zeros(3, device=kernel_device), backend=backend, start=7.0)
    assert torch.equal(out, torch.full_like(out, 7.0))


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batches_add_nothing(backend, shape, kernel_device):
    units, tokens, d, p = shape
    a, g = factors(units, tokens, d=d, p=p, device=kernel_device)
    out = added(a, g, torch.ones(units, device=kernel_device), backend=backend, start=7.0)
    assert torch.equal(out, torch.full_like(out, 7.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_batch_without_tokens(backend, kernel_device):
    a, g = factors(0, d=4, p=5, device=kernel_device)
    offsets = torch.zeros(3, dtype=torch.int32, device=kernel_device)
    out = added(a, g, torch.ones(2, device=kernel_device), backend=backend, cu_seqlens=offsets)
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_are_followed(backend, dtype, order, kernel_device):
    a, g = factors(2, 11, d=19, p=17, dtype=dtype, device=kernel_device)
    scale = weights(4, kernel_device)[::2]
    expected = exact(a, g, scale)
    memory = torch.zeros(2 * 19, 3 * 17, device=kernel_device)
    out = memory.t()[::3, ::2]
    strided = with_strides(a, order, (1, 2, 3)), with_strides(g, order, (2, 1, 1))
    clipped_linear_grad(*strided, scale, out, backend=backend)
    assert error(out, expected) <= EXTRA_ERROR
    assert memory.count_nonzero() == out.count_nonzero()


@pytest.mark.parametrize("strides", [(2**31 + 8, 2, 1), (8, 2**31 + 8, 1), (8, 2, 2**31 + 8)])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.xdist_group("gigabytes")
def test_offsets_beyond_32_bits(backend, strides, kernel_device, tmp_path):
    a = sparse_memory((2, 2, 2), strides, kernel_device, tmp_path / "sparse")
    values = torch.arange(1.0, 9.0, device=kernel_device).view(2, 2, 2)
    a.copy_(values)
    ones = torch.ones(2, device=kernel_device)
    assert error(added(a, values.half(), ones, backend=backend), exact(values, values, ones)) <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_same_call_gives_the_same_bits_and_leaves_its_inputs(backend, dtype, kernel_device):
    a, g = factors(4, 70, d=131, p=66, dtype=dtype, device=kernel_device)
    scale = weights(4, kernel_device)
    copies = a.clone(), g.clone(), scale.clone()
    first, second = added(a, g, scale, backend=backend), added(a, g, scale, backend=backend)
    assert torch.equal(first, second)
    assert all(torch.equal(*pair) for pair in zip((a, g, scale), copies, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_micro_batches_add_up_to_the_whole_batch(backend, kernel_device):
    a, g = factors(5, 9, d=20, p=30, device=kernel_device)
    scale = weights(5, kernel_device)
    out = torch.zeros(30, 20, device=kernel_device)
    for part in (slice(0, 1), slice(1, 1), slice(1, 5)):
        clipped_linear_grad(a[part], g[part], scale[part], out, backend=backend)
    assert error(out, exact(a, g, scale)) <= EXTRA_ERROR


def test_float64_is_computed_in_float64():
    a, g = factors(2, 9, d=7, p=8, dtype=torch.float64)
    out, scale = torch.zeros(8, 7, dtype=torch.float64), weights(2).double()
    clipped_linear_grad(a, g, scale, out)
    torch.testing.assert_close(out, exact(a, g, scale), rtol=1e-13, atol=1e-14)


def test_lower_matmul_precision_does_not_reach_the_sum():
    a, g = factors(2, 40, d=300, p=300)
    scale = torch.ones(2)
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        out = added(a, g, scale, backend="torch")
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    assert error(out, exact(a, g, scale)) <= 1e-6


@pytest.mark.gpu
def test_sizes_of_real_layers():
    a, g = factors(4, 1024, d=2048, p=1024, dtype=torch.bfloat16, device="cuda")
    scale = weights(4, "cuda")
    # tensor cores may round each sum of 16 products toward zero
    assert error(added(a, g, scale, backend="triton"), exact(a, g, scale)) <= 1e-5


A, G, F, OUT = torch.ones(2, 3, 4), torch.ones(2, 3, 5), torch.ones(2), torch.zeros(5, 4)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((A, G[:, :2], F, OUT), ValueError, r"same tokens.*got \(2, 3, 4\) and \(2, 2, 5\)"),
        ((A, G.half(), F, OUT), TypeError, "got torch.float32 and torch.float16"),
        ((A, G, torch.ones(3), OUT), ValueError, r"factors must have shape \[U\] = \(2,\), got \(3,\)"),
        ((A, G, F.half(), OUT), TypeError, "factors must be float32 or float64, got torch.float16"),
        ((A, G, F.to("meta"), OUT), ValueError, "factors is on meta and a on cpu"),
        ((A, G, F, OUT.t()), ValueError, r"out must have shape \[p, d\] = \(5, 4\), got \(4, 5\)"),
        ((A, G, F, OUT.bfloat16()), TypeError, "out must be float32 or float64, got torch.bfloat16"),
        ((A, G, F, OUT.to("meta")), ValueError, "out is on meta and a on cpu"),
        ((A, G, F, torch.zeros(1, 4).expand(5, 4)), ValueError, r"out has strides \(0, 1\)"),
    ],
)  # fmt: skip
def test_wrong_argument_is_named_with_its_value(arguments, kind, message):
    with pytest.raises(kind, match=message):
        clipped_linear_grad(*arguments)


def test_decreasing_cu_seqlens_are_refused():
    with pytest.raises(ValueError, match="got 1 after 2 at unit 1"):
        clipped_linear_grad(A[0], G[0], torch.ones(3), OUT, cu_seqlens=torch.tensor([0, 2, 1, 3]))


def test_float64_on_triton_is_refused():
    with pytest.raises(RuntimeError, match="no float64 version"):
        clipped_linear_grad(A, G, F, OUT.double(), backend="triton")
