"""Noise, optimizer update and zeroing of the accumulator in one sweep over memory."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .._backend import NAMESPACE, Backend, resolve_backend
from ..gaussian_noise import Generator, check_draw
from .reference import noisy_adamw_step_reference, noisy_sgd_step_reference
from .table import ParameterTable

__all__ = [
    "ParameterTable",
    "noisy_adamw_step",
    "noisy_adamw_step_reference",
    "noisy_sgd_step",
    "noisy_sgd_step_reference",
]

BiasCorrection = Literal["adam", "dp"]


@torch.no_grad()
def noisy_adamw_step(
    params: ParameterTable,
    summed: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    count: Tensor,
    key: Tensor,
    step: Tensor,
    stddev: float,
    divisor: float,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    bias_correction: BiasCorrection = "adam",
    public: Tensor | None = None,
    masters: Tensor | None = None,
    stream: int = 0,
    rounding_stream: int | None = None,
    generator: Generator = "chacha20",
    summands: int = 1,
    backend: Backend = "auto",
) -> None:
    """Add noise to a summed gradient, divide it, take an AdamW step, and zero the sum, in one sweep.

    ``g = (summed + noise) / divisor + public`` goes into AdamW (Loshchilov and Hutter 2019,
    https://arxiv.org/abs/1711.05101) as ``torch.optim.AdamW`` computes it, all in float32; then ``summed``
    is zero. The noise of an entry is that of :func:`securetune_kernels.gaussian_noise` at its flat index.

    Guarantees:
        The noise is that of ``gaussian_noise``, added to the float32 sum once, before anything reads it.
        Every entry of the parameters, the moments and ``summed`` is written; nothing else is.
        The same call on the same machine gives the same bits.

    Args:
        params: The parameters and their places in the flat vector.
        summed: ``[P]``, float32: the clipped sum; zero afterwards.
        exp_avg: ``[P]``, float32: first moment, updated in place.
        exp_avg_sq: ``[P]``, float32: second moment, updated in place.
        count: One number on the device, float32 or int64: updates so far, this one included.
        key: ``[8]``, int32: the noise's key.
        step: One int64 on the device: the noise's step.
        stddev: Standard deviation of the noise on the sum, >= 0.
        divisor: What the noisy sum is divided by, > 0: a public constant.
        learning_rate: Step size, >= 0.
        betas: Decay rates of the moments, each in [0, 1).
        eps: Added to the root of the second moment, > 0.
        weight_decay: Decoupled weight decay, >= 0.
        bias_correction: ``"adam"``; or ``"dp"`` (Tang et al. 2024, https://arxiv.org/abs/2312.14334): the
            noise's variance ``(stddev / divisor)^2`` is taken from the second moment, and ``eps`` is the
            least value of its root.
        public: ``[P]``, float32: added after the division, without noise.
        masters: ``[P]``, float32: the parameters in float32, for parameters of half precision. They are
            updated, and the parameters are rounded from them.
        stream: Stream of the noise.
        rounding_stream: A stream of its own: bfloat16 parameters without ``masters`` are rounded up or down
            at random, with the float32 value as expectation. None rounds to nearest.
        generator: See ``gaussian_noise``.
        summands: See ``gaussian_noise``.
        backend: ``"triton"``, ``"torch"`` (the reference) or ``"auto"`` (see ``resolve_backend``).

    Raises:
        TypeError: If a dtype is not among those above.
        ValueError: If a shape, a device or a number does not fit.
        RuntimeError: If ``backend="triton"`` cannot run here.
    """
    draw: dict[str, Any] = {"stddev": stddev, "stream": stream, "generator": generator, "summands": summands}
    options: dict[str, Any] = {
        **draw,
        "key": key,
        "step": step,
        "divisor": divisor,
        "learning_rate": learning_rate,
        "betas": betas,
        "eps": eps,
        "weight_decay": weight_decay,
        "public": public,
        "masters": masters,
        "rounding_stream": rounding_stream,
    }
    if torch.compiler.is_compiling():
        options |= {"count": count, "bias_correction": bias_correction, "backend": backend}
        _adamw_in_a_graph(params.params, summed, exp_avg, exp_avg_sq, **options)
        return
    _check_vectors(
        params, summed, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}, public, masters, rounding_stream
    )
    _check_numbers(divisor, learning_rate, weight_decay, stream, rounding_stream)
    check_draw(summed, key, step, coefficients=None, **draw)
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must both be in [0, 1), got {betas}.")
    if not eps > 0:
        raise ValueError(f"eps must be > 0, got {eps}.")
    if bias_correction not in ("adam", "dp"):
        raise ValueError(f"bias_correction must be 'adam' or 'dp', got {bias_correction!r}.")
    if count.numel() != 1 or count.device != summed.device:
        raise ValueError(
            f"count must be one number on {summed.device}, got shape {tuple(count.shape)} on {count.device}."
        )
    # in float64: 1 - 0.999 has no digits to lose
    counts = count.double()
    corrections = torch.stack([1 - betas[0] ** counts, 1 - betas[1] ** counts]).flatten().float()
    options["corrections"] = corrections
    options["noise_variance"] = (stddev / divisor) ** 2 if bias_correction == "dp" else None
    if summed.numel() == 0:
        return
    if resolve_backend(backend, summed, op="noisy_adamw_step") == "torch":
        noisy_adamw_step_reference(params, summed, exp_avg, exp_avg_sq, **options)
        return
    from .triton_kernels import noisy_adamw_step_triton  # triton is optional: imported on first use

    noisy_adamw_step_triton(params, summed, exp_avg, exp_avg_sq, **options)


@torch.no_grad()
def noisy_sgd_step(
    params: ParameterTable,
    summed: Tensor,
    momentum_buffer: Tensor | None = None,
    *,
    key: Tensor,
    step: Tensor,
    stddev: float,
    divisor: float,
    learning_rate: float,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    public: Tensor | None = None,
    masters: Tensor | None = None,
    stream: int = 0,
    rounding_stream: int | None = None,
    generator: Generator = "chacha20",
    summands: int = 1,
    backend: Backend = "auto",
) -> None:
    """Add noise to a summed gradient, divide it, take an SGD step, and zero the sum, in one sweep.

    As :func:`noisy_adamw_step`, with the update of ``torch.optim.SGD`` without dampening: weight decay is
    added to the gradient, and the momentum buffer starts at zero.

    Args:
        params: The parameters and their places in the flat vector.
        summed: ``[P]``, float32: the clipped sum; zero afterwards.
        momentum_buffer: ``[P]``, float32, updated in place; None without momentum.
        key: ``[8]``, int32: the noise's key.
        step: One int64 on the device: the noise's step.
        stddev: Standard deviation of the noise on the sum, >= 0.
        divisor: What the noisy sum is divided by, > 0: a public constant.
        learning_rate: Step size, >= 0.
        momentum: In [0, 1); needs ``momentum_buffer`` where it is above 0.
        nesterov: Nesterov's momentum.
        weight_decay: L2 penalty, >= 0.
        public: As in :func:`noisy_adamw_step`.
        masters: As in :func:`noisy_adamw_step`.
        stream: Stream of the noise.
        rounding_stream: As in :func:`noisy_adamw_step`.
        generator: See ``gaussian_noise``.
        summands: See ``gaussian_noise``.
        backend: ``"triton"``, ``"torch"`` (the reference) or ``"auto"`` (see ``resolve_backend``).

    Raises:
        TypeError: If a dtype is not among those above.
        ValueError: If a shape, a device or a number does not fit.
        RuntimeError: If ``backend="triton"`` cannot run here.
    """
    draw: dict[str, Any] = {"stddev": stddev, "stream": stream, "generator": generator, "summands": summands}
    options: dict[str, Any] = {
        **draw,
        "key": key,
        "step": step,
        "divisor": divisor,
        "learning_rate": learning_rate,
        "momentum": momentum,
        "nesterov": nesterov,
        "weight_decay": weight_decay,
        "public": public,
        "masters": masters,
        "rounding_stream": rounding_stream,
    }
    if torch.compiler.is_compiling():
        _sgd_in_a_graph(params.params, summed, momentum_buffer, **options, backend=backend)
        return
    vectors = {} if momentum_buffer is None else {"momentum_buffer": momentum_buffer}
    _check_vectors(params, summed, vectors, public, masters, rounding_stream)
    _check_numbers(divisor, learning_rate, weight_decay, stream, rounding_stream)
    check_draw(summed, key, step, coefficients=None, **draw)
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}.")
    if (momentum > 0) != (momentum_buffer is not None):
        given = "none" if momentum_buffer is None else "one"
        raise ValueError(f"momentum_buffer goes with momentum > 0, got momentum {momentum} and {given}.")
    if nesterov and momentum == 0:
        raise ValueError("nesterov needs momentum > 0, got 0.")
    if summed.numel() == 0:
        return
    if resolve_backend(backend, summed, op="noisy_sgd_step") == "torch":
        noisy_sgd_step_reference(params, summed, momentum_buffer, **options)
        return
    from .triton_kernels import noisy_sgd_step_triton  # triton is optional: imported on first use

    noisy_sgd_step_triton(params, summed, momentum_buffer, **options)


@torch.library.custom_op(
    f"{NAMESPACE}::noisy_adamw_step",
    mutates_args={"params", "summed", "exp_avg", "exp_avg_sq", "masters"},
)
def _adamw_in_a_graph(
    params: Sequence[Tensor],
    summed: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    stddev: float,
    stream: int,
    generator: str,
    summands: int,
    key: Tensor,
    step: Tensor,
    divisor: float,
    learning_rate: float,
    betas: Sequence[float],
    eps: float,
    weight_decay: float,
    public: Tensor | None,
    masters: Tensor | None,
    rounding_stream: int | None,
    count: Tensor,
    bias_correction: str,
    backend: str,
) -> None:
    table = ParameterTable(params)  # a graph may run on copies, at other addresses
    noisy_adamw_step(
        table, summed, exp_avg, exp_avg_sq, stddev=stddev, stream=stream, generator=generator,  # pyright: ignore[reportArgumentType]
        summands=summands, key=key, step=step, divisor=divisor, learning_rate=learning_rate,
        betas=tuple(betas), eps=eps, weight_decay=weight_decay, public=public, masters=masters,  # pyright: ignore[reportArgumentType]
        rounding_stream=rounding_stream, count=count, bias_correction=bias_correction, backend=backend,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip


@torch.library.custom_op(
    f"{NAMESPACE}::noisy_sgd_step", mutates_args={"params", "summed", "momentum_buffer", "masters"}
)
def _sgd_in_a_graph(
    params: Sequence[Tensor],
    summed: Tensor,
    momentum_buffer: Tensor | None,
    stddev: float,
    stream: int,
    generator: str,
    summands: int,
    key: Tensor,
    step: Tensor,
    divisor: float,
    learning_rate: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    public: Tensor | None,
    masters: Tensor | None,
    rounding_stream: int | None,
    backend: str,
) -> None:
    table = ParameterTable(params)
    noisy_sgd_step(
        table, summed, momentum_buffer, stddev=stddev, stream=stream, generator=generator,  # pyright: ignore[reportArgumentType]
        summands=summands, key=key, step=step, divisor=divisor, learning_rate=learning_rate,
        momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, public=public, masters=masters,
        rounding_stream=rounding_stream, backend=backend,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip


def _check_vectors(
    params: ParameterTable,
    summed: Tensor,
    vectors: dict[str, Tensor],
    public: Tensor | None,
    masters: Tensor | None,
    rounding_stream: int | None,
) -> None:
    named = {"summed": summed, **vectors}
    named |= {name: v for name, v in (("public", public), ("masters", masters)) if v is not None}
    for name, vector in named.items():
        if vector.dtype != torch.float32:
            raise TypeError(f"{name} must be float32, got {vector.dtype}.")
        if tuple(vector.shape) != (params.num_params,) or not vector.is_contiguous():
            raise ValueError(
                f"{name} must be [P] = [{params.num_params}] and contiguous, as the parameters are, got "
                f"shape {tuple(vector.shape)} with strides {vector.stride()}."
            )
        if vector.device != params.device:
            raise ValueError(
                f"{name} is on {vector.device} and the parameters on {params.device}; all must be on one "
                "device."
            )
    if masters is not None and params.dtype == torch.float32:
        raise ValueError("masters are for parameters of half precision, got float32 ones. Leave them out.")
    if rounding_stream is not None and (masters is not None or params.dtype != torch.bfloat16):
        raise ValueError(
            f"rounding_stream is for bfloat16 parameters without masters, got {params.dtype} "
            f"{'without' if masters is None else 'with'} masters. Leave one out."
        )


def _check_numbers(
    divisor: float, learning_rate: float, weight_decay: float, stream: int, rounding_stream: int | None
) -> None:
    if not 0 < divisor < float("inf"):
        raise ValueError(f"divisor must be > 0, got {divisor}.")
    for name, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be >= 0, got {value}.")
    if rounding_stream is not None and (rounding_stream == stream or not 0 <= rounding_stream < 2**32):
        raise ValueError(
            f"rounding_stream must be from 0 to 2^32 - 1 and not the noise's stream ({stream}), got "
            f"{rounding_stream}."
        )
