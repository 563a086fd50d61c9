"""Matrix products are right whatever library computes them."""

import pytest
import torch
from torch.nn import functional

from securetune_kernels import clipped_linear_grad, products
from securetune_kernels.products import add_product, linear, onednn_speedup

needs_onednn = pytest.mark.skipif(
    onednn_speedup(torch.get_num_threads()) == 0, reason="this build of torch has no oneDNN operator"
)


@pytest.fixture(params=["own", "onednn"])
def library(request, monkeypatch):
    """Take torch's own products, or oneDNN's for any size."""
    is_onednn = request.param == "onednn"
    if is_onednn and onednn_speedup(torch.get_num_threads()) == 0:
        pytest.skip("this build of torch has no oneDNN operator")
    monkeypatch.setattr(products, "prefers_onednn", lambda: is_onednn)
    monkeypatch.setattr(products, "_WORTHWHILE", 1)
    return request.param


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


@pytest.mark.parametrize("leading", [(), (1,), (7,), (2, 3), (3, 1, 65)])
@pytest.mark.parametrize(("d", "p"), [(1, 1), (17, 5), (64, 129)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_product_is_as_close_to_the_truth_as_torchs(library, leading, d, p, with_bias):
    x, weight, bias = random(*leading, d), random(p, d), random(p) if with_bias else None
    truth = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    plain = functional.linear(x, weight, bias)
    actual = linear(x, weight, bias)
    scale = truth.abs().max()
    assert actual.shape == truth.shape
    assert (actual - truth).abs().max() <= (plain - truth).abs().max() + 1e-6 * scale


def test_transposed_weight_gives_the_input_gradient(library):
    g, weight = random(2, 33, 48), random(48, 20)
    torch.testing.assert_close(linear(g, weight.t()), g @ weight)


def test_input_that_is_not_contiguous(library):
    x, weight = random(20, 33).t(), random(12, 20)
    torch.testing.assert_close(linear(x, weight), x.contiguous() @ weight.t())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_take_torchs_own_product(library, dtype):
    x, weight = random(4, 6).to(dtype), random(5, 6).to(dtype)
    assert torch.equal(linear(x, weight), functional.linear(x, weight))


def test_small_products_take_torchs_own(monkeypatch):
    monkeypatch.setattr(products, "_by_onednn", lambda *_: pytest.fail("too small to pay"))
    linear(random(4, 8), random(8, 8))


@pytest.mark.parametrize(("tokens", "d", "p"), [(1, 1, 1), (33, 5, 17), (64, 48, 129), (9, 16, 2500)])
def test_added_product_is_as_close_to_the_truth_as_torchs(library, tokens, d, p):
    g, a, before = random(tokens, p), random(tokens, d), random(p, d)
    truth = before.double() + g.double().t() @ a.double()
    actual, plain = before.clone(), before.clone()
    add_product(actual, g, a)
    plain.addmm_(g.t(), a)
    assert (actual - truth).abs().max() <= (plain - truth).abs().max() + 1e-6 * truth.abs().max()


def test_added_product_goes_into_a_part_of_a_larger_tensor(library):
    g, a, whole = random(12, 6), random(12, 5), torch.zeros(6, 9)
    add_product(whole[:, 2:7], g, a)
    torch.testing.assert_close(whole[:, 2:7], g.t() @ a)
    assert whole[:, :2].count_nonzero() == whole[:, 7:].count_nonzero() == 0


@pytest.mark.parametrize("library", ["onednn"], indirect=True)
def test_lower_matmul_precision_does_not_reach_a_clipped_sum(library, monkeypatch):
    """By the setting, since not every CPU rounds at a lower one."""
    own, seen, run = torch.backends.mkldnn.matmul, [], products._by_onednn

    def spy(*args):
        seen.append(own.fp32_precision)
        return run(*args)

    monkeypatch.setattr(products, "_by_onednn", spy)
    before = own.fp32_precision
    own.fp32_precision = "bf16"
    try:
        clipped_linear_grad(random(4, 16, 32), random(4, 16, 64), torch.rand(4), torch.zeros(64, 32))
    finally:
        own.fp32_precision = before
    assert set(seen) == {"ieee"}


def test_autocast_decides_before_the_library(library):
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(random(4, 6), random(5, 6)).dtype == torch.bfloat16


@pytest.mark.parametrize("library", ["onednn"], indirect=True)
def test_strides_that_onednn_is_slow_with_take_torchs_own(library, monkeypatch):
    monkeypatch.setattr(products, "_by_onednn", lambda *_: pytest.fail("a part of the columns"))
    x, weight = random(4, 6), random(5, 12)[:, :6]
    torch.testing.assert_close(linear(x, weight), x @ weight.t())
    linear(random(4, 5), weight.t())


@pytest.mark.parametrize("problem", ["missing", "wrong", "of another shape", "refused"])
def test_an_operator_that_is_not_as_expected_is_not_used(monkeypatch, problem):
    def replacement(x, weight, bias):
        if problem == "missing":
            return torch.ops.mkldnn._there_is_no_such_operator(x, weight, bias)
        if problem == "refused":
            raise RuntimeError("unsupported")
        y = functional.linear(x, weight, bias)
        return y * 1.001 if problem == "wrong" else y[None]

    monkeypatch.setattr(products, "_by_onednn", replacement)
    assert onednn_speedup.__wrapped__(1) == 0.0


@needs_onednn
def test_speedup_is_measured():
    assert onednn_speedup.__wrapped__(torch.get_num_threads()) > 0
