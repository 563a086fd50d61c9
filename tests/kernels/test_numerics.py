"""Float32 products keep their digits whatever the caller's settings: autocast rounds to bfloat16."""

import pytest
import torch

from securetune_kernels import (
    Adapter,
    Normalized,
    clip_and_accumulate,
    clipped_linear_grad,
    embedding_grad_norms,
    linear_grad_norms,
    lora_per_sample_grads,
    per_sample_sums,
    tied_cross_products,
)
from securetune_kernels.numerics import add_rows, full_precision

GENERATOR = torch.Generator().manual_seed(0)
A, G = (torch.randn(3, 5, size, generator=GENERATOR) for size in (40, 50))
IDS = torch.randint(0, 40, (3, 5), generator=GENERATOR)


def clipped():
    out = torch.zeros(200)
    norms = clip_and_accumulate(A.flatten(1), out, 1.0)
    return torch.cat([out, norms])


def weighted():
    out = torch.zeros(50, 40)
    clipped_linear_grad(A, G, torch.rand(3, generator=torch.Generator().manual_seed(1)), out)
    return out


def adapter():
    rows = torch.zeros(3, 4 * 40 + 50 * 4)
    places = rows[:, :160].unflatten(1, (4, 40)), rows[:, 160:].unflatten(1, (50, 4))
    lora_per_sample_grads([Adapter(A, A[..., :4], G, G[..., :4], *places)], scaling=2.0)
    return rows


def summed():
    out = torch.zeros(3, 40)
    per_sample_sums(A, out, normalized=Normalized(A, torch.ones(3, 5), torch.ones(3, 5)))
    return out


CALLS = {
    "norms by Gram matrices": lambda: linear_grad_norms(A, G).squared,
    "norms by the gradient": lambda: linear_grad_norms(A.repeat(1, 9, 1), G.repeat(1, 9, 1)).squared,
    "lengths": lambda: linear_grad_norms(A, G).lengths,
    "weighted sum": weighted,
    "adapter": adapter,
    "clipped sum": clipped,
    "table": lambda: embedding_grad_norms(IDS, A),
    "tied matrix": lambda: tied_cross_products(A, G, IDS, A),
    "sums": summed,
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_reach_an_op(name, dtype):
    expected = CALLS[name]()
    with torch.autocast("cpu", dtype):
        assert torch.equal(CALLS[name](), expected)


def test_settings_are_the_callers_again_afterwards():
    before = torch.backends.mkldnn.matmul.fp32_precision
    with torch.autocast("cpu", torch.bfloat16):
        with full_precision():
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_rows_add_up_in_a_fixed_order(index_dtype, kernel_device):
    index = torch.randint(0, 3, (500,), generator=torch.Generator().manual_seed(0)).to(kernel_device)
    rows = torch.randn(500, 17, generator=torch.Generator().manual_seed(1)).to(kernel_device)
    found = [add_rows(torch.ones(4, 17, device=kernel_device), index.to(index_dtype), rows) for _ in range(3)]
    expected = torch.ones(4, 17, dtype=torch.float64, device=kernel_device)
    for place, row in zip(index.tolist(), rows.double(), strict=True):
        expected[place] += row
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
