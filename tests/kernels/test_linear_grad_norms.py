"""``linear_grad_norms``: both backends against float64, and each line of its guarantees."""

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from securetune_kernels import Segments, linear_grad_norms
from securetune_kernels.linear_grad_norms import linear_grad_norms_reference
from tests.layer_factors import DTYPES, OFFSETS, SHAPES, factors, sparse_memory, with_strides

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
triton_kernels = importlib.import_module("securetune_kernels.linear_grad_norms.triton_kernels")

BACKENDS = ("triton", "torch")
# How much worse than the reference in the same dtype a squared norm may be, both against float64, relative to
# the square of the tokens' lengths: a few float32 roundings, since the order of additions differs.
EXTRA_ERROR = 5e-7
EPS = torch.finfo(torch.float32).eps

# the interpreter computes both sides of a choice in numpy, which warns
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def exact(a, g, segments=None):
    return linear_grad_norms_reference(a.double(), g.double(), segments=segments)


def error(norms, truth):
    return (
        ((norms.squared.double() - truth.squared).abs() / truth.lengths.square().clamp_min(1e-300))
        .max()
        .item()
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_no_worse_than_reference(backend, shape, dtype, kernel_device):
    tokens, d, p = shape
    a, g = factors(3, tokens, d=d, p=p, dtype=dtype, device=kernel_device)
    truth = exact(a, g)
    norms = linear_grad_norms(a, g, backend=backend)
    assert error(norms, truth) <= error(linear_grad_norms_reference(a, g), truth) + EXTRA_ERROR
    torch.testing.assert_close(norms.lengths.double(), truth.lengths, rtol=2e-6, atol=0.0)
    assert norms.squared.dtype == torch.float32


@pytest.mark.parametrize("is_packed", [False, True])
def test_reference_agrees_with_autograd_of_one_sample_at_a_time(is_packed):
    a, g = factors(3, 5, d=6, p=4, dtype=torch.float64)
    weight = torch.zeros(4, 6, dtype=torch.float64, requires_grad=True)
    grads = [torch.autograd.grad((x @ weight.t() * y).sum(), weight)[0] for x, y in zip(a, g, strict=True)]
    expected = torch.stack([grad.square().sum() for grad in grads])
    if is_packed:
        segments = Segments.of(torch.tensor([0, 5, 10, 15]), 15)
        actual = linear_grad_norms_reference(a.flatten(0, 1), g.flatten(0, 1), segments=segments)
    else:
        actual = linear_grad_norms_reference(a, g)
    torch.testing.assert_close(actual.squared, expected, rtol=1e-13, atol=0.0)


# few inputs: the gradient's tiles; many: those of the Gram matrices, three to the longest unit
@pytest.mark.parametrize(("d", "p"), [(9, 6), (130, 140)])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_units_are_as_if_alone(backend, dtype, index_dtype, d, p, kernel_device):
    a, g = factors(OFFSETS[-1], d=d, p=p, dtype=dtype, device=kernel_device)
    cu_seqlens = torch.tensor(OFFSETS, dtype=index_dtype, device=kernel_device)
    norms = linear_grad_norms(a, g, cu_seqlens=cu_seqlens, backend=backend)
    truth = exact(a, g, Segments.of(cu_seqlens, len(a)))
    assert error(norms, truth) <= EXTRA_ERROR
    assert norms.squared[1] == norms.lengths[1] == 0.0
    torch.testing.assert_close(norms.lengths.double(), truth.lengths, rtol=2e-6, atol=0.0)


@settings(max_examples=12)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5), d=st.integers(1, 40), p=st.integers(1, 40),
    seed=st.integers(0, 2**16),
)  # fmt: skip
def test_any_packing(lengths, d, p, seed, kernel_device):
    a, g = factors(sum(lengths), d=d, p=p, seed=seed, device=kernel_device)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device=kernel_device)
    segments = Segments.of(cu_seqlens, len(a))
    norms = linear_grad_norms(a, g, cu_seqlens=segments, backend="triton")
    assert error(norms, exact(a, g, segments)) <= EXTRA_ERROR


# the same tokens again with the opposite sign: what is left is far smaller than each product
@pytest.mark.parametrize(("d", "p"), [(40, 40), (5, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_cancelling_tokens_stay_within_the_stated_rounding(backend, dtype, d, p, kernel_device):
    a, g = factors(4, 6, d=d, p=p, dtype=dtype, device=kernel_device)
    rest = 1e-3 * torch.randn(g.shape, generator=torch.Generator().manual_seed(3)).to(g)
    a, g = torch.cat([a, a], dim=1), torch.cat([g, rest - g], dim=1)
    truth, norms = exact(a, g), linear_grad_norms(a, g, backend=backend)
    allowed = truth.squared * norms.rounding + 2 * EPS * truth.lengths.square()
    assert ((norms.squared - truth.squared).abs() <= allowed).all()


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_are_followed(backend, dtype, order, kernel_device):
    a, g = factors(2, 11, d=19, p=17, dtype=dtype, device=kernel_device)
    expected = linear_grad_norms(a, g, backend=backend)
    strided = linear_grad_norms(
        with_strides(a, order, (1, 2, 3)), with_strides(g, order, (2, 1, 1)), backend=backend
    )
    torch.testing.assert_close(strided.squared, expected.squared, rtol=1e-6, atol=0.0)


# with 20 tokens the gradient itself is computed, with 2 the Gram matrices
@pytest.mark.parametrize(
    ("tokens", "strides"),
    [(2, (2**31 + 8, 2, 1)), (20, (2**31 + 8, 2, 1)), (2, (8, 2**31 + 8, 1)), (2, (8, 2, 2**31 + 8))],
)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.xdist_group("gigabytes")
def test_offsets_beyond_32_bits(backend, tokens, strides, kernel_device, tmp_path):
    shape = (2, tokens, 2)
    a = sparse_memory(shape, strides, kernel_device, tmp_path / "sparse")
    values = torch.arange(1.0, 1.0 + math.prod(shape), device=kernel_device).view(shape) / 64
    a.copy_(values)
    norms = linear_grad_norms(a, values.half(), backend=backend)
    truth = exact(values.half(), values.half())
    torch.testing.assert_close(norms.squared.double(), truth.squared, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("d", "p"), [(40, 50), (3, 5)])
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_non_finite_unit_touches_no_other(backend, is_packed, d, p, bad, kernel_device):
    a, g = factors(3, 20, d=d, p=p, device=kernel_device)
    before = linear_grad_norms(a, g, backend=backend).squared
    a[1, 19, d - 1] = bad
    if is_packed:
        offsets = torch.tensor([0, 20, 40, 60], device=kernel_device)
        after = linear_grad_norms(
            a.flatten(0, 1), g.flatten(0, 1), cu_seqlens=offsets, backend=backend
        ).squared
    else:
        after = linear_grad_norms(a, g, backend=backend).squared
    assert not after[1].isfinite()
    torch.testing.assert_close(after[[0, 2]], before[[0, 2]], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batches_have_norm_zero(backend, shape, kernel_device):
    units, tokens, d, p = shape
    a, g = factors(units, tokens, d=d, p=p, device=kernel_device)
    norms = linear_grad_norms(a, g, backend=backend)
    assert torch.equal(norms.squared, torch.zeros(units, device=kernel_device))
    assert torch.equal(norms.lengths, torch.zeros(units, device=kernel_device))


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_batch_without_tokens(backend, kernel_device):
    a, g = factors(0, d=4, p=5, device=kernel_device)
    offsets = torch.zeros(3, dtype=torch.int32, device=kernel_device)
    assert linear_grad_norms(a, g, cu_seqlens=offsets, backend=backend).squared.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("shape", [(130, 131, 140), (200, 17, 70)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_same_call_gives_the_same_bits_and_leaves_its_inputs(backend, shape, kernel_device):
    tokens, d, p = shape
    a, g = factors(2, tokens, d=d, p=p, dtype=torch.bfloat16, device=kernel_device)
    copies = a.clone(), g.clone()
    first, second = linear_grad_norms(a, g, backend=backend), linear_grad_norms(a, g, backend=backend)
    assert torch.equal(first.squared, second.squared)
    assert torch.equal(first.lengths, second.lengths)
    assert torch.equal(a, copies[0])
    assert torch.equal(g, copies[1])


def test_float64_is_computed_in_float64():
    a, g = factors(2, 9, d=7, p=8, dtype=torch.float64)
    norms = linear_grad_norms(a, g)
    assert norms.squared.dtype == torch.float64
    torch.testing.assert_close(norms.squared, exact(a, g).squared, rtol=1e-13, atol=0.0)


def test_lower_matmul_precision_does_not_reach_the_norms():
    a, g = factors(2, 40, d=300, p=300)
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        norms = linear_grad_norms(a, g, backend="torch")
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    torch.testing.assert_close(norms.squared.double(), exact(a, g).squared, rtol=1e-6, atol=0.0)


@triton.jit
def _numbered_tiles_kernel(first, out_ptr, count):
    row, col = triton_kernels._triangle_tile(first + tl.program_id(0).to(tl.int64))
    tl.store(out_ptr + tl.program_id(0), row)
    tl.store(out_ptr + count + tl.program_id(0), col)


# the kernel's root is a float32: up to 2^40 tiles of a triangle with 1.4 million rows
@pytest.mark.parametrize("first_row", [0, 1_447, 5_792, 1_400_000])
def test_every_tile_of_the_triangle_is_met_once(first_row, kernel_device):
    count = 64
    first = max(0, first_row * (first_row + 1) // 2 - 32)
    found = torch.full((2, count), -1, dtype=torch.int64, device=kernel_device)
    _numbered_tiles_kernel[(count,)](first, found, count)
    row = first_row if first_row == 0 else first_row - 1
    expected = []
    while len(expected) < count:
        expected += [(row, col) for col in range(row + 1) if row * (row + 1) // 2 + col >= first]
        row += 1
    assert found.t().tolist() == [list(pair) for pair in expected[:count]]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 512, 2048, 1024), (1, 4096, 512, 256)])
def test_sizes_of_real_layers_stay_within_the_stated_rounding(shape):
    units, tokens, d, p = shape
    a, g = factors(units, tokens, d=d, p=p, dtype=torch.bfloat16, device="cuda")
    truth, norms = exact(a, g), linear_grad_norms(a, g, backend="triton")
    allowed = truth.squared * norms.rounding + 2 * EPS * truth.lengths.square()
    assert ((norms.squared - truth.squared).abs() <= allowed).all()


A, G = torch.ones(2, 3, 4), torch.ones(2, 3, 5)
FOUR_TOKENS = Segments.of(torch.tensor([0, 4]), 4)


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "message"),
    [
        ((A[0], G[0]), {}, ValueError, r"\[U, T, d\].*without cu_seqlens, got \(3, 4\) and \(3, 5\)"),
        ((A, G), {"cu_seqlens": torch.tensor([0, 2])}, ValueError, r"\[N, d\].*with cu_seqlens, got \(2,"),
        ((A, G[:, :2]), {}, ValueError, r"same tokens.*got \(2, 3, 4\) and \(2, 2, 5\)"),
        ((A, G.half()), {}, TypeError, "got torch.float32 and torch.float16"),
        ((A.int(), G.int()), {}, TypeError, "got torch.int32"),
        ((A, G.to("meta")), {}, ValueError, "a is on cpu and g on meta"),
        ((A[0], G[0]), {"cu_seqlens": torch.tensor([0.0, 3.0])}, TypeError, "got torch.float32"),
        ((A[0], G[0]), {"cu_seqlens": torch.tensor([[0, 3]])}, ValueError, r"\[U \+ 1\], got \(1, 2\)"),
        ((A[0], G[0]), {"cu_seqlens": torch.tensor([0, 4])}, ValueError, "number of tokens, 3, got 0 to 4"),
        ((A[0], G[0]), {"cu_seqlens": torch.tensor([1, 3])}, ValueError, "number of tokens, 3, got 1 to 3"),
        ((A[0], G[0]), {"cu_seqlens": torch.tensor([0, 2, 1, 3])}, ValueError, "got 1 after 2 at unit 1"),
        ((A[0], G[0]), {"cu_seqlens": FOUR_TOKENS}, ValueError, "of 4 tokens, there are 3"),
    ],
)  # fmt: skip
def test_wrong_argument_is_named_with_its_value(arguments, options, kind, message):
    with pytest.raises(kind, match=message):
        linear_grad_norms(*arguments, **options)


def test_float64_on_triton_is_refused():
    with pytest.raises(RuntimeError, match="no float64 version"):
        linear_grad_norms(A.double(), G.double(), backend="triton")
