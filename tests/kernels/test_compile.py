"""Every op inside ``torch.compile``: one node of a whole graph, with the results of the eager call."""

from collections.abc import Sequence

import pytest
import torch

from securetune_kernels import (
    Adapter,
    Normalized,
    ParameterTable,
    Segments,
    clip_and_accumulate,
    clipped_linear_grad,
    embedding_grad_norms,
    gaussian_noise,
    linear_grad_norms,
    lora_per_sample_grads,
    noisy_adamw_step,
    noisy_sgd_step,
    per_sample_sums,
    pgd_step,
    tied_cross_products,
)

U, T, D, P, R = 3, 5, 8, 6, 2
OFFSETS = (0, 4, 4, 15)
OPS = (
    "clip_and_accumulate", "clipped_linear_grad", "embedding_grad_norms", "gaussian_noise",
    "linear_grad_norms", "lora_per_sample_grads", "noisy_adamw_step", "noisy_sgd_step", "per_sample_sums",
    "pgd_step", "tied_cross_products",
)  # fmt: skip


def make_inputs(device, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(*size, generator=generator).to(device)

    return {
        "a": randn(U, T, D), "g": randn(U, T, P), "h": randn(U, T, R), "g_low": randn(U, T, R),
        "lookup_g": randn(U, T, D), "rows": randn(U, 20), "factors": randn(U).abs(),
        "ids": torch.randint(0, P, (U, T), generator=generator).to(device),
        "valid": torch.tensor([True, False, True], device=device),
        "mask": torch.ones(U, T, dtype=torch.bool, device=device),
        "offsets": torch.tensor(OFFSETS, device=device),
        "key": torch.arange(8, dtype=torch.int32, device=device), "step": torch.tensor([4], device=device),
        "count": torch.tensor([2], device=device),
        # written
        "buffer": torch.zeros(U, 2 * (R * D + P * R), device=device), "summed": randn(20),
        "weight": randn(P, D), "sums": torch.zeros(U, P, device=device), "vector": randn(20),
        "first": randn(20), "second": randn(20).abs(), "one": randn(13), "other": randn(7),
        "adapter_norms": torch.zeros(U, 2, 2, device=device),
    }  # fmt: skip


def adapters_of(x) -> Sequence[Adapter]:
    made, column = [], 0
    for scale in (1.0, 2.0):
        places = []
        for shape in ((R, D), (P, R)):
            size = shape[0] * shape[1]
            places.append(x["buffer"][:, column : column + size].unflatten(1, shape))
            column += size
        made.append(Adapter(scale * x["a"], x["h"], x["g"], x["g_low"], *places))
    return made


def packed(x, name):
    return x[name].flatten(0, 1)


def run_clip(x, backend):
    return clip_and_accumulate(x["rows"], x["summed"], 1.5, valid=x["valid"], backend=backend)


def run_norms(x, backend):
    squared, lengths, rounding = linear_grad_norms(x["a"], x["g"], backend=backend)
    assert rounding >= 0
    return squared, lengths


def run_packed_norms(x, backend):
    return linear_grad_norms(packed(x, "a"), packed(x, "g"), cu_seqlens=x["offsets"], backend=backend).squared


def run_sum(x, backend):
    clipped_linear_grad(x["a"], x["g"], x["factors"], x["weight"], backend=backend)


def run_packed_sum(x, backend):
    clipped_linear_grad(
        packed(x, "a"), packed(x, "g"), x["factors"], x["weight"], cu_seqlens=x["offsets"], backend=backend
    )


def run_adapters(x, backend):
    lora_per_sample_grads(
        adapters_of(x), scaling=2.5, squared_norms=x["adapter_norms"], backend=backend, accumulate=True
    )


def run_table(x, backend):
    alone = embedding_grad_norms(x["ids"], x["lookup_g"], backend=backend)
    offsets = x["offsets"]
    together = embedding_grad_norms(
        packed(x, "ids"), packed(x, "lookup_g"), cu_seqlens=offsets, backend=backend
    )
    return alone, together, tied_cross_products(x["a"], x["g"], x["ids"], x["lookup_g"], backend=backend)


def run_sums(x, backend):
    normalized = Normalized(x["g"] * 2, x["a"][..., 0].exp())
    per_sample_sums(x["g"], x["sums"], normalized=normalized, accumulate=True, backend=backend)


def run_noise(x, backend):
    noisy = gaussian_noise(
        x["vector"], key=x["key"], step=x["step"], stddev=0.5, start=3, coefficients=x["factors"],
        backend=backend,
    )  # fmt: skip
    return noisy * 2


def run_adamw(x, backend):
    noisy_adamw_step(
        ParameterTable([x["one"], x["other"]]), x["summed"], x["first"], x["second"], count=x["count"],
        key=x["key"], step=x["step"], stddev=0.5, divisor=4.0, learning_rate=0.1, weight_decay=0.1,
        public=x["vector"], bias_correction="dp", backend=backend,
    )  # fmt: skip
    return x["one"] * 2


def run_sgd(x, backend):
    noisy_sgd_step(
        ParameterTable([x["one"], x["other"]]), x["summed"], x["first"], key=x["key"], step=x["step"],
        stddev=0.5, divisor=4.0, learning_rate=0.1, momentum=0.9, nesterov=True, backend=backend,
    )  # fmt: skip
    return x["other"] * 2


def run_pgd(x, backend):
    return pgd_step(
        0.1 * x["a"], x["lookup_g"], x["mask"], step_size=0.1, radius=0.3, norm="l2_token",
        direction="normalised", backend=backend,
    )  # fmt: skip


CALLS = (
    run_clip, run_norms, run_packed_norms, run_sum, run_packed_sum, run_adapters, run_table, run_sums,
    run_noise, run_adamw, run_sgd, run_pgd,
)  # fmt: skip


def assert_same(compiled, eager):
    for found, expected in zip(compiled, eager, strict=True):
        assert torch.equal(found, expected)


def flat(output):
    return [] if output is None else [output] if isinstance(output, torch.Tensor) else list(output)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_whole_graph_gives_the_same_bits(call, backend, kernel_device):
    torch.compiler.reset()
    here, there = make_inputs(kernel_device), make_inputs(kernel_device)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert_same(flat(compiled(here, backend)), flat(call(there, backend)))
    assert_same(here.values(), there.values())


def test_backend_is_chosen_when_the_graph_runs(kernel_device):
    torch.compiler.reset()
    here, there = make_inputs(kernel_device), make_inputs(kernel_device)
    compiled = torch.compile(run_clip, backend="aot_eager", fullgraph=True)
    assert_same([compiled(here, "auto")], [run_clip(there, "auto")])


def test_segments_that_are_checked_already(kernel_device):
    torch.compiler.reset()
    x = make_inputs(kernel_device)
    segments = Segments.of(x["offsets"], U * T)

    def call(a, g):
        return linear_grad_norms(a, g, cu_seqlens=segments).squared

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(packed(x, "a"), packed(x, "g")), call(packed(x, "a"), packed(x, "g")))


def test_one_graph_serves_several_batch_sizes():
    torch.compiler.reset()

    def call(a, g, rows, summed):
        squared, lengths, rounding = linear_grad_norms(a, g)
        return squared * (1 + rounding), lengths, clip_and_accumulate(rows, summed, 1.0)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (2, 3, 7):
        a, g = torch.randn(batch, T, D), torch.randn(batch, T, P)
        rows, summed = torch.randn(batch, 20), torch.zeros(20)
        found = compiled(a, g, rows, summed)
        assert (found[0] >= linear_grad_norms(a, g).squared).all()
        torch.testing.assert_close(found[2], rows.norm(dim=1))


def test_in_a_graph_the_rounding_bounds_that_of_every_way(kernel_device):
    torch.compiler.reset()
    compiled = torch.compile(lambda a, g: linear_grad_norms(a, g), backend="aot_eager", fullgraph=True)
    for tokens in (3, 40):
        a, g = (torch.randn(2, tokens, size, device=kernel_device) for size in (9, 7))
        assert compiled(a, g).rounding >= linear_grad_norms(a, g, backend="triton").rounding


def test_learning_rate_may_change_from_step_to_step():
    torch.compiler.reset()
    x, y = make_inputs("cpu"), make_inputs("cpu")

    def take(x, rate):
        noisy_sgd_step(
            ParameterTable([x["one"], x["other"]]), x["summed"], key=x["key"], step=x["step"], stddev=0.5,
            divisor=4.0, learning_rate=rate,
        )  # fmt: skip

    compiled = torch.compile(take, backend="aot_eager", fullgraph=True)
    for rate in (0.1, 0.05, 0.025):
        compiled(x, rate)
        take(y, rate)
        assert_same(x.values(), y.values())


def test_wrong_argument_is_refused_when_the_graph_runs():
    torch.compiler.reset()
    compiled = torch.compile(
        lambda rows, summed: clip_and_accumulate(rows, summed, -1.0), backend="aot_eager", fullgraph=True
    )
    with pytest.raises(ValueError, match=r"max_grad_norm must be > 0 .*got -1.0"):
        compiled(torch.ones(2, 3), torch.zeros(3))


def test_every_op_is_registered():
    for name in OPS:
        assert hasattr(torch.ops.securetune_kernels, name)


def op_arguments(x):
    """Positional arguments of each registered op, up to the backend."""
    adapters = [list(parts) for parts in zip(*adapters_of(x), strict=True)]
    draw = (0.5, 0, "chacha20", 1, x["key"], x["step"], 4.0, 0.1)
    params = [x["one"], x["other"]]
    return {
        "clip_and_accumulate": (x["rows"], x["summed"], 1.5, x["valid"]),
        "clipped_linear_grad": (x["a"], x["g"], x["factors"], x["weight"], None),
        "embedding_grad_norms": (x["ids"], x["lookup_g"], None),
        "gaussian_noise": (x["vector"], x["key"], x["step"], 0.5, 0, 3, x["factors"], "chacha20", 1),
        "linear_grad_norms": (packed(x, "a"), packed(x, "g"), x["offsets"]),
        "lora_per_sample_grads": (*adapters, x["adapter_norms"], None, 2.5, False),
        "noisy_adamw_step": (
            params, x["summed"], x["first"], x["second"], *draw, [0.9, 0.99], 1e-6, 0.1, x["vector"], None,
            None, x["count"], "adam",
        ),
        "noisy_sgd_step": (params, x["summed"], x["first"], *draw, 0.9, True, 0.1, None, None, None),
        "per_sample_sums": (x["g"], x["sums"], x["g"] * 2, x["a"][..., 0].exp(), None, None, True),
        "pgd_step": (0.1 * x["a"], x["lookup_g"], x["mask"], 0.1, 0.3, "l2_token", "normalised"),
        "tied_cross_products": (x["a"], x["g"], x["ids"], x["lookup_g"]),
    }  # fmt: skip


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, backend, kernel_device):
    op = getattr(torch.ops.securetune_kernels, name).default
    torch.library.opcheck(op, (*op_arguments(make_inputs(kernel_device))[name], backend))


@pytest.mark.slow
def test_inductor_takes_a_step_of_several_ops(kernel_device):
    torch.compiler.reset()

    def step(x, backend):
        run_adapters(x, backend)
        norms = clip_and_accumulate(x["buffer"][:, :20], x["summed"], 1.5, backend=backend)
        return norms * 2, run_noise(x, backend), run_adamw(x, backend), x["other"] + x["summed"][:7]

    here, there = make_inputs(kernel_device), make_inputs(kernel_device)
    found, expected = torch.compile(step, fullgraph=True)(here, "triton"), step(there, "triton")
    for ours, truth in zip((*found, *here.values()), (*expected, *there.values()), strict=True):
        torch.testing.assert_close(ours, truth)
