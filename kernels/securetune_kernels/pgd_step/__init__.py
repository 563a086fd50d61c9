"""One step of projected gradient ascent on embeddings: move, project to the ball, keep to the mask."""

import math
from typing import get_args

import torch
from torch import Tensor

from .._backend import NAMESPACE, Backend, resolve_backend
from .reference import Direction, Norm, pgd_step_reference
from .torch_path import pgd_step_torch

__all__ = ["pgd_step", "pgd_step_reference"]

DELTA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Lengths outside this range would leave float32's when they are squared and compared with each other.
SMALLEST_LENGTH, LARGEST_LENGTH = 1e-9, 1e9
# The Triton kernels hold one token in registers.
MAX_TRITON_EMBEDDING = 16_384


@torch.no_grad()
def pgd_step(
    delta: Tensor,
    grad: Tensor,
    mask: Tensor,
    *,
    step_size: float,
    radius: float,
    norm: Norm,
    direction: Direction,
    backend: Backend = "auto",
) -> Tensor:
    """Move ``delta`` along ``grad`` and project it back to the ball of ``radius``.

    The step of projected gradient descent, Madry et al. 2018, section 2.1,
    https://arxiv.org/abs/1706.06083, uphill.
    A ball has a unit: one token for ``"l2_token"`` and ``"linf"``, one sample for ``"l2_sample"``. All
    arithmetic is float32; ``"l2_token"`` and ``"linf"`` read each element once, ``"l2_sample"`` twice.

    Guarantees:
        The norm of every unit of the result is at most ``radius``, after the cast to ``delta``'s dtype. Where
        rounding to nearest could break that, the unit is rounded toward zero.
        Elements off the mask are exactly zero, and what ``delta`` and ``grad`` hold there changes nothing.
        A unit of the result depends on that unit of ``delta``, ``grad`` and ``mask`` only.
        A unit whose gradient is zero, or somewhere NaN or infinite, takes no step. A unit whose ``delta`` is
        somewhere NaN or infinite becomes zero; with ``"l2_sample"`` in Triton also one that is over 1e18
        times longer than radius and step.
        The same call on the same machine gives the same bits.

    Args:
        delta: ``[B, T, D]``, float32, bfloat16 or float16: the perturbation so far, any strides; not
            written to.
        grad: ``[B, T, D]``, float32, bfloat16 or float16: gradient of each sample's own loss, any strides.
        mask: ``[B, T]``, bool: tokens that may be perturbed.
        step_size: Length of the step, from 1e-9 to 1e9, in units of the embedding: of each entry for
            ``direction="sign"``, of the whole unit, in the norm of the ball, for ``"normalised"``.
        radius: Radius of the ball, from 1e-9 to 1e9, in units of the embedding.
        norm: ``"l2_token"`` bounds the L2 norm of each token, ``"l2_sample"`` that of each sample,
            ``"linf"`` each entry.
        direction: ``"sign"`` of the gradient, or the gradient ``"normalised"`` to length one in the norm of
            the ball.
        backend: ``"triton"``, ``"torch"`` or ``"auto"`` (see ``resolve_backend``).

    Returns:
        The new perturbation: ``[B, T, D]``, ``delta``'s dtype, contiguous.

    Raises:
        TypeError: If a dtype is not among those above.
        ValueError: If a shape, a device, a number or a name does not fit.
        RuntimeError: If ``backend="triton"`` cannot run here.
    """
    if torch.compiler.is_compiling():
        return _in_a_graph(delta, grad, mask, step_size, radius, norm, direction, backend)
    _check_tensors(delta, grad, mask)
    _check_options(step_size, radius, norm, direction)
    if delta.numel() == 0:
        return torch.zeros_like(delta, memory_format=torch.contiguous_format)
    unsupported = None
    if delta.shape[2] > MAX_TRITON_EMBEDDING:
        unsupported = f"the embedding size {delta.shape[2]} is above {MAX_TRITON_EMBEDDING}"
    chosen = resolve_backend(backend, delta, op="pgd_step", unsupported=unsupported)
    if chosen == "torch":
        return pgd_step_torch(
            delta, grad, mask, step_size=step_size, radius=radius, norm=norm, direction=direction
        )
    from .triton_kernels import pgd_step_triton  # triton is optional: imported on first use

    return pgd_step_triton(
        delta, grad, mask, step_size=step_size, radius=radius, norm=norm, direction=direction
    )


@torch.library.custom_op(f"{NAMESPACE}::pgd_step", mutates_args=())
def _in_a_graph(
    delta: Tensor,
    grad: Tensor,
    mask: Tensor,
    step_size: float,
    radius: float,
    norm: str,
    direction: str,
    backend: str,
) -> Tensor:
    options = {"norm": norm, "direction": direction, "backend": backend}
    return pgd_step(delta, grad, mask, step_size=step_size, radius=radius, **options)  # pyright: ignore[reportArgumentType]


@_in_a_graph.register_fake
def _(delta: Tensor, *_: object) -> Tensor:
    return delta.new_empty(delta.shape)


def _check_tensors(delta: Tensor, grad: Tensor, mask: Tensor) -> None:
    shape = tuple(delta.shape)
    if delta.ndim != 3:
        raise ValueError(f"delta must be 3-D [B, T, D], got shape {shape}.")
    for name, tensor in (("delta", delta), ("grad", grad)):
        if tensor.dtype not in DELTA_DTYPES:
            raise TypeError(
                f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}. "
                "For float64 use pgd_step_reference."
            )
    if tuple(grad.shape) != shape:
        raise ValueError(f"grad must have the shape of delta, {shape}, got {tuple(grad.shape)}.")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}.")
    if tuple(mask.shape) != shape[:2]:
        raise ValueError(
            f"mask must have shape [B, T] = {shape[:2]} to match delta {shape}, got {tuple(mask.shape)}."
        )
    for name, tensor in (("grad", grad), ("mask", mask)):
        if tensor.device != delta.device:
            raise ValueError(
                f"{name} is on {tensor.device} and delta on {delta.device}; both must be on one device."
            )


def _check_options(step_size: float, radius: float, norm: str, direction: str) -> None:
    for name, value in (("step_size", step_size), ("radius", radius)):
        if not (math.isfinite(value) and SMALLEST_LENGTH <= value <= LARGEST_LENGTH):
            raise ValueError(
                f"{name} must be a finite number > 0 (from {SMALLEST_LENGTH} to {LARGEST_LENGTH:.0e}), "
                f"got {value}."
            )
    if norm not in get_args(Norm):
        raise ValueError(f"norm must be 'l2_token', 'linf' or 'l2_sample', got {norm!r}.")
    if direction not in get_args(Direction):
        raise ValueError(f"direction must be 'sign' or 'normalised', got {direction!r}.")
