"""``noisy_adamw_step`` and ``noisy_sgd_step`` in plain PyTorch; the truth of the tests."""

import torch
from torch import Tensor

from ..gaussian_noise import Generator, chacha20_words_reference, gaussian_noise_reference
from .table import ParameterTable


def noisy_adamw_step_reference(
    params: ParameterTable,
    summed: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    corrections: Tensor,
    key: Tensor,
    step: Tensor,
    stddev: float,
    divisor: float,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    noise_variance: float | None,
    public: Tensor | None,
    masters: Tensor | None,
    stream: int,
    rounding_stream: int | None,
    generator: Generator,
    summands: int,
) -> None:
    """Do what :func:`securetune_kernels.noisy_adamw_step` does.

    Args:
        params: The parameters.
        summed: ``[P]``, float32 or float64, like all vectors here.
        exp_avg: ``[P]``.
        exp_avg_sq: ``[P]``.
        corrections: ``[2]``: ``1 - beta ** count`` of both moments.
        key: ``[8]``, int32.
        step: One int64.
        stddev: Of the noise.
        divisor: Public constant.
        learning_rate: Step size.
        betas: Decay rates.
        eps: Small constant.
        weight_decay: Decoupled.
        noise_variance: What ``bias_correction="dp"`` takes from the second moment, or None.
        public: ``[P]`` or None.
        masters: ``[P]`` or None.
        stream: Of the noise.
        rounding_stream: Of the rounding, or None.
        generator: Which generator.
        summands: 1 or 4.
    """
    grad = _noisy_mean(summed, key, step, stddev, divisor, public, stream, generator, summands)
    exp_avg.lerp_(grad, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    second = exp_avg_sq / corrections[1]
    if noise_variance is None:
        root = second.sqrt() + eps
    else:
        root = (second - noise_variance).clamp(min=eps**2).sqrt()
    values = _wide(params, masters, summed)
    values = values * (1 - learning_rate * weight_decay)
    values = values - learning_rate * (exp_avg / corrections[0]) / root
    _store(params, masters, values, key, step, rounding_stream)


def noisy_sgd_step_reference(
    params: ParameterTable,
    summed: Tensor,
    momentum_buffer: Tensor | None,
    *,
    key: Tensor,
    step: Tensor,
    stddev: float,
    divisor: float,
    learning_rate: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    public: Tensor | None,
    masters: Tensor | None,
    stream: int,
    rounding_stream: int | None,
    generator: Generator,
    summands: int,
) -> None:
    """Do what :func:`securetune_kernels.noisy_sgd_step` does.

    Args:
        params: The parameters.
        summed: ``[P]``, float32 or float64, like all vectors here.
        momentum_buffer: ``[P]`` or None.
        key: ``[8]``, int32.
        step: One int64.
        stddev: Of the noise.
        divisor: Public constant.
        learning_rate: Step size.
        momentum: Decay rate of the buffer.
        nesterov: Nesterov's momentum.
        weight_decay: L2 penalty.
        public: ``[P]`` or None.
        masters: ``[P]`` or None.
        stream: Of the noise.
        rounding_stream: Of the rounding, or None.
        generator: Which generator.
        summands: 1 or 4.
    """
    grad = _noisy_mean(summed, key, step, stddev, divisor, public, stream, generator, summands)
    values = _wide(params, masters, summed)
    grad = grad + weight_decay * values
    if momentum_buffer is not None:
        momentum_buffer.mul_(momentum).add_(grad)
        grad = grad + momentum * momentum_buffer if nesterov else momentum_buffer
    _store(params, masters, values - learning_rate * grad, key, step, rounding_stream)


def _noisy_mean(
    summed: Tensor,
    key: Tensor,
    step: Tensor,
    stddev: float,
    divisor: float,
    public: Tensor | None,
    stream: int,
    generator: Generator,
    summands: int,
) -> Tensor:
    gaussian_noise_reference(
        summed, key=key, step=step, stddev=stddev, stream=stream, generator=generator, summands=summands
    )
    grad = summed / divisor
    summed.zero_()
    return grad if public is None else grad + public


def _wide(params: ParameterTable, masters: Tensor | None, like: Tensor) -> Tensor:
    if masters is not None:
        return masters.clone()
    return torch.cat([param.flatten() for param in params.params]).to(like.dtype)


def _store(
    params: ParameterTable,
    masters: Tensor | None,
    values: Tensor,
    key: Tensor,
    step: Tensor,
    rounding_stream: int | None,
) -> None:
    rounded = values
    if masters is not None:
        masters.copy_(values)
    elif rounding_stream is not None:
        blocks = torch.arange((len(values) + 7) // 8, device=values.device)
        words = chacha20_words_reference(key, blocks & 0xFFFFFFFF, blocks >> 32, int(step), rounding_stream)
        rounded = round_at_random(values.float(), (words[:, ::2].flatten()[: len(values)] >> 16).int())
    for param, part in zip(params.params, params.views(rounded), strict=True):
        param.copy_(part)


def round_at_random(values: Tensor, random: Tensor) -> Tensor:
    """Round float32 up or down to a bfloat16 number, with the value as expectation.

    Args:
        values: ``[N]``, float32.
        random: ``[N]``, int32: uniform from 0 to 65,535.

    Returns:
        ``[N]``, float32; what is not finite stays as it is.
    """
    bits = values.view(torch.int32)
    rounded = ((bits + random) & -65536).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values)
