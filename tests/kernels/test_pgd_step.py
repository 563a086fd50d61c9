"""``pgd_step``: both backends against float64, and each line of its guarantees."""

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from securetune_kernels import pgd_step
from securetune_kernels.pgd_step import pgd_step_reference

BACKENDS = ("triton", "torch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NORMS = ("l2_token", "linf", "l2_sample")
DIRECTIONS = ("sign", "normalised")
# one element, primes, a power of two, one past it
SHAPES = ((1, 1, 1), (3, 5, 37), (2, 4, 64), (2, 3, 257))
# How much worse than the reference in the same dtype a result may be, both against float64, relative to the
# length of the truth. A unit near the sphere may be rounded the other way, by one bit of its dtype.
EXTRA_ERROR = {torch.float32: 2e-6, torch.bfloat16: 1e-4, torch.float16: 2e-5}

# the interpreter computes both sides of a choice in numpy, which warns
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def random_step(shape, dtype=torch.float32, device="cpu", seed=0, grad_scale=1e-3):
    """Return a perturbation, a gradient and a mask with about a third of the tokens off, the first one on."""
    generator = torch.Generator().manual_seed(seed)
    delta = 0.05 * torch.randn(shape, generator=generator)
    grad = grad_scale * torch.randn(shape, generator=generator)
    mask = torch.rand(shape[:2], generator=generator) > 0.35
    mask[0, 0] = True
    return delta.to(device, dtype), grad.to(device, dtype), mask.to(device)


def unit_norms(delta, norm):
    exact = delta.double()
    if norm == "linf":
        return exact.abs().amax(dim=2)
    return torch.linalg.vector_norm(exact, dim=(1, 2) if norm == "l2_sample" else 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_no_worse_than_reference(shape, norm, direction, dtype, backend, kernel_device):
    delta, grad, mask = random_step(shape, dtype, kernel_device)
    options = {"step_size": 0.03, "radius": 0.3, "norm": norm, "direction": direction}
    truth = pgd_step_reference(delta.double(), grad.double(), mask, **options)
    expected = pgd_step_reference(delta, grad, mask, **options)
    actual = pgd_step(delta, grad, mask, **options, backend=backend)
    assert actual.dtype == dtype
    scale = truth.norm()
    allowed = (expected.double() - truth).norm() / scale + EXTRA_ERROR[dtype]
    assert (actual.double() - truth).norm() / scale <= allowed


@pytest.mark.parametrize("num_tokens", [3, 4, 9])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_samples_longer_than_one_block_of_tokens(direction, num_tokens, kernel_device, monkeypatch):
    kernels = importlib.import_module("securetune_kernels.pgd_step.triton_kernels")
    monkeypatch.setattr(kernels, "BLOCK_TOKENS", 4)
    delta, grad, mask = random_step((2, num_tokens, 5), device=kernel_device)
    options = {"step_size": 0.03, "radius": 0.3, "norm": "l2_sample", "direction": direction}
    expected = pgd_step_reference(delta, grad, mask, **options)
    actual = pgd_step(delta, grad, mask, **options, backend="triton")
    torch.testing.assert_close(actual, expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_reference_is_move_then_project(norm, direction):
    # the definition, unit by unit, in Python numbers
    delta, grad, mask = (tensor.double() for tensor in random_step((2, 3, 4)))
    mask = mask.bool()
    actual = pgd_step_reference(delta, grad, mask, step_size=0.2, radius=0.15, norm=norm, direction=direction)
    units = [[0, 1, 2]] if norm == "l2_sample" else [[0], [1], [2]]
    for sample in range(2):
        for tokens in units:
            kept = mask[sample, tokens][:, None]
            slope = grad[sample, tokens] * kept
            length = slope.abs().max() if norm == "linf" else slope.norm()
            step = slope.sign() if direction == "sign" else slope / (length if length > 0 else 1.0)
            moved = delta[sample, tokens] * kept + 0.2 * step
            if norm == "linf":
                expected = moved.clamp(-0.15, 0.15)
            else:
                expected = moved * min(1.0, 0.15 / max(moved.norm().item(), 1e-300))
            torch.testing.assert_close(actual[sample, tokens], expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@settings(max_examples=12)
@given(
    direction=st.sampled_from(DIRECTIONS),
    radius=st.floats(1e-7, 1e4),
    step_per_radius=st.floats(1e-2, 1e2),
    start_per_radius=st.sampled_from([0.0, 0.5, 1.0, 1.001, 3.0, 1e4]),
    seed=st.integers(0, 2**16),
)
def test_budget_holds_after_the_cast(
    norm, direction, radius, step_per_radius, start_per_radius, seed, dtype, backend, kernel_device
):
    delta, grad, mask = random_step((3, 4, 19), torch.float32, kernel_device, seed)
    largest = unit_norms(delta, norm).max().item()
    delta = (delta * (radius * start_per_radius / largest)).to(dtype)
    step_size = min(1e9, max(1e-9, radius * step_per_radius))
    result = pgd_step(
        delta, grad.to(dtype), mask, step_size=step_size, radius=radius, norm=norm, direction=direction,
        backend=backend,
    )  # fmt: skip
    # no tolerance: the promise is about the numbers that come out
    assert unit_norms(result, norm).max().item() <= radius


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", ["l2_token", "l2_sample"])
@pytest.mark.parametrize("left_over", [1.5, 2.0, 3.0, 5.0])
def test_step_against_a_far_start_stays_in_the_ball(left_over, norm, backend, kernel_device):
    # delta and step nearly cancel, the worst case for a norm put together from sums
    delta, _, mask = random_step((2, 3, 50), device=kernel_device)
    delta, mask = 1e4 * delta / unit_norms(delta, norm).max().float(), torch.ones_like(mask)
    result = pgd_step(
        delta,
        -delta,
        mask,
        step_size=1e4 - left_over,
        radius=1.0,
        norm=norm,
        direction="normalised",
        backend=backend,
    )
    assert unit_norms(result, norm).max().item() <= 1.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_tokens_off_the_mask_are_zero_and_ignored(norm, direction, dtype, backend, kernel_device):
    delta, grad, mask = random_step((3, 6, 20), dtype, kernel_device)
    options = {"step_size": 0.1, "radius": 0.2, "norm": norm, "direction": direction, "backend": backend}
    expected = pgd_step(delta, grad, mask, **options)
    delta[~mask], grad[~mask] = math.nan, math.inf
    actual = pgd_step(delta, grad, mask, **options)
    assert torch.equal(actual, expected)
    assert torch.equal(actual[~mask], torch.zeros_like(actual[~mask]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", NORMS)
def test_empty_mask_gives_zero(norm, backend, kernel_device):
    delta, grad, mask = random_step((2, 3, 8), device=kernel_device)
    result = pgd_step(
        delta, grad, torch.zeros_like(mask), step_size=1.0, radius=1.0, norm=norm, direction="normalised",
        backend=backend,
    )  # fmt: skip
    assert torch.equal(result, torch.zeros_like(delta))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gradient_takes_no_step(bad, norm, direction, dtype, backend, kernel_device):
    delta, grad, mask = random_step((3, 4, 11), dtype, kernel_device)
    mask[:] = True
    options = {"step_size": 0.01, "radius": 2.0, "norm": norm, "direction": direction, "backend": backend}
    expected = pgd_step(delta, grad, mask, **options)
    hit = (1,) if norm == "l2_sample" else (1, 2)
    expected[hit] = delta[hit]
    grad[1, 2, 5] = bad
    assert torch.equal(pgd_step(delta, grad, mask, **options), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_delta_becomes_zero(bad, norm, direction, backend, kernel_device):
    delta, grad, mask = random_step((3, 4, 11), device=kernel_device)
    mask[:] = True
    options = {"step_size": 0.01, "radius": 0.2, "norm": norm, "direction": direction, "backend": backend}
    expected = pgd_step(delta, grad, mask, **options)
    expected[(1,) if norm == "l2_sample" else (1, 2)] = 0.0
    delta[1, 2, 5] = bad
    assert torch.equal(pgd_step(delta, grad, mask, **options), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_zero_gradient_takes_no_step(norm, direction, backend, kernel_device):
    delta, grad, mask = random_step((2, 3, 9), device=kernel_device)
    mask[:] = True
    result = pgd_step(
        delta,
        torch.zeros_like(grad),
        mask,
        step_size=0.5,
        radius=2.0,
        norm=norm,
        direction=direction,
        backend=backend,
    )
    assert torch.equal(result, delta)


@pytest.mark.parametrize("scale", [1e-33, 1e-20, 1.0, 1e20, 1e33])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_scale_of_the_gradient_does_not_matter(norm, direction, backend, scale, kernel_device):
    # squares of the smallest vanish in float32, those of the largest overflow
    delta, grad, mask = random_step((2, 3, 17), device=kernel_device, grad_scale=1.0)
    options = {"step_size": 0.1, "radius": 0.3, "norm": norm, "direction": direction, "backend": backend}
    expected = pgd_step(delta, grad, mask, **options)
    torch.testing.assert_close(pgd_step(delta, grad * scale, mask, **options), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=10)
@given(norm=st.sampled_from(NORMS), direction=st.sampled_from(DIRECTIONS), seed=st.integers(0, 2**16))
def test_a_sample_does_not_depend_on_the_others(norm, direction, seed, backend, kernel_device):
    delta, grad, mask = random_step((4, 3, 13), device=kernel_device, seed=seed)
    options = {"step_size": 0.1, "radius": 0.2, "norm": norm, "direction": direction, "backend": backend}
    together = pgd_step(delta, grad, mask, **options)
    alone = pgd_step(delta[2:3], grad[2:3], mask[2:3], **options)
    assert torch.equal(together[2:3], alone)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", NORMS)
def test_normalised_step_from_zero_has_the_asked_length(norm, backend, kernel_device):
    delta, grad, mask = random_step((2, 3, 29), device=kernel_device)
    mask[:] = True
    result = pgd_step(
        torch.zeros_like(delta), grad, mask, step_size=0.25, radius=1.0, norm=norm, direction="normalised",
        backend=backend,
    )  # fmt: skip
    lengths = unit_norms(result, norm)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 0.25), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", NORMS)
def test_strides_are_followed(norm, backend, kernel_device):
    delta, grad, mask = random_step((6, 4, 22), device=kernel_device)
    delta, grad, mask = (
        delta.permute(1, 0, 2)[:, ::2, ::2],
        grad.permute(1, 0, 2)[:, 1::2, 1::2],
        mask.t()[:, ::2],
    )
    options = {"step_size": 0.1, "radius": 0.2, "norm": norm, "direction": "normalised", "backend": backend}
    expected = pgd_step(delta.contiguous(), grad.contiguous(), mask.contiguous(), **options)
    result = pgd_step(delta, grad, mask, **options)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-7)
    assert result.is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", NORMS)
def test_expanded_gradient_and_mask_are_read(norm, backend, kernel_device):
    delta, grad, mask = random_step((3, 4, 8), device=kernel_device)
    options = {"step_size": 0.1, "radius": 0.2, "norm": norm, "direction": "sign", "backend": backend}
    shared_grad, shared_mask = grad[:1].expand(3, 4, 8), mask[:1].expand(3, 4)
    expected = pgd_step(delta, shared_grad.contiguous(), shared_mask.contiguous(), **options)
    assert torch.equal(pgd_step(delta, shared_grad, shared_mask, **options), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_input_gives_empty_output(shape, backend, kernel_device):
    delta = torch.zeros(shape, device=kernel_device)
    mask = torch.ones(shape[:2], dtype=torch.bool, device=kernel_device)
    result = pgd_step(
        delta, delta, mask, step_size=1.0, radius=1.0, norm="l2_sample", direction="sign", backend=backend
    )
    assert result.shape == shape


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.xdist_group("gigabytes")
def test_offsets_beyond_32_bits(backend, norm, kernel_device, tmp_path):
    # two samples of one token far apart; on a CPU the storage is a sparse file, so it takes no memory
    shape, strides = (2, 1, 4), (2**31 + 8, 4, 1)
    reach = strides[0] + 4
    if kernel_device.type == "cuda":
        storage = torch.zeros(reach, dtype=torch.float16, device=kernel_device)
    else:
        path = tmp_path / "sparse"
        with path.open("wb") as file:
            file.truncate(2 * reach)
        storage = torch.from_file(str(path), shared=True, size=reach, dtype=torch.float16)
    delta = storage.as_strided(shape, strides)
    delta.copy_(torch.tensor([[[0.5, 0.0, 0.0, 0.0]], [[0.0, 0.25, 0.0, 0.0]]]))
    mask = torch.ones(2, 1, dtype=torch.bool, device=kernel_device)
    result = pgd_step(
        delta,
        torch.zeros_like(delta),
        mask,
        step_size=1.0,
        radius=1.0,
        norm=norm,
        direction="sign",
        backend=backend,
    )
    assert torch.equal(result, delta.contiguous())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_same_call_gives_the_same_bits(backend, dtype, norm, kernel_device):
    delta, grad, mask = random_step((3, 7, 300), dtype, kernel_device)
    options = {"step_size": 0.1, "radius": 0.2, "norm": norm, "direction": "normalised", "backend": backend}
    assert torch.equal(pgd_step(delta, grad, mask, **options), pgd_step(delta, grad, mask, **options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", NORMS)
def test_inputs_are_left_alone(norm, backend, kernel_device):
    inputs = random_step((2, 3, 10), device=kernel_device)
    before = [tensor.clone() for tensor in inputs]
    pgd_step(*inputs, step_size=1.0, radius=0.1, norm=norm, direction="sign", backend=backend)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, before, strict=True))


def test_embedding_too_wide_for_the_kernel_falls_back_or_raises(kernel_device):
    delta = torch.zeros(1, 1, 16_385, device=kernel_device)
    mask = torch.ones(1, 1, dtype=torch.bool, device=kernel_device)
    options = {"step_size": 1.0, "radius": 1.0, "norm": "l2_token", "direction": "normalised"}
    expected = pgd_step(delta, delta + 1, mask, **options, backend="torch")
    assert torch.equal(pgd_step(delta, delta + 1, mask, **options), expected)
    with pytest.raises(RuntimeError, match="embedding size 16385 is above 16384"):
        pgd_step(delta, delta, mask, **options, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("embed", [576, 4096, 16_384])
def test_model_sizes_on_a_gpu(embed, norm):
    delta, grad, mask = random_step((4, 33, embed), torch.bfloat16, "cuda")
    options = {"step_size": 0.2, "radius": 1.0, "norm": norm, "direction": "normalised"}
    truth = pgd_step_reference(delta.double(), grad.double(), mask, **options)
    actual = pgd_step(delta, grad, mask, **options)
    expected = pgd_step_reference(delta, grad, mask, **options)
    scale = truth.norm()
    assert (actual.double() - truth).norm() / scale <= (expected.double() - truth).norm() / scale + 1e-4
    assert unit_norms(actual, norm).max().item() <= 1.0


GOOD = {"step_size": 0.1, "radius": 1.0, "norm": "linf", "direction": "sign"}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"delta": torch.zeros(2, 3)}, ValueError, r"3-D \[B, T, D\], got shape \(2, 3\)"),
        ({"delta": torch.zeros(2, 3, 4).double()}, TypeError, "delta must be .*got torch.float64"),
        ({"grad": torch.zeros(2, 3, 4).long()}, TypeError, "grad must be .*got torch.int64"),
        ({"grad": torch.zeros(2, 3, 5)}, ValueError, r"\(2, 3, 4\), got \(2, 3, 5\)"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask must be bool, got torch.float32"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, r"\(2, 3\) to match .*, got \(2, 4\)"),
        ({"grad": torch.zeros(2, 3, 4, device="meta")}, ValueError, "grad is on meta and delta on cpu"),
        (
            {"mask": torch.ones(2, 3, dtype=torch.bool, device="meta")},
            ValueError,
            "mask is on meta and delta on cpu",
        ),
        ({"step_size": 0.0}, ValueError, "step_size must be .*got 0.0"),
        ({"step_size": math.nan}, ValueError, "step_size must be .*got nan"),
        ({"radius": -1.0}, ValueError, "radius must be .*got -1.0"),
        ({"radius": math.inf}, ValueError, "radius must be .*got inf"),
        ({"norm": "l1"}, ValueError, "norm must be 'l2_token', 'linf' or 'l2_sample', got 'l1'"),
        ({"direction": "up"}, ValueError, "direction must be 'sign' or 'normalised', got 'up'"),
    ],
)
def test_wrong_argument_is_named_with_its_value(changes, error, message):
    tensors = {
        "delta": torch.zeros(2, 3, 4),
        "grad": torch.zeros(2, 3, 4),
        "mask": torch.ones(2, 3, dtype=torch.bool),
    }
    with pytest.raises(error, match=message):
        pgd_step(**{**tensors, **GOOD, **changes})
