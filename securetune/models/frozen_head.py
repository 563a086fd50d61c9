"""Cross-entropy under a frozen output layer, without ever keeping a ``[N, V]`` matrix.

The output layer does not learn, so the only gradient needed is that of the hidden states, and it is known as
soon as the logits are: ``(softmax - target) @ W``, where the target is the one-hot vector, or with label
smoothing ``s`` a share ``1 - s`` of it and ``s / V`` of every token. It is computed in the forward pass,
block by block of the vocabulary, in one reused buffer; the softmax is rescaled as larger logits appear
(Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867). That saves what autograd would keep and read
again: logits, log-probabilities and their gradient, each ``N * V`` numbers. Smoothing needs one more row
only: the mean of the rows of ``W``.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from securetune_kernels import products

# Logits are made in blocks of so many words and rows. On a CPU a block is 8 MiB in float32 and stays in the
# cache between the two products that need it; a GPU needs larger products to fill the chip.
_BLOCK_WORDS = 4096
_BLOCK_ROWS = 512
_BLOCK_ROWS_ON_GPU = 16384


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
        memory beyond the result is one block of logits: 8 MiB in float32 on a CPU, 256 MiB on a GPU.

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
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        most_rows = _BLOCK_ROWS_ON_GPU if hidden.is_cuda else _BLOCK_ROWS
        num_slices = max(1, math.ceil(len(hidden) / most_rows))
        slice_rows = max(1, math.ceil(len(hidden) / num_slices))  # of nearly equal size
        mean_row = weight.mean(dim=0, dtype=dtype) if label_smoothing else None
        for start in range(0, len(hidden), slice_rows):
            part = slice(start, start + slice_rows)
            swept = _sweep_vocabulary(
                hidden[part], weight, bias, targets[part, None], needs_grad=grad is not None
            )
            target_logits = swept.target_logits
            if mean_row is not None:
                mean_logits = hidden[part].to(dtype) @ mean_row[:, None]
                if bias is not None:
                    mean_logits += bias.mean(dtype=dtype)
                target_logits = torch.lerp(target_logits, mean_logits, label_smoothing)
            losses[part] = (swept.log_total - target_logits).squeeze(1)
            if grad is not None:
                target_rows = weight[targets[part]].to(dtype)
                if mean_row is not None:
                    target_rows = torch.lerp(target_rows, mean_row, label_smoothing)
                grad[part] = swept.expected.sub_(target_rows).to(hidden.dtype)
        ctx.save_for_backward(*([] if grad is None else [grad]))
        return losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (upstream,) = grad_outputs
        if not ctx.saved_tensors:
            return None, None, None, None, None
        (grad,) = ctx.saved_tensors
        return (grad * upstream[:, None].to(grad.dtype)), None, None, None, None


class _Swept(NamedTuple):
    log_total: Tensor  # [N, 1]: logarithm of the softmax's denominator
    target_logits: Tensor  # [N, 1]
    expected: Tensor  # [N, D]: mean row of the weight under the softmax


def _sweep_vocabulary(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: Tensor, *, needs_grad: bool
) -> _Swept:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    rows, words = len(hidden), len(weight)
    largest = hidden.new_full((rows, 1), torch.finfo(dtype).min, dtype=dtype)
    total = hidden.new_zeros(rows, 1, dtype=dtype)
    target_logits = hidden.new_zeros(rows, 1, dtype=dtype)
    expected = hidden.new_zeros(hidden.shape, dtype=dtype)
    for start in range(0, words, _BLOCK_WORDS):
        block = weight[start : start + _BLOCK_WORDS]
        size = len(block)
        logits = products.linear(hidden, block).to(dtype)
        if bias is not None:
            logits += bias[start : start + size]
        place = wanted - start
        is_here = (place >= 0) & (place < size)
        target_logits = torch.where(is_here, logits.gather(1, place.clamp(0, size - 1)), target_logits)
        # one exponential a logit: value and gradient share exp(logit - largest) and its sum
        before, largest = largest, torch.maximum(largest, logits.amax(dim=1, keepdim=True))
        shrink = before.sub_(largest).exp_()
        exponentials = logits.sub_(largest).exp_()
        total = total.mul_(shrink).add_(exponentials.sum(dim=1, keepdim=True))
        if needs_grad and dtype == hidden.dtype:
            expected.mul_(shrink).add_(products.linear(exponentials, block.t()))
        elif needs_grad:
            expected.mul_(shrink).add_(exponentials.to(hidden.dtype) @ block)
    expected.div_(total)
    return _Swept(total.log_().add_(largest), target_logits, expected)
