"""``embedding_grad_norms`` and ``tied_cross_products``: both backends against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from securetune_kernels import Segments, embedding_grad_norms, tied_cross_products
from securetune_kernels.embedding_grad_norms import (
    embedding_grad_norms_reference,
    tied_cross_products_reference,
)
from tests.layer_factors import DTYPES, OFFSETS, factors, sparse_memory, with_strides

BACKENDS = ("triton", "torch")
# tokens, features, table rows: one, a prime, a power of two, one past a block; all ids equal, and nearly none
SHAPES = ((1, 1, 1), (7, 13, 3), (64, 512, 20), (65, 513, 1), (20, 1030, 1000))
# positions, lookups, features, table rows
CROSS_SHAPES = ((1, 1, 1, 1), (7, 5, 13, 3), (64, 64, 64, 50), (65, 129, 65, 7))
# How much worse than the reference in the same dtype a result may be, both against float64, relative to what
# was added up: a few float32 roundings, since the order of additions differs.
EXTRA_ERROR = 5e-7

# the interpreter computes products of infinities in numpy, which warns
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def lookups(*lead, d, rows, dtype=torch.float32, device="cpu", seed=0):
    """Return ids ``[*lead]`` and gradients ``[*lead, d]``."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, rows, lead, generator=generator)
    return ids.to(device), torch.randn(*lead, d, generator=generator).to(device, dtype)


def tied(units, positions, tokens, d, rows, dtype=torch.float32, device="cpu"):
    """Return ``a``, ``g``, ``ids`` and ``lookup_g`` of a tied matrix."""
    ids, lookup_g = lookups(units, tokens, d=d, rows=rows, dtype=dtype, device=device, seed=1)
    a, g = factors(units, positions, d=d, p=rows, dtype=dtype, device=device)
    return a, g, ids, lookup_g


def cross_scale(a, g, ids, lookup_g):
    """What the errors of the cross products are relative to: the product of the two gradients' lengths."""
    head = torch.linalg.vecdot(a.double().norm(dim=2), g.double().norm(dim=2))
    return head * lookup_g.double().norm(dim=2).sum(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_no_worse_than_reference(backend, shape, dtype, kernel_device):
    tokens, d, rows = shape
    ids, g = lookups(3, tokens, d=d, rows=rows, dtype=dtype, device=kernel_device)
    truth = embedding_grad_norms_reference(ids, g.double())
    expected = embedding_grad_norms_reference(ids, g).double()
    actual = embedding_grad_norms(ids, g, backend=backend)
    allowed = (expected - truth).abs() + EXTRA_ERROR * truth
    assert ((actual - truth).abs() <= allowed).all()
    assert actual.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", CROSS_SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_cross_products_agree_with_the_two_gradients(backend, shape, dtype, kernel_device):
    arguments = tied(3, *shape, dtype=dtype, device=kernel_device)
    a, g, ids, lookup_g = arguments
    truth = tied_cross_products_reference(a.double(), g.double(), ids, lookup_g.double())
    actual = tied_cross_products(*arguments, backend=backend)
    assert ((actual - truth).abs() <= EXTRA_ERROR * cross_scale(*arguments)).all()
    assert actual.dtype == torch.float32


def test_references_agree_with_autograd_of_one_sample_at_a_time():
    a, g, ids, lookup_g = (
        part.double() if part.is_floating_point() else part for part in tied(2, 5, 6, 4, 7)
    )
    weight = torch.zeros(7, 4, dtype=torch.float64, requires_grad=True)
    for unit in range(2):
        looked_up = torch.nn.functional.embedding(ids[unit], weight)
        (as_table,) = torch.autograd.grad((looked_up * lookup_g[unit]).sum(), weight)
        (as_head,) = torch.autograd.grad(((a[unit] @ weight.t()) * g[unit]).sum(), weight)
        norms = embedding_grad_norms_reference(ids, lookup_g)
        products = tied_cross_products_reference(a, g, ids, lookup_g)
        torch.testing.assert_close(norms[unit], as_table.square().sum(), rtol=1e-13, atol=0.0)
        torch.testing.assert_close(products[unit], (as_table * as_head).sum(), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_units_are_as_if_alone(backend, dtype, index_dtype, kernel_device):
    # few rows: the same ids lie on both sides of the units' borders
    ids, g = lookups(OFFSETS[-1], d=9, rows=3, dtype=dtype, device=kernel_device)
    cu_seqlens = torch.tensor(OFFSETS, dtype=index_dtype, device=kernel_device)
    truth = embedding_grad_norms_reference(ids, g.double(), segments=Segments.of(cu_seqlens, len(ids)))
    actual = embedding_grad_norms(ids.to(index_dtype), g, cu_seqlens=cu_seqlens, backend=backend)
    torch.testing.assert_close(actual.double(), truth, rtol=2e-6, atol=0.0)
    assert actual[1] == 0.0  # a unit without tokens


@settings(max_examples=12)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=5), rows=st.integers(1, 30),
    seed=st.integers(0, 2**16),
)  # fmt: skip
def test_any_packing(lengths, rows, seed, kernel_device):
    ids, g = lookups(sum(lengths), d=5, rows=rows, seed=seed, device=kernel_device)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device=kernel_device)
    segments = Segments.of(cu_seqlens, len(ids))
    truth = embedding_grad_norms_reference(ids, g.double(), segments=segments)
    actual = embedding_grad_norms(ids, g, cu_seqlens=segments, backend="triton")
    torch.testing.assert_close(actual.double(), truth, rtol=2e-6, atol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_ids_that_cancel_have_norm_zero(backend, kernel_device):
    _, g = lookups(2, 1, d=600, rows=1, device=kernel_device)
    ids = torch.tensor([[5, 9, 5, 9]] * 2, device=kernel_device)
    assert embedding_grad_norms(ids, torch.cat([g, g, -g, -g], dim=1), backend=backend).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_are_followed(backend, dtype, order, kernel_device):
    a, g, ids, lookup_g = tied(2, 7, 11, 19, 17, dtype=dtype, device=kernel_device)
    strided_ids = with_strides(ids.double(), (1, 0), (2, 3)).long()
    strided = [with_strides(part, order, (1, 2, 3)) for part in (a, g, lookup_g)]
    norms = embedding_grad_norms(strided_ids, strided[2], backend=backend)
    torch.testing.assert_close(
        norms, embedding_grad_norms(ids, lookup_g, backend=backend), rtol=1e-6, atol=0.0
    )
    products = tied_cross_products(strided[0], strided[1], strided_ids, strided[2], backend=backend)
    expected = tied_cross_products(a, g, ids, lookup_g, backend=backend)
    torch.testing.assert_close(products, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("strides", [(2**31 + 8, 2, 1), (8, 2**31 + 8, 1), (8, 2, 2**31 + 8)])
@pytest.mark.parametrize("which", ["a", "g", "lookup_g"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.xdist_group("gigabytes")
def test_offsets_beyond_32_bits(backend, which, strides, kernel_device, tmp_path):
    parts = dict(
        zip(("a", "g", "ids", "lookup_g"), tied(2, 2, 2, 2, 2, torch.float16, kernel_device), strict=True)
    )
    truth = tied_cross_products_reference(*parts.values())
    norms = embedding_grad_norms_reference(parts["ids"], parts["lookup_g"])
    far = sparse_memory((2, 2, 2), strides, kernel_device, tmp_path / "sparse")
    parts[which] = far.copy_(parts[which])
    torch.testing.assert_close(
        tied_cross_products(*parts.values(), backend=backend), truth, rtol=1e-4, atol=1e-4
    )
    actual = embedding_grad_norms(parts["ids"], parts["lookup_g"], backend=backend)
    torch.testing.assert_close(actual, norms, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_non_finite_unit_touches_no_other(backend, bad, kernel_device):
    a, g, ids, lookup_g = tied(3, 6, 20, 17, 9, device=kernel_device)
    norms = embedding_grad_norms(ids, lookup_g, backend=backend)
    products = tied_cross_products(a, g, ids, lookup_g, backend=backend)
    lookup_g[1, 19, 16] = bad
    after = embedding_grad_norms(ids, lookup_g, backend=backend)
    after_products = tied_cross_products(a, g, ids, lookup_g, backend=backend)
    for before, now in ((norms, after), (products, after_products)):
        assert not now[1].isfinite()
        torch.testing.assert_close(now[[0, 2]], before[[0, 2]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batches_have_norm_zero(backend, shape, kernel_device):
    units, tokens, d = shape
    a, g, ids, lookup_g = tied(units, 3, tokens, d, 5, device=kernel_device)
    zeros = torch.zeros(units, device=kernel_device)
    assert torch.equal(embedding_grad_norms(ids, lookup_g, backend=backend), zeros)
    assert torch.equal(tied_cross_products(a, g, ids, lookup_g, backend=backend), zeros)


def test_same_call_gives_the_same_bits_and_leaves_its_inputs(kernel_device):
    arguments = tied(2, 66, 70, 130, 9, dtype=torch.bfloat16, device=kernel_device)
    copies = [part.clone() for part in arguments]
    first = tied_cross_products(*arguments, backend="triton")
    norms = embedding_grad_norms(*arguments[2:], backend="triton")
    assert torch.equal(first, tied_cross_products(*arguments, backend="triton"))
    assert torch.equal(norms, embedding_grad_norms(*arguments[2:], backend="triton"))
    assert all(torch.equal(*pair) for pair in zip(arguments, copies, strict=True))


def test_id_outside_of_the_table_reads_nothing(kernel_device):
    a, g, ids, lookup_g = tied(1, 4, 3, 5, 6, device=kernel_device)
    ids[0, 1] = 2**40
    expected = tied_cross_products(a, g, ids[:, ::2], lookup_g[:, ::2], backend="triton")
    actual = tied_cross_products(a, g, ids, lookup_g, backend="triton")
    torch.testing.assert_close(actual, expected)


def test_float64_is_computed_in_float64():
    a, g, ids, lookup_g = (
        part.double() if part.is_floating_point() else part for part in tied(2, 5, 6, 4, 7)
    )
    norms, products = embedding_grad_norms(ids, lookup_g), tied_cross_products(a, g, ids, lookup_g)
    torch.testing.assert_close(norms, embedding_grad_norms_reference(ids, lookup_g), rtol=1e-13, atol=0.0)
    expected = tied_cross_products_reference(a, g, ids, lookup_g)
    torch.testing.assert_close(products, expected, rtol=1e-12, atol=0.0)


@pytest.mark.gpu
def test_sizes_of_a_real_table():
    arguments = tied(2, 256, 256, 576, 49_152, dtype=torch.bfloat16, device="cuda")
    a, g, ids, lookup_g = arguments
    truth = tied_cross_products_reference(a.double(), g.double(), ids, lookup_g.double())
    actual = tied_cross_products(*arguments, backend="triton")
    assert ((actual - truth).abs() <= 1e-6 * cross_scale(*arguments)).all()


IDS, G = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, 4)
HEAD_A, HEAD_G = torch.ones(2, 5, 4), torch.ones(2, 5, 6)


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "message"),
    [
        ((IDS.float(), G), {}, TypeError, "ids must be int32 or int64, got torch.float32"),
        ((IDS, G.int()), {}, TypeError, "got torch.int32"),
        ((IDS[:, :2], G), {}, ValueError, r"ids must have shape \(2, 3\).*\(2, 3, 4\), got \(2, 2\)"),
        ((IDS, G.to("meta")), {}, ValueError, "ids is on cpu and gradients on meta"),
        ((IDS[0], G[0]), {}, ValueError, r"without cu_seqlens, got \(3, 4\)"),
        ((IDS[0], G[0]), {"cu_seqlens": torch.tensor([0, 2, 1, 3])}, ValueError, "got 1 after 2 at unit 1"),
    ],
)
def test_wrong_argument_is_named_with_its_value(arguments, options, kind, message):
    with pytest.raises(kind, match=message):
        embedding_grad_norms(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((HEAD_A[0], HEAD_G, IDS, G), ValueError, r"must have shapes .*got \(5, 4\), \(2, 5, 6\)"),
        ((HEAD_A, HEAD_G[:, :4], IDS, G), ValueError, r"do not match: \(2, 5, 4\), \(2, 4, 6\)"),
        ((HEAD_A[:1], HEAD_G[:1], IDS, G), ValueError, r"do not match: \(1, 5, 4\)"),
        ((HEAD_A[..., :3], HEAD_G, IDS, G), ValueError, r"do not match: \(2, 5, 3\)"),
        ((HEAD_A.half(), HEAD_G, IDS, G), TypeError, "one dtype, got torch.float16, torch.float32"),
        ((HEAD_A.to("meta"), HEAD_G, IDS, G), ValueError, "a is on meta, g on cpu"),
    ],
)
def test_wrong_tied_argument_is_named_with_its_value(arguments, kind, message):
    with pytest.raises(kind, match=message):
        tied_cross_products(*arguments)


def test_float64_on_triton_is_refused():
    with pytest.raises(RuntimeError, match="no float64 version"):
        embedding_grad_norms(IDS, G.double(), backend="triton")
