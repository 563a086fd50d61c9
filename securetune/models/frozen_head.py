"""Cross-entropy under a frozen output layer, without ever keeping a ``[N, V]`` matrix.

The output layer does not learn, so the only gradient needed is that of the hidden states, and it is known as
soon as the logits are: ``(softmax - target) @ W``, where the target is the one-hot vector, or with label
smoothing ``s`` a share ``1 - s`` of it and ``s / V`` of every token. It is computed in the forward pass,
slice by slice, in one reused buffer. That saves what autograd would keep and read again: logits,
log-probabilities and their gradient, each ``N * V`` numbers. Smoothing needs one more row only: the mean of
the rows of ``W``.
"""

from typing import Any

import torch
from torch import Tensor

# Logits in one slice, 128 MiB in float32: more rows make the products faster (250 against 300 GFLOP/s on two
# cores between 128 and 512 rows of SmolLM2), and memory stays bounded for any vocabulary.
_SLICE_LOGITS = 1 << 25


def frozen_head_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of each target under a frozen linear output layer.

    Guarantees:
        Value and gradient are those of ``cross_entropy(linear(hidden, weight, bias), targets,
        reduction="none", label_smoothing=label_smoothing)`` with logits in float32, up to rounding. Peak
        memory beyond the result is 128 rows of logits.

    Args:
        hidden: ``[N, D]``, any floating dtype: hidden states at the predicting positions.
        weight: ``[V, D]``, same dtype; must not require a gradient.
        bias: ``[V]`` or None; must not require a gradient.
        targets: ``[N]``, int64: token ids.
        label_smoothing: Share of the target spread over all ``V`` tokens, in [0, 1).

    Returns:
        ``[N]``, float32 (float64 for float64 input).

    Raises:
        ValueError: If the output layer requires a gradient, or ``label_smoothing`` is out of range.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}.")
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("the output layer requires a gradient; frozen_head_losses would not give it one.")
    return _FrozenHeadLosses.apply(hidden, weight, bias, targets, label_smoothing)


class _FrozenHeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        label_smoothing: float,
    ) -> Tensor:
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        losses = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
        needs_grad = ctx.needs_input_grad[0]
        grad = torch.empty_like(hidden) if needs_grad else None
        slice_rows = max(1, min(_SLICE_LOGITS // weight.shape[0], len(hidden)))
        buffer = hidden.new_empty(slice_rows, weight.shape[0])
        mean_row = weight.mean(dim=0, dtype=dtype) if label_smoothing else None
        for start in range(0, len(hidden), slice_rows):
            rows = slice(start, start + slice_rows)
            wanted = targets[rows, None]
            logits = torch.mm(hidden[rows], weight.t(), out=buffer[: len(wanted)])
            logits = logits.to(dtype)
            if bias is not None:
                logits += bias
            # one exponential a logit: value and gradient share exp(logit - largest) and its sum
            largest, target_logits = logits.amax(dim=1, keepdim=True), logits.gather(1, wanted)
            exponentials = logits.sub_(largest).exp_()
            total = exponentials.sum(dim=1, keepdim=True)
            if mean_row is not None:
                mean_logits = hidden[rows].to(dtype) @ mean_row[:, None]
                if bias is not None:
                    mean_logits += bias.mean(dtype=dtype)
                target_logits = torch.lerp(target_logits, mean_logits, label_smoothing)
            losses[rows] = (total.log() + largest - target_logits).squeeze(1)
            if grad is not None:
                expected = (exponentials.to(hidden.dtype) @ weight).to(dtype) / total
                target_rows = weight[targets[rows]]
                if mean_row is not None:
                    target_rows = torch.lerp(target_rows.to(dtype), mean_row, label_smoothing)
                grad[rows] = (expected - target_rows).to(hidden.dtype)
        ctx.save_for_backward(*([] if grad is None else [grad]))
        return losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (upstream,) = grad_outputs
        if not ctx.saved_tensors:
            return None, None, None, None, None
        (grad,) = ctx.saved_tensors
        return (grad * upstream[:, None].to(grad.dtype)), None, None, None, None
