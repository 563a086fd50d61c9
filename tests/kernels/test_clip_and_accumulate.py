"""``clip_and_accumulate``: both backends against float64, and each line of its guarantees."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from securetune_kernels import clip_and_accumulate
from securetune_kernels.clip_and_accumulate import clip_and_accumulate_reference

BACKENDS = ("triton", "torch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# one element, a prime, a power of two, one past a block of each sweep, several splits of a row
SHAPES = ((1, 1), (1, 4097), (3, 61), (8, 1024), (33, 129), (2, 513), (5, 10_007))
# How much worse than the reference in the same dtype a result may be, both against float64, relative to the
# length of the truth: a few float32 roundings, since the order of additions differs.
EXTRA_ERROR = 5e-7
# of a squared norm summed in float32, of the factor and of the product
SENSITIVITY_SLACK = 2e-6

# the interpreter computes both sides of a choice in numpy, which warns
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def random_grads(batch, params, dtype=torch.float32, device="cpu", seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(batch, params, generator=generator)).to(device=device, dtype=dtype)


def clipped_sum(grads, max_grad_norm, *, backend, valid=None):
    accumulator = torch.zeros(grads.shape[1], device=grads.device)
    norms = clip_and_accumulate(grads, accumulator, max_grad_norm, valid=valid, backend=backend)
    return accumulator, norms


def exact_clipped_sum(grads, max_grad_norm, valid=None):
    accumulator = torch.zeros(grads.shape[1], device=grads.device, dtype=torch.float64)
    norms = clip_and_accumulate_reference(grads.double(), accumulator, max_grad_norm, valid=valid)
    return accumulator, norms


def relative_error(actual, truth):
    return ((actual.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "params"), SHAPES)
def test_error_no_worse_than_reference(batch, params, dtype, backend, kernel_device):
    grads = random_grads(batch, params, dtype, kernel_device)
    start = random_grads(1, params, device=kernel_device, seed=1)[0]
    max_grad_norm = 0.8 * math.sqrt(params)
    truth = start.double()
    true_norms = clip_and_accumulate_reference(grads.double(), truth, max_grad_norm)
    expected, actual = start.clone(), start.clone()
    clip_and_accumulate_reference(grads, expected, max_grad_norm)
    norms = clip_and_accumulate(grads, actual, max_grad_norm, backend=backend)
    assert relative_error(actual, truth) <= relative_error(expected, truth) + EXTRA_ERROR
    torch.testing.assert_close(norms.double(), true_norms, rtol=1e-6, atol=0.0)


def test_reference_agrees_with_autograd_of_one_sample_at_a_time():
    torch.manual_seed(0)
    weight = torch.randn(7, dtype=torch.float64, requires_grad=True)
    inputs, targets = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    rows, expected = [], torch.zeros(7, dtype=torch.float64)
    for features, target in zip(inputs, targets, strict=True):
        (grad,) = torch.autograd.grad((features @ weight - target) ** 2, weight)
        rows.append(grad)
        expected += grad * min(1.0, 2.0 / grad.norm().item())
    actual, _ = exact_clipped_sum(torch.stack(rows), 2.0)
    torch.testing.assert_close(actual, expected, rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15)
@given(
    row_exponent=st.integers(-30, 30),
    clip_exponent=st.integers(-25, 25),
    params=st.sampled_from([1, 97, 300]),
    seed=st.integers(0, 2**16),
)
def test_one_sample_adds_at_most_the_clip_norm(
    row_exponent, clip_exponent, params, seed, backend, kernel_device
):
    max_grad_norm = 10.0**clip_exponent
    grads = random_grads(1, params, device=kernel_device, seed=seed, scale=10.0**row_exponent)
    contribution, norms = clipped_sum(grads, max_grad_norm, backend=backend)
    truth, true_norms = exact_clipped_sum(grads, max_grad_norm)
    assert contribution.double().norm() <= max_grad_norm * (1 + SENSITIVITY_SLACK)
    torch.testing.assert_close(norms.double(), true_norms, rtol=2e-6, atol=0.0)
    if true_norms.item() < 1e37 * max_grad_norm:
        torch.testing.assert_close(contribution.double(), truth, rtol=3e-6, atol=1e-44)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=10)
@given(clip=st.floats(1e-3, 1e3), seed=st.integers(0, 2**16))
def test_removing_one_sample_moves_the_sum_by_at_most_the_clip_norm(clip, seed, backend, kernel_device):
    grads = random_grads(5, 130, device=kernel_device, seed=seed, scale=clip)
    with_sample, _ = clipped_sum(grads, clip, backend=backend)
    without_sample, _ = clipped_sum(grads[1:], clip, backend=backend)
    assert (with_sample.double() - without_sample.double()).norm() <= clip * (1 + 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=10)
@given(seed=st.integers(0, 2**16))
def test_order_of_samples_does_not_matter(seed, backend, kernel_device):
    grads = random_grads(9, 70, device=kernel_device, seed=seed)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed)).to(kernel_device)
    summed, norms = clipped_sum(grads, 5.0, backend=backend)
    permuted, permuted_norms = clipped_sum(grads[order], 5.0, backend=backend)
    torch.testing.assert_close(permuted, summed, rtol=1e-5, atol=1e-5)
    assert torch.equal(permuted_norms, norms[order])


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=10)
@given(exponent=st.integers(-20, 20), seed=st.integers(0, 2**16))
def test_scaling_gradients_and_threshold_by_a_power_of_two_scales_the_sum(
    exponent, seed, backend, kernel_device
):
    grads = random_grads(4, 33, device=kernel_device, seed=seed)
    factor = 2.0**exponent
    summed, _ = clipped_sum(grads, 3.0, backend=backend)
    scaled, _ = clipped_sum(grads * factor, 3.0 * factor, backend=backend)
    torch.testing.assert_close(scaled / factor, summed, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_micro_batches_add_up_to_the_whole_batch(backend, kernel_device):
    grads = random_grads(10, 77, device=kernel_device)
    whole, _ = clipped_sum(grads, 4.0, backend=backend)
    pieces = torch.zeros_like(whole)
    for part in grads.split((1, 4, 0, 5)):
        clip_and_accumulate(part, pieces, 4.0, backend=backend)
    torch.testing.assert_close(pieces, whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_non_finite_sample_contributes_zero(bad, dtype, backend, kernel_device):
    grads = random_grads(4, 300, dtype, kernel_device)
    grads[1, 299] = bad
    summed, norms = clipped_sum(grads, 1.0, backend=backend)
    others, _ = exact_clipped_sum(grads[[0, 2, 3]], 1.0)
    assert relative_error(summed, others) <= 1e-6
    assert norms.isfinite().tolist() == [True, False, True, True]


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_of_non_finite_samples_leaves_the_accumulator_alone(backend, kernel_device):
    accumulator = random_grads(1, 50, device=kernel_device)[0]
    before = accumulator.clone()
    clip_and_accumulate(
        torch.full((3, 50), math.nan, device=kernel_device), accumulator, 1.0, backend=backend
    )
    assert torch.equal(accumulator, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_largest_finite_entries_are_clipped_not_dropped(dtype, backend, kernel_device):
    # squares overflow float32 (and float16), the norm itself does not
    largest = min(torch.finfo(dtype).max, 5e35)
    grads = torch.full((1, 100), largest, dtype=dtype, device=kernel_device)
    summed, norms = clipped_sum(grads, 1.0, backend=backend)
    torch.testing.assert_close(summed, torch.full_like(summed, 0.1), rtol=1e-5, atol=0.0)
    assert norms.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_entries_whose_squares_vanish_are_still_clipped(backend, kernel_device):
    grads = torch.full((1, 100), 1e-25, device=kernel_device)
    summed, norms = clipped_sum(grads, 1e-26, backend=backend)
    torch.testing.assert_close(summed, torch.full_like(summed, 1e-27), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(norms, torch.full_like(norms, 1e-24), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_beyond_float32_contributes_zero(backend, kernel_device):
    grads = torch.full((2, 100), 3e38, device=kernel_device)
    grads[1] = 1.0
    summed, norms = clipped_sum(grads, 100.0, backend=backend)
    torch.testing.assert_close(summed, torch.ones_like(summed))
    assert not norms[0].isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
def test_factor_too_small_for_float32_contributes_zero(backend, kernel_device):
    summed, _ = clipped_sum(torch.full((1, 4), 1e20, device=kernel_device), 1e-25, backend=backend)
    assert torch.equal(summed, torch.zeros_like(summed))


@pytest.mark.parametrize("max_grad_norm", [1e30, math.inf])
@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_threshold_is_the_plain_sum(max_grad_norm, backend, kernel_device):
    grads = random_grads(6, 200, device=kernel_device)
    summed, _ = clipped_sum(grads, max_grad_norm, backend=backend)
    torch.testing.assert_close(summed.double(), grads.double().sum(dim=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_gradient_adds_zero(backend, kernel_device):
    summed, norms = clipped_sum(torch.zeros(3, 10, device=kernel_device), 1.0, backend=backend)
    assert torch.equal(summed, torch.zeros_like(summed))
    assert torch.equal(norms, torch.zeros_like(norms))


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch_adds_nothing(shape, backend, kernel_device):
    # Poisson sampling draws empty batches
    accumulator = torch.full((shape[1],), 7.0, device=kernel_device)
    norms = clip_and_accumulate(torch.ones(shape, device=kernel_device), accumulator, 1.0, backend=backend)
    assert torch.equal(accumulator, torch.full((shape[1],), 7.0, device=kernel_device))
    assert torch.equal(norms, torch.zeros(shape[0], device=kernel_device))


@pytest.mark.parametrize("padding", [0.0, 5.0, float("nan"), float("inf")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_rows_contribute_zero_whatever_they_hold(padding, backend, kernel_device):
    grads = random_grads(6, 150, device=kernel_device)
    valid = torch.tensor([True, False, True, True, False, True], device=kernel_device)
    grads[~valid] = padding
    summed, norms = clipped_sum(grads, 2.0, backend=backend, valid=valid)
    expected, expected_norms = clipped_sum(grads[valid], 2.0, backend=backend)
    torch.testing.assert_close(summed, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(norms[valid], expected_norms)
    assert torch.equal(norms[~valid], torch.zeros(2, device=kernel_device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_are_followed(dtype, backend, kernel_device):
    table = random_grads(222, 12, dtype, kernel_device)
    grads = table.t()[1::2, ::3]
    accumulator = torch.zeros(2 * grads.shape[1], device=kernel_device)
    valid = torch.ones(2 * grads.shape[0], dtype=torch.bool, device=kernel_device)
    clip_and_accumulate(grads, accumulator[::2], 1.5, valid=valid[::2], backend=backend)
    expected, _ = clipped_sum(grads.contiguous(), 1.5, backend=backend)
    torch.testing.assert_close(accumulator[::2], expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(accumulator[1::2], torch.zeros_like(expected))


@pytest.mark.parametrize("strides", [(2**31 + 8, 1), (1, 2**30)])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.xdist_group("gigabytes")
def test_offsets_beyond_32_bits(strides, backend, kernel_device, tmp_path):
    # three entries far apart; on a CPU the storage is a sparse file, so it takes no memory
    shape = (2, 3)
    reach = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if kernel_device.type == "cuda":
        storage = torch.zeros(reach, dtype=torch.float16, device=kernel_device)
    else:
        path = tmp_path / "sparse"
        with path.open("wb") as file:
            file.truncate(2 * reach)
        storage = torch.from_file(str(path), shared=True, size=reach, dtype=torch.float16)
    grads = storage.as_strided(shape, strides)
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], device=kernel_device)
    grads.copy_(values)
    # the torch backend widens half precision through a copy, which must find the same entries
    summed, norms = clipped_sum(grads, math.inf, backend=backend)
    assert torch.equal(summed, values.sum(dim=0))
    torch.testing.assert_close(norms, values.norm(dim=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_same_call_gives_the_same_bits(dtype, backend, kernel_device):
    grads = random_grads(17, 9001, dtype, kernel_device)
    first, first_norms = clipped_sum(grads, 3.0, backend=backend)
    second, second_norms = clipped_sum(grads, 3.0, backend=backend)
    assert torch.equal(first, second)
    assert torch.equal(first_norms, second_norms)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_left_alone(backend, kernel_device):
    grads = random_grads(3, 40, device=kernel_device)
    before = grads.clone()
    clipped_sum(grads, 0.1, backend=backend)
    assert torch.equal(grads, before)


def test_norms_of_long_rows_are_accurate_on_a_cpu():
    # a plain float32 sum over four million entries is 8e-5 off, and the noise would be calibrated to the
    # wrong norm
    grads = random_grads(1, 4_000_000)
    _, norms = clipped_sum(grads, 1.0, backend="torch")
    truth = grads.double().norm(dim=1)
    torch.testing.assert_close(norms.double(), truth, rtol=1e-6, atol=0.0)


def test_lower_matmul_precision_does_not_reach_the_sum():
    # some CPUs then multiply in bfloat16, 2e-3 off
    grads = random_grads(64, 5000)
    truth, _ = exact_clipped_sum(grads, 1.0)
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        summed, _ = clipped_sum(grads, 1.0, backend="torch")
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    assert relative_error(summed, truth) <= 1e-6


@pytest.mark.gpu
def test_norms_of_long_rows_are_accurate_on_a_gpu():
    grads = random_grads(2, 4_000_003, torch.bfloat16, "cuda")
    _, norms = clipped_sum(grads, 1.0, backend="triton")
    torch.testing.assert_close(norms.double(), grads.double().norm(dim=1), rtol=1e-6, atol=0.0)


@pytest.mark.gpu
def test_auto_takes_triton_on_a_gpu():
    grads = random_grads(3, 5000, device="cuda")
    automatic, _ = clipped_sum(grads, 1.0, backend="auto")
    chosen, _ = clipped_sum(grads, 1.0, backend="triton")
    assert torch.equal(automatic, chosen)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(2, 3, 4), torch.zeros(4), 1.0), ValueError, r"2-D \[B, P\], got shape \(2, 3, 4\)"),
        ((torch.ones(2, 3).double(), torch.zeros(3), 1.0), TypeError, "got torch.float64"),
        ((torch.ones(2, 3), torch.zeros(3).bfloat16(), 1.0), TypeError, "float32.*got torch.bfloat16"),
        ((torch.ones(2, 3), torch.zeros(4), 1.0), ValueError, r"\(3,\) to match .*\(2, 3\), got \(4,\)"),
        ((torch.ones(2, 3), torch.zeros(3, device="meta"), 1.0), ValueError, "is on meta .* on cpu"),
        ((torch.ones(2, 3), torch.zeros(1).expand(3), 1.0), ValueError, r"accumulator has strides \(0,\)"),
        ((torch.ones(2, 3), torch.zeros(3), 0.0), ValueError, "must be > 0 .*got 0.0"),
        ((torch.ones(2, 3), torch.zeros(3), -1.0), ValueError, "must be > 0 .*got -1.0"),
        ((torch.ones(2, 3), torch.zeros(3), math.nan), ValueError, "must be > 0 .*got nan"),
    ],
)  # fmt: skip
def test_wrong_argument_is_named_with_its_value(arguments, error, message):
    with pytest.raises(error, match=message):
        clip_and_accumulate(*arguments)


@pytest.mark.parametrize(
    ("valid", "error", "message"),
    [
        (torch.ones(2), TypeError, "must be bool, got torch.float32"),
        (torch.ones(3, dtype=torch.bool), ValueError, r"\(2,\) to match .*\(2, 5\), got \(3,\)"),
        (torch.ones(2, dtype=torch.bool, device="meta"), ValueError, "valid is on meta .* on cpu"),
    ],
)
def test_wrong_valid_is_named_with_its_value(valid, error, message):
    with pytest.raises(error, match=message):
        clip_and_accumulate(torch.ones(2, 5), torch.zeros(5), 1.0, valid=valid)
