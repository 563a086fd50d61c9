"""``per_sample_sums``: both backends against float64, and each line of its guarantees."""

import pytest
import torch

from securetune_kernels import Normalized, Segments, per_sample_sums
from securetune_kernels.per_sample_sums import per_sample_sums_reference
from tests.layer_factors import DTYPES, OFFSETS, sparse_memory, with_strides

BACKENDS = ("triton", "torch")
KINDS = ("bias", "rms", "layer")
# tokens and features: one, a prime, a power of two, one past a block
SHAPES = ((1, 1), (7, 13), (32, 128), (33, 129), (100, 5))
# How much worse than the reference in the same dtype a sum may be, both against float64, relative to the sum
# of the magnitudes: a few float32 roundings, since the order of additions differs.
EXTRA_ERROR = 5e-7

# the interpreter computes products of infinities in numpy, which warns
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def inputs(*lead, d, kind, dtype=torch.float32, device="cpu", seed=0):
    """Return ``g [*lead, d]`` and what a norm layer of this kind normalised."""
    generator = torch.Generator().manual_seed(seed)
    g, x = (torch.randn(*lead, d, generator=generator).to(device, dtype) for _ in range(2))
    inverse, mean = (torch.rand(*lead, generator=generator).to(device) for _ in range(2))
    if kind == "bias":
        return g, None
    return g, Normalized(x, inverse, mean if kind == "layer" else None)


def in_float64(normalized):
    if normalized is None:
        return None
    return Normalized(*(None if part is None else part.double() for part in normalized))


def exact(g, normalized, units, segments=None, magnitudes=False):
    out = torch.zeros(units, g.shape[-1], dtype=torch.float64, device=g.device)
    g, normalized = g.double(), in_float64(normalized)
    if magnitudes:
        g = g.abs()
        if normalized is not None:
            x = normalized.x if normalized.mean is None else normalized.x - normalized.mean.unsqueeze(-1)
            normalized = Normalized(x.abs(), normalized.inverse)
    per_sample_sums_reference(g, out, normalized=normalized, segments=segments)
    return out


def summed(g, normalized, units, **options):
    out = torch.full((units, g.shape[-1]), float("nan"), device=g.device)
    per_sample_sums(g, out, normalized=normalized, **options)
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_no_worse_than_reference(backend, shape, dtype, kind, kernel_device):
    tokens, d = shape
    g, normalized = inputs(3, tokens, d=d, kind=kind, dtype=dtype, device=kernel_device)
    truth, magnitudes = exact(g, normalized, 3), exact(g, normalized, 3, magnitudes=True)
    expected = torch.zeros(3, d, device=kernel_device)
    per_sample_sums_reference(g, expected, normalized=normalized)
    actual = summed(g, normalized, 3, backend=backend)
    allowed = (expected - truth).abs() + EXTRA_ERROR * magnitudes
    assert ((actual - truth).abs() <= allowed).all()


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_reference_agrees_with_autograd_of_one_sample_at_a_time(kind):
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(3, 5, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    weight, bias = (torch.ones(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mean = x.mean(-1) if kind == "layer" else None
    moved = x if mean is None else x - mean.unsqueeze(-1)
    normalized = Normalized(x, (moved.square().mean(-1) + 1e-5).rsqrt(), mean)
    scales, biases = torch.zeros(2, 3, 6, dtype=torch.float64)
    per_sample_sums_reference(g, scales, normalized=normalized)
    per_sample_sums_reference(g, biases)
    for i in range(3):
        if kind == "layer":
            y = torch.nn.functional.layer_norm(x[i], (6,), weight, bias, 1e-5)
        else:
            y = torch.nn.functional.rms_norm(x[i], (6,), weight, 1e-5) + bias
        expected = torch.autograd.grad((y * g[i]).sum(), (weight, bias))
        torch.testing.assert_close((scales[i], biases[i]), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_units_are_as_if_alone(backend, dtype, index_dtype, kind, kernel_device):
    units = len(OFFSETS) - 1
    g, normalized = inputs(OFFSETS[-1], d=9, kind=kind, dtype=dtype, device=kernel_device)
    cu_seqlens = torch.tensor(OFFSETS, dtype=index_dtype, device=kernel_device)
    truth = exact(g, normalized, units, Segments.of(cu_seqlens, len(g)))
    actual = summed(g, normalized, units, cu_seqlens=cu_seqlens, backend=backend)
    torch.testing.assert_close(actual.double(), truth, rtol=1e-5, atol=1e-5)
    assert torch.equal(actual[1], torch.zeros_like(actual[1]))  # a unit without tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_are_followed(backend, order, kind, kernel_device):
    g, normalized = inputs(2, 11, d=19, kind=kind, dtype=torch.bfloat16, device=kernel_device)
    expected = summed(g, normalized, 2, backend=backend)
    strided = normalized
    if normalized is not None:
        strided = Normalized(
            with_strides(normalized.x, order, (2, 1, 3)),
            *(None if part is None else with_strides(part, (1, 0), (2, 3)) for part in normalized[1:]),
        )
    memory = torch.full((2 * 19, 3 * 2), 7.0, device=kernel_device)
    out = memory.t()[::3, ::2]
    per_sample_sums(with_strides(g, order, (1, 2, 3)), out, normalized=strided, backend=backend)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    assert (memory == 7.0).sum() == memory.numel() - out.numel()


@pytest.mark.parametrize("strides", [(2**31 + 8, 2, 1), (8, 2**31 + 8, 1), (8, 2, 2**31 + 8)])
@pytest.mark.parametrize("which", ["g", "x"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.xdist_group("gigabytes")
def test_offsets_beyond_32_bits(backend, which, strides, kernel_device, tmp_path):
    g, normalized = inputs(2, 2, d=2, kind="layer", dtype=torch.float16, device=kernel_device)
    truth = exact(g, normalized, 2)
    far = sparse_memory((2, 2, 2), strides, kernel_device, tmp_path / "sparse")
    if which == "g":
        g = far.copy_(g)
    else:
        normalized = normalized._replace(x=far.copy_(normalized.x))
    actual = summed(g, normalized, 2, backend=backend)
    torch.testing.assert_close(actual.double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_non_finite_unit_touches_no_other(backend, kind, bad, kernel_device):
    g, normalized = inputs(3, 40, d=17, kind=kind, device=kernel_device)
    before = summed(g, normalized, 3, backend=backend)
    g[1, 39, 16] = bad
    after = summed(g, normalized, 3, backend=backend)
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert not after[1, 16].isfinite()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_second_run_of_a_layer_is_added(backend, kind, kernel_device):
    g, normalized = inputs(2, 9, d=19, kind=kind, device=kernel_device)
    out = summed(g, normalized, 2, backend=backend)
    once = out.clone()
    per_sample_sums(g, out, normalized=normalized, accumulate=True, backend=backend)
    torch.testing.assert_close(out, 2 * once)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batches_have_sum_zero(backend, kind, shape, kernel_device):
    units, tokens, d = shape
    g, normalized = inputs(units, tokens, d=d, kind=kind, device=kernel_device)
    assert torch.equal(
        summed(g, normalized, units, backend=backend), torch.zeros(units, d, device=kernel_device)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_same_call_gives_the_same_bits_and_leaves_its_inputs(backend, kind, kernel_device):
    g, normalized = inputs(2, 70, d=131, kind=kind, dtype=torch.bfloat16, device=kernel_device)
    parts = [g, *(part for part in normalized or () if part is not None)]
    copies = [part.clone() for part in parts]
    first = summed(g, normalized, 2, backend=backend)
    assert torch.equal(first, summed(g, normalized, 2, backend=backend))
    assert all(torch.equal(*pair) for pair in zip(parts, copies, strict=True))


def test_float64_is_computed_in_float64():
    g, normalized = inputs(2, 9, d=7, kind="layer")
    out = torch.zeros(2, 7, dtype=torch.float64)
    per_sample_sums(g.double(), out, normalized=in_float64(normalized))
    torch.testing.assert_close(out, exact(g, normalized, 2), rtol=1e-12, atol=1e-13)


G, OUT = torch.ones(2, 3, 4), torch.zeros(2, 4)
NORMALIZED = Normalized(G, torch.ones(2, 3))


@pytest.mark.parametrize(
    ("arguments", "normalized", "kind", "message"),
    [
        ((G[0], OUT), None, ValueError, r"without cu_seqlens, got \(3, 4\)"),
        ((G.int(), OUT), None, TypeError, "g must be .*got torch.int32"),
        ((G, OUT.half()), None, TypeError, "out must be .*got torch.float16"),
        ((G, OUT[:1]), None, ValueError, r"out must have shape \(2, 4\).*got \(1, 4\)"),
        ((G, OUT.to("meta")), None, ValueError, "out is on meta and g on cpu"),
        ((G, torch.zeros(2, 1).expand(2, 4)), None, ValueError, r"out has strides \(1, 0\)"),
        ((G, OUT), NORMALIZED._replace(x=G[:, :2]), ValueError, r"x must have shape .*got \(2, 2, 4\)"),
        ((G, OUT), NORMALIZED._replace(inverse=torch.ones(2, 4)), ValueError, r"inverse .*got \(2, 4\)"),
        ((G, OUT), NORMALIZED._replace(mean=torch.ones(2, 3).half()), TypeError, "mean .*torch.float16"),
    ],
)
def test_wrong_argument_is_named_with_its_value(arguments, normalized, kind, message):
    with pytest.raises(kind, match=message):
        per_sample_sums(*arguments, normalized=normalized)


def test_float64_on_triton_is_refused():
    with pytest.raises(RuntimeError, match="no float64 version"):
        per_sample_sums(G.double(), OUT, backend="triton")
