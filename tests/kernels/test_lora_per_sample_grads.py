"""``lora_per_sample_grads``: both backends against float64, and each line of its guarantees."""

import importlib

import pytest
import torch

from securetune_kernels import Adapter, Segments, lora_per_sample_grads
from securetune_kernels.lora_per_sample_grads import lora_per_sample_grads_reference
from tests.layer_factors import DTYPES, OFFSETS, sparse_memory, with_strides

# the interpreter computes products of infinities in numpy, which warns
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

BACKENDS = ("triton", "torch")
# tokens, inputs d, rank r, outputs p: one, a prime, a power of two, one past a block of each dimension
SHAPES = ((1, 1, 1, 1), (7, 13, 3, 5), (32, 128, 16, 64), (65, 129, 17, 131), (3, 40, 65, 20))
SCALING = 2.5
# How much worse than the reference in the same dtype a gradient may be, both against float64, relative to the
# truth: a few float32 roundings, since the order of additions differs.
EXTRA_ERROR = 5e-7


def adapters(count, *lead, d, r, p, units=None, dtype=torch.float32, device="cpu", seed=0, gap=0):
    """Return random adapters whose gradients are columns of one buffer of NaN, and the buffer."""
    generator = torch.Generator().manual_seed(seed)
    units = lead[0] if units is None else units
    sizes = [size for _ in range(count) for size in (r * d, p * r)]
    buffer = torch.full((units, sum(sizes) + gap * len(sizes)), float("nan"), device=device)
    made, column = [], 0
    for _ in range(count):
        factors = [torch.randn(*lead, size, generator=generator).to(device, dtype) for size in (d, r, p, r)]
        places = []
        for shape in ((r, d), (p, r)):
            size = shape[0] * shape[1]
            places.append(buffer[:, column : column + size].unflatten(1, shape))
            column += size + gap
        made.append(Adapter(*factors, *places))
    return made, buffer


def in_float64(made):
    return [
        Adapter(
            *(part.double() for part in one[:4]),
            *(torch.zeros_like(part, dtype=torch.float64) for part in one[4:]),
        )
        for one in made
    ]


def exact(made, segments=None):
    truth = in_float64(made)
    norms = torch.zeros(len(made[0].grad_a), len(made), 2, dtype=torch.float64, device=made[0].x.device)
    lora_per_sample_grads_reference(truth, scaling=SCALING, segments=segments, squared_norms=norms)
    return truth, norms


def error(made, truth):
    found = [
        (part.double() - true).norm() / true.norm().clamp_min(1e-300)
        for one, exact_one in zip(made, truth, strict=True)
        for part, true in zip(one[4:], exact_one[4:], strict=True)
    ]
    return max(found).item()


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_no_worse_than_reference(backend, shape, dtype, count, kernel_device):
    tokens, d, r, p = shape
    made, buffer = adapters(count, 2, tokens, d=d, r=r, p=p, dtype=dtype, device=kernel_device)
    truth, true_norms = exact(made)
    norms = torch.full((2, count, 2), float("nan"), device=kernel_device)
    lora_per_sample_grads_reference(made, scaling=SCALING)
    reference_error = error(made, truth)
    buffer.fill_(float("nan"))
    lora_per_sample_grads(made, scaling=SCALING, squared_norms=norms, backend=backend)
    assert error(made, truth) <= reference_error + EXTRA_ERROR
    assert buffer.isfinite().all()
    torch.testing.assert_close(norms.double(), true_norms, rtol=3e-6, atol=0.0)


def test_reference_agrees_with_autograd_of_one_sample_at_a_time():
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(3, 5, n, generator=generator, dtype=torch.float64) for n in (6, 4))
    a = torch.randn(2, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    places = torch.zeros(3, 2, 6, dtype=torch.float64), torch.zeros(3, 4, 2, dtype=torch.float64)
    one = Adapter(x, (x @ a.t()).detach(), g, (SCALING * g @ b).detach(), *places)
    lora_per_sample_grads_reference([one], scaling=SCALING)
    for i in range(3):
        loss = (SCALING * (x[i] @ a.t() @ b.t()) * g[i]).sum()
        expected_a, expected_b = torch.autograd.grad(loss, (a, b))
        torch.testing.assert_close(one.grad_a[i], expected_a, rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(one.grad_b[i], expected_b, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_units_are_as_if_alone(backend, dtype, count, index_dtype, kernel_device):
    units = len(OFFSETS) - 1
    made, buffer = adapters(
        count, OFFSETS[-1], d=19, r=4, p=33, units=units, dtype=dtype, device=kernel_device
    )
    cu_seqlens = torch.tensor(OFFSETS, dtype=index_dtype, device=kernel_device)
    truth, _ = exact(made, Segments.of(cu_seqlens, OFFSETS[-1]))
    lora_per_sample_grads(made, scaling=SCALING, cu_seqlens=cu_seqlens, backend=backend)
    assert error(made, truth) <= EXTRA_ERROR
    assert torch.equal(buffer[1], torch.zeros_like(buffer[1]))  # a unit without tokens


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_second_run_of_an_adapter_is_added(backend, count, kernel_device):
    made, buffer = adapters(count, 2, 9, d=19, r=4, p=33, device=kernel_device)
    norms = torch.zeros(2, count, 2, device=kernel_device)
    lora_per_sample_grads(made, scaling=SCALING, backend=backend)
    once = buffer.clone()
    lora_per_sample_grads(made, scaling=SCALING, accumulate=True, squared_norms=norms, backend=backend)
    torch.testing.assert_close(buffer, 2 * once, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(norms.sum(dim=(1, 2)), buffer.square().sum(dim=1), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_columns_of_the_buffer_are_left_alone(backend, kernel_device):
    made, buffer = adapters(2, 2, 9, d=19, r=4, p=33, device=kernel_device, gap=3)
    lora_per_sample_grads(made, scaling=SCALING, backend=backend)
    assert buffer.isnan().sum() == 2 * 4 * 3


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_are_followed(backend, dtype, order, kernel_device):
    made, _ = adapters(2, 2, 11, d=19, r=5, p=17, dtype=dtype, device=kernel_device)
    truth, _ = exact(made)
    # the second adapter keeps its strides, so the two share no launch
    strided = [with_strides(part, order, (1, 2, 3)) for part in made[0][:4]]
    places = [with_strides(part, order, (2, 1, 1)) for part in made[0][4:]]
    mixed = [Adapter(*strided, *places), made[1]]
    lora_per_sample_grads(mixed, scaling=SCALING, backend=backend)
    assert error(mixed, truth) <= EXTRA_ERROR


@pytest.mark.parametrize("strides", [(2**31 + 8, 2, 1), (8, 2**31 + 8, 1), (8, 2, 2**31 + 8)])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.xdist_group("gigabytes")
def test_offsets_beyond_32_bits(backend, count, strides, kernel_device, tmp_path):
    made, _ = adapters(count, 2, 2, d=2, r=2, p=2, dtype=torch.float16, device=kernel_device)
    truth, _ = exact(made)
    moved = []
    for index, one in enumerate(made):
        far = sparse_memory((2, 2, 2), strides, kernel_device, tmp_path / f"sparse{index}")
        moved.append(one._replace(x=far.copy_(one.x)))
    lora_per_sample_grads(moved, scaling=SCALING, backend=backend)
    assert error(moved, truth) <= EXTRA_ERROR


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_non_finite_unit_touches_no_other(backend, count, bad, kernel_device):
    made, buffer = adapters(count, 3, 20, d=17, r=4, p=9, device=kernel_device)
    norms = torch.zeros(3, count, 2, device=kernel_device)
    lora_per_sample_grads(made, scaling=SCALING, backend=backend)
    before = buffer.clone()
    made[0].x[1, 19, 16] = bad
    lora_per_sample_grads(made, scaling=SCALING, squared_norms=norms, backend=backend)
    assert torch.equal(buffer[[0, 2]], before[[0, 2]])
    assert not norms[1, 0, 0].isfinite()
    assert norms[[0, 2]].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batches_leave_nothing_unwritten(backend, shape, kernel_device):
    units, tokens, d, p = shape
    made, buffer = adapters(2, units, tokens, d=d, r=2, p=p, device=kernel_device)
    norms = torch.full((units, 2, 2), float("nan"), device=kernel_device)
    lora_per_sample_grads(made, scaling=SCALING, squared_norms=norms, backend=backend)
    assert buffer.isfinite().all()
    assert norms.isfinite().all()


def test_empty_gradient_may_have_any_strides():
    grad_b = torch.zeros(1).expand(2, 0, 2)
    made = one_adapter(g=torch.ones(2, 3, 0), grad_b=grad_b)
    lora_per_sample_grads([made], scaling=1.0)
    assert made.grad_a.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_same_call_gives_the_same_bits_and_leaves_its_inputs(backend, dtype, kernel_device):
    made, buffer = adapters(2, 3, 70, d=131, r=6, p=66, dtype=dtype, device=kernel_device)
    copies = [part.clone() for one in made for part in one[:4]]
    lora_per_sample_grads(made, scaling=SCALING, backend=backend)
    first = buffer.clone()
    lora_per_sample_grads(made, scaling=SCALING, backend=backend)
    assert torch.equal(buffer, first)
    now = [part for one in made for part in one[:4]]
    assert all(torch.equal(*pair) for pair in zip(now, copies, strict=True))


def test_adapters_of_one_layout_share_a_launch():
    triton_kernels = importlib.import_module("securetune_kernels.lora_per_sample_grads.triton_kernels")
    made, _ = adapters(2, 2, 8, d=16, r=4, p=16)
    products = [triton_kernels.Product(one.x, one.g_low, one.grad_a.mT) for one in made]
    assert triton_kernels.can_share_a_launch(products)
    moved = made[1].x.new_zeros(2, 8, 32)[:, :, ::2]
    assert not triton_kernels.can_share_a_launch([products[0], products[1]._replace(wide=moved)])
    unaligned = made[1].x.new_zeros(made[1].x.numel() + 1)[1:].view_as(made[1].x)
    assert not triton_kernels.can_share_a_launch([products[0], products[1]._replace(wide=unaligned)])


@pytest.mark.gpu
def test_adapters_in_a_cuda_graph_share_no_launch():
    made, buffer = adapters(2, 2, 8, d=16, r=4, p=16, device="cuda")
    lora_per_sample_grads(made[:1], scaling=SCALING)  # compiled before the capture
    lora_per_sample_grads(made, scaling=SCALING)
    expected = buffer.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lora_per_sample_grads(made, scaling=SCALING)
    buffer.zero_()
    graph.replay()
    torch.testing.assert_close(buffer, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_of_two_dtypes(backend, kernel_device):
    made, _ = adapters(1, 2, 9, d=19, r=4, p=33, device=kernel_device)
    (one,) = made
    mixed = [one._replace(x=one.x.bfloat16(), h=one.h.bfloat16())]
    truth, _ = exact(mixed)
    lora_per_sample_grads(mixed, scaling=SCALING, backend=backend)
    assert error(mixed, truth) <= EXTRA_ERROR


def test_float64_is_computed_in_float64():
    made, _ = adapters(1, 2, 9, d=7, r=2, p=8)
    truth, _ = exact(made)
    wide = in_float64(made)
    lora_per_sample_grads(wide, scaling=SCALING)
    assert error(wide, truth) <= 1e-14


@pytest.mark.gpu
def test_sizes_of_real_adapters():
    made, _ = adapters(3, 4, 1024, d=2048, r=16, p=1024, dtype=torch.bfloat16, device="cuda")
    truth, _ = exact(made)
    lora_per_sample_grads(made, scaling=SCALING, backend="triton")
    # tensor cores may round each sum of 16 products toward zero
    assert error(made, truth) <= 1e-5


def one_adapter(**changes):
    made, _ = adapters(1, 2, 3, d=4, r=2, p=5)
    return made[0]._replace(**changes)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"x": torch.ones(6, 4)}, ValueError, r"\[U, T, \.\.\.\] without cu_seqlens, got \(6, 4\)"),
        ({"g": torch.ones(2, 4, 5)}, ValueError, r"g of adapter 0.*\(2, 3, 5\).*got \(2, 4, 5\)"),
        ({"g_low": torch.ones(2, 3, 3)}, ValueError, r"g_low of adapter 0.*\(2, 3, 2\).*got \(2, 3, 3\)"),
        ({"grad_a": torch.ones(2, 4, 2)}, ValueError, r"grad_a of adapter 0.*\(2, 2, 4\).*got \(2, 4, 2\)"),
        ({"grad_b": torch.ones(2, 5, 2).half()}, TypeError, "grad_b must be .*float64.*got torch.float16"),
        ({"h": torch.ones(2, 3, 2).int()}, TypeError, "h must be .*got torch.int32"),
        ({"g": torch.ones(2, 3, 5, device="meta")}, ValueError, "g of adapter 0 is on meta and x on cpu"),
        ({"grad_a": torch.ones(1, 2, 4).expand(2, 2, 4)}, ValueError, r"grad_a .* strides \(0, 4, 1\)"),
    ],
)  # fmt: skip
def test_wrong_adapter_is_named_with_its_value(changes, kind, message):
    with pytest.raises(kind, match=message):
        lora_per_sample_grads([one_adapter(**changes)], scaling=1.0)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"squared_norms": torch.ones(2, 2, 2)}, ValueError, r"squared_norms.*\(2, 1, 2\).*got \(2, 2, 2\)"),
        ({"squared_norms": torch.ones(2, 1, 2).half()}, TypeError, "torch.float32, got torch.float16"),
        ({"cu_seqlens": torch.tensor([0, 3])}, ValueError, r"\[N, \.\.\.\] with cu_seqlens, got \(2, 3, 4\)"),
    ],
)
def test_wrong_option_is_named_with_its_value(options, kind, message):
    with pytest.raises(kind, match=message):
        lora_per_sample_grads([one_adapter()], scaling=1.0, **options)


def test_no_adapter_is_refused():
    with pytest.raises(ValueError, match="at least one adapter"):
        lora_per_sample_grads([], scaling=1.0)


def test_adapters_of_two_shapes_are_refused():
    other, _ = adapters(1, 2, 3, d=4, r=3, p=5)
    with pytest.raises(ValueError, match=r"h of adapter 1 must have shape \(2, 3, 2\).*got \(2, 3, 3\)"):
        lora_per_sample_grads([one_adapter(), *other], scaling=1.0)


def test_float64_on_triton_is_refused():
    made, _ = adapters(1, 2, 3, d=4, r=2, p=5)
    with pytest.raises(RuntimeError, match="no float64 version"):
        lora_per_sample_grads(in_float64(made), scaling=1.0, backend="triton")
