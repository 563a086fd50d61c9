"""``noisy_adamw_step`` and ``noisy_sgd_step``: against torch's optimizers, and each of the guarantees."""

import math

import pytest
import torch

from securetune_kernels import ParameterTable, gaussian_noise, noisy_adamw_step, noisy_sgd_step
from securetune_kernels.gaussian_noise import gaussian_noise_reference
from securetune_kernels.noisy_step.reference import round_at_random
from tests.layer_factors import sparse_memory

pytest.importorskip("triton")

BACKENDS = ("triton", "torch")
# one entry, a prime, one past a chunk, two whole chunks, an empty one: no border falls on a multiple of eight
SHAPES = ((1,), (61,), (5, 205), (2048,), (0,), (3,))
SIZES = [math.prod(shape) for shape in SHAPES]
TOTAL = sum(SIZES)
OPTIONS = {"stddev": 0.5, "divisor": 8.0, "learning_rate": 0.05, "weight_decay": 0.1}


def key_of(device):
    return torch.arange(1, 9, dtype=torch.int32, device=device)


def make_params(device, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in SHAPES]


def vector(seed, device, *, positive=False):
    values = torch.randn(TOTAL, generator=torch.Generator().manual_seed(seed)).to(device)
    return values.abs() if positive else values


def place(step, device):
    return {"key": key_of(device), "step": torch.tensor([step], device=device)}


def noisy_mean(summed, step, *, public=None):
    """What the optimizer must see, in float64."""
    total = summed.double().cpu()
    gaussian_noise_reference(total, key=key_of("cpu"), step=torch.tensor(step), stddev=OPTIONS["stddev"])
    mean = total / OPTIONS["divisor"]
    return mean if public is None else mean + public.double().cpu()


def cut(flat):
    return [part.view(shape) for part, shape in zip(flat.split(SIZES), SHAPES, strict=True)]


def assert_all_close(params, truth, tolerance=2e-6):
    for param, true in zip(params, truth, strict=True):
        found, true = param.double().cpu(), true.detach().double().cpu()
        torch.testing.assert_close(found, true, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_public", [False, True])
@pytest.mark.parametrize("betas", [(0.8, 0.99), (0.0, 0.9999)])
def test_adamw_is_that_of_torch_on_the_noisy_mean(backend, betas, with_public, kernel_device):
    params = make_params(kernel_device)
    truth = [torch.nn.Parameter(param.double().cpu()) for param in params]
    optimizer = torch.optim.AdamW(truth, lr=0.05, weight_decay=0.1, betas=betas, eps=1e-6)
    table = ParameterTable(params)
    moments = torch.zeros(2, TOTAL, device=kernel_device)
    for step in range(4):
        summed = vector(step, kernel_device)
        public = vector(100 + step, kernel_device) if with_public else None
        for param, grad in zip(truth, cut(noisy_mean(summed, step, public=public)), strict=True):
            param.grad = grad
        optimizer.step()
        noisy_adamw_step(
            table, summed, moments[0], moments[1], count=torch.tensor(step + 1.0, device=kernel_device),
            betas=betas, eps=1e-6, public=public, backend=backend, **place(step, kernel_device),
            **OPTIONS,
        )  # fmt: skip
        assert summed.equal(torch.zeros_like(summed))
    assert_all_close(params, truth)
    assert_all_close(cut(moments[0]), [optimizer.state[param]["exp_avg"] for param in truth])
    assert_all_close(cut(moments[1]), [optimizer.state[param]["exp_avg_sq"] for param in truth])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_is_that_of_torch_on_the_noisy_mean(backend, momentum, nesterov, kernel_device):
    params = make_params(kernel_device)
    truth = [torch.nn.Parameter(param.double().cpu()) for param in params]
    optimizer = torch.optim.SGD(truth, lr=0.05, momentum=momentum, nesterov=nesterov, weight_decay=0.1)
    table = ParameterTable(params)
    buffer = torch.zeros(TOTAL, device=kernel_device) if momentum else None
    for step in range(3):
        summed = vector(step, kernel_device)
        for param, grad in zip(truth, cut(noisy_mean(summed, step)), strict=True):
            param.grad = grad
        optimizer.step()
        noisy_sgd_step(
            table, summed, buffer, momentum=momentum, nesterov=nesterov, backend=backend,
            **place(step, kernel_device), **OPTIONS,
        )  # fmt: skip
        assert summed.equal(torch.zeros_like(summed))
    assert_all_close(params, truth)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dp_correction_takes_the_noise_from_the_second_moment(backend, kernel_device):
    params, summed = make_params(kernel_device), vector(1, kernel_device)
    before = torch.cat([param.flatten() for param in params]).double().cpu()
    grad = noisy_mean(summed, 3)
    first, second = vector(2, kernel_device) * 0.1, vector(3, kernel_device, positive=True) * 0.01
    true_first = 0.9 * first.double().cpu() + 0.1 * grad
    true_second = 0.999 * second.double().cpu() + 0.001 * grad**2
    variance, floor = (OPTIONS["stddev"] / OPTIONS["divisor"]) ** 2, 1e-3**2
    corrected = (true_second / (1 - 0.999**5) - variance).clamp(min=floor)
    assert (corrected == floor).any()
    assert (corrected > floor).any()
    update = true_first / (1 - 0.9**5) / corrected.sqrt()
    expected = before * (1 - 0.05 * 0.1) - 0.05 * update
    noisy_adamw_step(
        ParameterTable(params), summed, first, second, count=torch.tensor([5], device=kernel_device),
        bias_correction="dp", eps=1e-3, backend=backend, **place(3, kernel_device), **OPTIONS,
    )  # fmt: skip
    assert_all_close(
        params, cut(expected), tolerance=5e-4
    )  # the difference of two near numbers is divided by


def test_noise_is_that_of_gaussian_noise_bit_for_bit(kernel_device):
    params = [torch.zeros(shape, device=kernel_device) for shape in SHAPES]
    summed = torch.zeros(TOTAL, device=kernel_device)
    noisy_sgd_step(
        ParameterTable(params), summed, stddev=1.0, divisor=1.0, learning_rate=1.0, stream=7,
        backend="triton", **place(9, kernel_device),
    )  # fmt: skip
    expected = torch.zeros(TOTAL, device=kernel_device)
    gaussian_noise(expected, stddev=1.0, stream=7, backend="triton", **place(9, kernel_device))
    assert torch.cat([param.flatten() for param in params]).equal(-expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_keep_float32_and_parameters_are_rounded_from_them(backend, dtype, kernel_device):
    params = make_params(kernel_device, dtype)
    masters = torch.cat([param.flatten() for param in params]).float()
    wide = [part.clone() for part in cut(masters)]
    vectors = [vector(1, kernel_device), torch.zeros(TOTAL, device=kernel_device)]
    wide_vectors = [v.clone() for v in vectors]
    options = {**place(2, kernel_device), **OPTIONS, "momentum": 0.9, "backend": backend}
    noisy_sgd_step(ParameterTable(params), *vectors, masters=masters, **options)
    noisy_sgd_step(ParameterTable(wide), *wide_vectors, **options)
    assert masters.equal(torch.cat([param.flatten() for param in wide]))
    for param, true in zip(params, wide, strict=True):
        assert param.equal(true.to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_rounding_is_unbiased_and_to_a_neighbour(backend, kernel_device):
    size, target = 20_000, 1.0 + 2.0**-9  # a quarter of the way from 1 to the next bfloat16
    param = torch.zeros(size, dtype=torch.bfloat16, device=kernel_device)
    summed = torch.full((size,), -target, device=kernel_device)
    noisy_sgd_step(
        ParameterTable([param]), summed, stddev=0.0, divisor=1.0, learning_rate=1.0, rounding_stream=5,
        backend=backend, **place(0, kernel_device),
    )  # fmt: skip
    assert set(param.unique().tolist()) == {1.0, 1.0078125}
    share = (param > 1).float().mean().item()
    assert abs(share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / size)


def test_random_rounding_agrees_between_backends(kernel_device):
    results = []
    for backend in BACKENDS:
        params = make_params(kernel_device, torch.bfloat16)
        noisy_sgd_step(
            ParameterTable(params), vector(1, kernel_device), stddev=0.0, divisor=8.0, learning_rate=0.1,
            rounding_stream=2**32 - 1, backend=backend, **place(6, kernel_device),
        )  # fmt: skip
        results.append(torch.cat([param.flatten() for param in params]).float())
    # the float32 values may differ by a rounding, which moves one in 65,536 draws
    assert (results[0] != results[1]).sum() <= 3


def test_random_rounding_keeps_what_is_not_finite():
    values = torch.tensor([math.inf, -math.inf, math.nan, 3.0e38])
    rounded = round_at_random(values, torch.full((4,), 65535, dtype=torch.int32))
    assert rounded[:2].equal(values[:2])
    assert rounded[2].isnan()
    assert rounded[3] >= 3.0e38


def test_nothing_but_the_parameters_is_written(kernel_device):
    """Parameters that lie in one memory with foreign entries between them."""
    memory = torch.full((3000,), 7.0, device=kernel_device)
    params = [memory[10:1500], memory[1600:1601], memory[1700:2900]]
    total = sum(param.numel() for param in params)
    noisy_sgd_step(
        ParameterTable(params), torch.zeros(total, device=kernel_device), stddev=1.0, divisor=1.0,
        learning_rate=1.0, backend="triton", **place(1, kernel_device),
    )  # fmt: skip
    foreign = torch.cat([memory[:10], memory[1500:1600], memory[1601:1700], memory[2900:]])
    assert foreign.eq(7.0).all()
    assert torch.cat(params).ne(7.0).all()


def test_the_same_call_gives_the_same_bits(kernel_device):
    results = []
    for _ in range(2):
        params = make_params(kernel_device)
        moments = torch.zeros(2, TOTAL, device=kernel_device)
        noisy_adamw_step(
            ParameterTable(params), vector(1, kernel_device), *moments, backend="triton",
            count=torch.tensor([1], device=kernel_device), **place(4, kernel_device), **OPTIONS,
        )  # fmt: skip
        results.append(torch.cat([param.flatten() for param in params]))
    assert results[0].equal(results[1])


def test_chunks_hold_every_index_once_and_cross_no_border():
    table = ParameterTable(make_params("cpu"))
    addresses, lows, highs = table.chunks.tolist()
    covered = [index for low, high in zip(lows, highs, strict=True) for index in range(low, high)]
    assert covered == list(range(TOTAL))
    for address, low, high in zip(addresses, lows, highs, strict=True):
        assert low // 1024 == (high - 1) // 1024
        owner = max(i for i, start in enumerate(table.starts) if start <= low and SIZES[i])
        assert address == table.params[owner].data_ptr() + 4 * (low - table.starts[owner])


def test_flat_indices_beyond_32_bits():
    """A model of 5 billion parameters, without its memory: starts and chunks by arithmetic alone."""
    table = ParameterTable([torch.empty(2**31 + 5, device="meta"), torch.empty(2**31, device="meta")])
    assert table.num_params == 2**32 + 5
    assert table.starts == [0, 2**31 + 5]


@pytest.mark.xdist_group("gigabytes")
def test_kernel_beyond_32_bits(kernel_device, tmp_path):
    """The last entries of a sum of more than 2^31, the rest is not touched."""
    total, start = 2**31 + 2000, 2**31 + 500
    summed = sparse_memory((total,), (1,), kernel_device, tmp_path / "summed", torch.float32)
    param = torch.zeros(total - start, device=kernel_device)
    table = ParameterTable([param])
    table.starts, table.num_params = [start], total  # as if another parameter lay before it
    summed[start:] = vector(0, kernel_device)[: total - start]
    expected = -noisy_end(summed[start:].double().cpu(), start)
    noisy_sgd_step(
        table, summed, stddev=0.5, divisor=1.0, learning_rate=1.0, backend="triton",
        **place(3, kernel_device),
    )  # fmt: skip
    torch.testing.assert_close(param.double().cpu(), expected, rtol=2e-6, atol=2e-6)
    assert not summed[start:].any()


def noisy_end(values, start):
    return gaussian_noise_reference(values, key=key_of("cpu"), step=torch.tensor(3), stddev=0.5, start=start)


@pytest.mark.gpu
def test_a_replayed_graph_takes_a_new_step_each_time():
    device = torch.device("cuda")

    def start():
        params = make_params(device)
        state = {
            "moments": torch.zeros(2, TOTAL, device=device), "summed": torch.zeros(TOTAL, device=device),
            "count": torch.zeros(1, device=device), **place(0, device),
        }  # fmt: skip
        return params, ParameterTable(params), state

    def take(table, state):
        state["count"] += 1
        noisy_adamw_step(
            table, state["summed"], *state["moments"], count=state["count"], key=state["key"],
            step=state["step"], **OPTIONS,
        )  # fmt: skip
        state["step"] += 1

    params, table, state = start()
    take(table, state)  # compiled before the capture
    params, table, state = start()
    _ = table.chunks
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        take(table, state)
    for _ in range(3):
        graph.replay()
    eager_params, eager_table, eager_state = start()
    for _ in range(3):
        take(eager_table, eager_state)
    for param, expected in zip(params, eager_params, strict=True):
        assert param.equal(expected)


def adamw_arguments(**change):
    arguments = {
        "params": ParameterTable([torch.zeros(4)]), "summed": torch.zeros(4), "exp_avg": torch.zeros(4),
        "exp_avg_sq": torch.zeros(4), "count": torch.tensor(1.0), **place(0, "cpu"), **OPTIONS,
    }  # fmt: skip
    return {**arguments, **change}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"summed": torch.zeros(5)}, ValueError, r"summed must be \[P\] = \[4\].*\(5,\)"),
        ({"summed": torch.zeros(4).double()}, TypeError, "summed must be float32, got torch.float64"),
        ({"exp_avg": torch.zeros(8)[::2]}, ValueError, "exp_avg must be .* contiguous"),
        ({"exp_avg_sq": torch.zeros(4, device="meta")}, ValueError, "exp_avg_sq is on meta .* cpu"),
        ({"public": torch.zeros(3)}, ValueError, "public must be"),
        ({"masters": torch.zeros(4)}, ValueError, "masters are for parameters of half precision"),
        ({"rounding_stream": 1}, ValueError, "rounding_stream is for bfloat16 parameters.*float32"),
        ({"stddev": -1.0}, ValueError, "stddev must be from 0"),
        ({"divisor": 0.0}, ValueError, "divisor must be > 0, got 0.0"),
        ({"learning_rate": -0.1}, ValueError, "learning_rate must be >= 0, got -0.1"),
        ({"weight_decay": math.nan}, ValueError, "weight_decay must be >= 0, got nan"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas must both be in \[0, 1\), got \(0.9, 1.0\)"),
        ({"eps": 0.0}, ValueError, "eps must be > 0, got 0.0"),
        ({"bias_correction": "none"}, ValueError, "bias_correction must be 'adam' or 'dp', got 'none'"),
        ({"count": torch.zeros(2)}, ValueError, r"count must be one number on cpu, got shape \(2,\)"),
        ({"key": torch.zeros(4).int()}, ValueError, r"key must be \[8\].*\(4,\)"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(change, error, message):
    arguments = adamw_arguments(**change)
    with pytest.raises(error, match=message):
        noisy_adamw_step(**arguments)
    assert arguments["params"].params[0].equal(torch.zeros(4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"momentum": 0.9}, "momentum_buffer goes with momentum > 0, got momentum 0.9 and none"),
        ({"nesterov": True}, "nesterov needs momentum > 0, got 0"),
    ],
)
def test_bad_momentum_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        noisy_sgd_step(
            ParameterTable([torch.zeros(4)]), torch.zeros(4), **place(0, "cpu"), **{**OPTIONS, **change}
        )


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ([], ValueError, "at least one tensor"),
        ([torch.zeros(2).double()], TypeError, "float64"),
        ([torch.zeros(2), torch.zeros(2).bfloat16()], TypeError, "float32 and torch.bfloat16 at 1"),
        ([torch.zeros(2), torch.zeros(2, device="meta")], ValueError, "cpu and meta at 1"),
        ([torch.zeros(4, 4).t()], ValueError, r"contiguous, got strides \(1, 4\)"),
    ],
)
def test_tables_of_unfit_parameters_are_refused(params, error, message):
    with pytest.raises(error, match=message):
        ParameterTable(params)
