"""Every op on tensors of any layout: permuted, stepped, with gaps of NaN that must not be read.

In the interpreter only: a GPU would compile hundreds of variants of the same arithmetic.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from securetune_kernels import (
    Adapter,
    Normalized,
    clip_and_accumulate,
    clipped_linear_grad,
    embedding_grad_norms,
    linear_grad_norms,
    lora_per_sample_grads,
    per_sample_sums,
    pgd_step,
    tied_cross_products,
)
from tests.layer_factors import DTYPES, with_strides

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter is off where there is a GPU"
)
SIZES = st.sampled_from([1, 2, 5, 17, 33])


def layouts(ndim):
    """Draw the order of the dimensions in memory, and how far apart their elements lie."""
    return st.tuples(st.permutations(range(ndim)), st.tuples(*[st.integers(1, 3)] * ndim))


def drawn(data, x):
    order, steps = data.draw(layouts(x.ndim))
    return with_strides(x, order, steps)


def randn(*size, dtype):
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size))).to(dtype)


def run_norms(a, g, **_):
    return list(linear_grad_norms(a, g, backend="triton")[:2])


def run_sum(a, g, out, factors, **_):
    clipped_linear_grad(a, g, factors, out, backend="triton")
    return [out]


def run_adapter(a, g, h, g_low, grad_a, grad_b, **_):
    lora_per_sample_grads([Adapter(a, h, g, g_low, grad_a, grad_b)], scaling=2.0, backend="triton")
    return [grad_a, grad_b]


def run_sums(a, x, mean, inverse, sums, **_):
    per_sample_sums(a, sums, normalized=Normalized(x, inverse, mean), backend="triton")
    return [sums]


def run_table(a, g, ids, lookup_g, **_):
    products = tied_cross_products(a, g, ids, lookup_g, backend="triton")
    return [products, embedding_grad_norms(ids, lookup_g, backend="triton")]


def run_clip(rows, out_row, **_):
    return [clip_and_accumulate(rows, out_row, 2.0, backend="triton"), out_row]


def run_pgd(a, x, mask, **_):
    options = {"step_size": 0.1, "radius": 0.3, "norm": "l2_sample", "direction": "normalised"}
    return [pgd_step(a, x, mask, backend="triton", **options)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", [run_norms, run_sum, run_adapter, run_sums, run_table, run_clip, run_pgd])
@settings(max_examples=8)
@given(data=st.data(), units=st.integers(1, 3), tokens=SIZES, d=SIZES, p=SIZES)
def test_layout_changes_nothing(call, dtype, data, units, tokens, d, p, poisoned_memory):
    wide, half = {"dtype": torch.float32}, {"dtype": dtype}
    inputs = {
        "a": randn(units, tokens, d, **half), "g": randn(units, tokens, p, **half),
        "h": randn(units, tokens, 3, **half), "g_low": randn(units, tokens, 3, **half),
        "x": randn(units, tokens, d, **half), "lookup_g": randn(units, tokens, d, **half),
        "rows": randn(units, tokens * d, **half), "inverse": randn(units, tokens, **wide),
        "mean": randn(units, tokens, **wide), "factors": randn(units, **wide),
        "ids": torch.arange(units * tokens).view(units, tokens) % p,
        "mask": torch.arange(units * tokens).view(units, tokens) % 3 > 0,
    }  # fmt: skip
    outputs = {
        "out": torch.zeros(p, d, **wide), "grad_a": torch.zeros(units, 3, d, **wide),
        "grad_b": torch.zeros(units, p, 3, **wide), "sums": torch.zeros(units, d, **wide),
        "out_row": torch.zeros(tokens * d, **wide),
    }  # fmt: skip
    expected = call(**{**inputs, **{name: part.clone() for name, part in outputs.items()}})
    names = call.__code__.co_varnames[: call.__code__.co_argcount]
    moved = {name: drawn(data, part) for name, part in {**inputs, **outputs}.items() if name in names}
    for found, truth in zip(call(**moved), expected, strict=True):
        scale = truth.double().norm().item() if truth.numel() else 0.0
        assert (found.double() - truth.double()).norm().item() <= 1e-6 * scale * math.sqrt(tokens)
