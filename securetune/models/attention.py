"""Attention in float32 inside a model that computes in bfloat16 on a CPU."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "securetune_cpu"


def use_float32_attention(model: "PreTrainedModel") -> None:
    """Compute the attention of a model in bfloat16, or under autocast to it, in float32.

    On CPUs, torch's fused attention has a slow backward pass in bfloat16: with SmolLM2-135M the time per
    token of forward and backward fell from 1.29 to 0.65 ms when attention alone ran in float32.

    Models that bring their own attention, or whose attention is not torch's fused one, are left as they are.

    Args:
        model: Changed in place.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    if model.config._attn_implementation != "sdpa" or not model._supports_attention_backend:
        return
    AttentionInterface.register(_NAME, _float32_attention)
    # without a mask function of the same name transformers would silently leave out every mask
    AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(_NAME)


def _float32_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    with torch.autocast("cpu", enabled=False):  # which would round them again
        output, _ = sdpa_attention_forward(
            module, query.float(), key.float(), value.float(), attention_mask, **options
        )
    return output.to(query.dtype), None
