"""Per-sample gradient clipping fused with the sum over the batch, the inner step of DP-SGD."""

import torch
from torch import Tensor

from .._backend import NAMESPACE, Backend, resolve_backend
from .._linear.inputs import refuse_overlap
from .reference import clip_and_accumulate_reference
from .torch_path import clip_and_accumulate_torch

__all__ = ["clip_and_accumulate", "clip_and_accumulate_reference"]

GRAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A smaller threshold would put clipped entries among float32's subnormal numbers, where rounding adds length.
SMALLEST_MAX_GRAD_NORM = 1e-30


@torch.no_grad()
def clip_and_accumulate(
    per_sample_grads: Tensor,
    accumulator: Tensor,
    max_grad_norm: float,
    *,
    valid: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Scale each sample's gradient to L2 norm at most ``max_grad_norm`` and add them to ``accumulator``.

    The clipping step of Algorithm 1 (before the noise) in Abadi et al. 2016, https://arxiv.org/abs/1607.00133:
    ``accumulator += sum_i min(1, C / ||g_i||) g_i``, computed in float32 whatever the gradients' dtype. The
    gradients are read twice: once for the norms, once for the sum.

    Guarantees:
        Adding or removing one sample changes ``accumulator`` by at most ``max_grad_norm`` in L2 norm,
        up to float32 rounding.
        A sample with a NaN or infinite gradient contributes exactly zero, and so does a sample whose norm
        does not fit into float32 or is more than about 1e37 times ``max_grad_norm``. Any other finite
        sample is clipped as promised, even where its squares overflow or vanish in float32.
        A sample that is not ``valid`` contributes exactly zero, whatever it holds.
        The same call on the same machine gives the same bits; no atomic additions.

    Args:
        per_sample_grads: ``[B, P]``, float32, bfloat16 or float16: one flattened gradient per sample, any
            strides.
        accumulator: ``[P]``, float32, on the same device: added to in place.
        max_grad_norm: Clipping threshold ``C`` >= 1e-30, in units of the gradient's L2 norm. ``math.inf``
            sums without clipping.
        valid: ``[B]``, bool: which rows are samples, the others are padding. ``None`` means all.
        backend: ``"triton"``, ``"torch"`` or ``"auto"`` (see ``resolve_backend``).

    Returns:
        ``norms``: ``[B]``, float32, before clipping; not finite where the gradient is not, zero where not
        ``valid``.

    Raises:
        TypeError: If a dtype is not among those above.
        ValueError: If a shape, a device or ``max_grad_norm`` does not fit, or ``accumulator`` overlaps
            itself.
        RuntimeError: If ``backend="triton"`` cannot run here.
    """
    if torch.compiler.is_compiling():
        return _in_a_graph(per_sample_grads, accumulator, max_grad_norm, valid, backend)
    _check_arguments(per_sample_grads, accumulator, max_grad_norm, valid)
    if per_sample_grads.numel() == 0:
        return torch.zeros(per_sample_grads.shape[0], device=per_sample_grads.device, dtype=torch.float32)
    if resolve_backend(backend, per_sample_grads, op="clip_and_accumulate") == "torch":
        return clip_and_accumulate_torch(per_sample_grads, accumulator, max_grad_norm, valid=valid)
    from .triton_kernels import clip_and_accumulate_triton  # triton is optional: imported on first use

    return clip_and_accumulate_triton(per_sample_grads, accumulator, max_grad_norm, valid=valid)


@torch.library.custom_op(f"{NAMESPACE}::clip_and_accumulate", mutates_args={"accumulator"})
def _in_a_graph(
    per_sample_grads: Tensor, accumulator: Tensor, max_grad_norm: float, valid: Tensor | None, backend: str
) -> Tensor:
    return clip_and_accumulate(per_sample_grads, accumulator, max_grad_norm, valid=valid, backend=backend)  # pyright: ignore[reportArgumentType]


@_in_a_graph.register_fake
def _(per_sample_grads: Tensor, *_: object) -> Tensor:
    return per_sample_grads.new_empty(len(per_sample_grads), dtype=torch.float32)


def _check_arguments(
    per_sample_grads: Tensor, accumulator: Tensor, max_grad_norm: float, valid: Tensor | None
) -> None:
    grads_shape, accumulator_shape = tuple(per_sample_grads.shape), tuple(accumulator.shape)
    if per_sample_grads.ndim != 2:
        raise ValueError(f"per_sample_grads must be 2-D [B, P], got shape {grads_shape}.")
    if per_sample_grads.dtype not in GRAD_DTYPES:
        raise TypeError(
            f"per_sample_grads must be float32, bfloat16 or float16, got {per_sample_grads.dtype}. "
            "For float64 use clip_and_accumulate_reference."
        )
    if accumulator.dtype != torch.float32:
        raise TypeError(
            f"accumulator must be float32, so that small gradients add up, got {accumulator.dtype}."
        )
    if accumulator_shape != (grads_shape[1],):
        raise ValueError(
            f"accumulator must have shape [P] = ({grads_shape[1]},) to match per_sample_grads {grads_shape}, "
            f"got {accumulator_shape}."
        )
    if accumulator.device != per_sample_grads.device:
        raise ValueError(
            f"accumulator is on {accumulator.device} and per_sample_grads on {per_sample_grads.device}; "
            "both must be on one device."
        )
    refuse_overlap("accumulator", accumulator)
    if not max_grad_norm >= SMALLEST_MAX_GRAD_NORM:
        raise ValueError(
            f"max_grad_norm must be > 0 (at least {SMALLEST_MAX_GRAD_NORM}), got {max_grad_norm}."
        )
    if valid is None:
        return
    if valid.dtype != torch.bool:
        raise TypeError(f"valid must be bool, got {valid.dtype}.")
    if tuple(valid.shape) != (grads_shape[0],):
        raise ValueError(
            f"valid must have shape [B] = ({grads_shape[0]},) to match per_sample_grads {grads_shape}, "
            f"got {tuple(valid.shape)}."
        )
    if valid.device != per_sample_grads.device:
        raise ValueError(
            f"valid is on {valid.device} and per_sample_grads on {per_sample_grads.device}; "
            "both must be on one device."
        )
