"""The ops of a step on several streams and inside a CUDA graph: the same bits as one after another."""

import pytest
import torch

from securetune_kernels import (
    Adapter,
    Normalized,
    clip_and_accumulate,
    clipped_linear_grad,
    embedding_grad_norms,
    gaussian_noise,
    linear_grad_norms,
    lora_per_sample_grads,
    per_sample_sums,
    pgd_step,
)

B, T, D, P, R = 4, 70, 96, 64, 8


def make_inputs(seed, device):
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(*size, generator=generator).to(device)

    return {
        "a": randn(B, T, D), "g": randn(B, T, P), "h": randn(B, T, R), "g_low": randn(B, T, R),
        "ids": torch.randint(0, 11, (B, T), generator=generator).to(device),
        "factors": torch.rand(B, generator=generator).to(device),
        "mask": torch.ones(B, T, dtype=torch.bool, device=device),
        "key": torch.arange(seed, seed + 8, dtype=torch.int32, device=device),
        "step": torch.tensor([seed], device=device),
    }  # fmt: skip


def run_ops(inputs):
    """Run one op after another, each on what the one before wrote."""
    a, g = inputs["a"], inputs["g"]
    rows = torch.zeros(B, R * D + P * R + P, device=a.device)
    grad_a, grad_b = rows[:, : R * D].unflatten(1, (R, D)), rows[:, R * D : -P].unflatten(1, (P, R))
    adapter = Adapter(a, inputs["h"], g, inputs["g_low"], grad_a, grad_b)
    lora_per_sample_grads([adapter], scaling=2.0)
    inverse = g.square().mean(-1).add(1e-6).rsqrt()
    per_sample_sums(g, rows[:, -P:], normalized=Normalized(g, inverse))
    summed = torch.zeros(rows.shape[1], device=a.device)
    norms = clip_and_accumulate(rows, summed, 1.0)
    gaussian_noise(summed, key=inputs["key"], step=inputs["step"], stddev=0.5)
    weight = torch.zeros(P, D, device=a.device)
    clipped_linear_grad(a, g, inputs["factors"], weight)
    squared = linear_grad_norms(a, g).squared
    table = embedding_grad_norms(inputs["ids"], g)
    delta = pgd_step(
        torch.zeros_like(a), a, inputs["mask"], step_size=0.1, radius=0.3, norm="l2_token",
        direction="normalised",
    )  # fmt: skip
    return [rows, norms, summed, weight, squared, table, delta]


@pytest.mark.gpu
def test_two_streams_give_what_one_gives():
    device = torch.device("cuda")
    inputs = [make_inputs(seed, device) for seed in range(2)]
    expected = [run_ops(each) for each in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    for _ in range(10):
        found = []
        for stream, each in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                found.append(run_ops(each))
        torch.cuda.synchronize()
        for ours, truth in zip(found, expected, strict=True):
            assert all(torch.equal(one, other) for one, other in zip(ours, truth, strict=True))


@pytest.mark.gpu
def test_a_replayed_graph_reads_its_inputs_anew():
    device = torch.device("cuda")
    first, second = make_inputs(0, device), make_inputs(1, device)
    expected = run_ops(second)  # compiled before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run_ops(first)
    for name, tensor in first.items():
        tensor.copy_(second[name])
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_the_same_calls_give_the_same_bits():
    ours, other = (run_ops(make_inputs(3, torch.device("cpu"))) for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(ours, other, strict=True))
