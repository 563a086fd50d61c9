"""The random numbers that a module draws, kept so that it can run again with the same ones."""

import math
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_RANDOM = (torch.rand, torch.rand_like, torch.randn, torch.randn_like, torch.bernoulli)
_RANDOM_IN_PLACE = (Tensor.bernoulli_, Tensor.uniform_, Tensor.normal_, Tensor.exponential_)
_DROPOUTS = (functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d)


class Draws(TorchFunctionMode):
    """Keep the dropout masks and random numbers that are drawn meanwhile, or hand kept ones out again.

    Args:
        kept: What another one drew; None to draw.

    Attributes:
        drawn: What was drawn, in order.
    """

    def __init__(self, kept: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self.drawn: list[Tensor] = []
        self._kept = None if kept is None else iter(kept)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _RANDOM:
            return self._draw(lambda: func(*args, **kwargs))
        if func in _RANDOM_IN_PLACE:
            return args[0].copy_(self._draw(lambda: func(args[0].clone(), *args[1:], **kwargs)))
        if func in _DROPOUTS:
            given = {"p": 0.5, "training": True, "inplace": False}
            given |= dict(zip(("input", "p", "training", "inplace"), args, strict=False)) | kwargs
            x, p = given["input"], given["p"]
            if given["training"] and p > 0:
                mask = self._draw(lambda: func(torch.ones_like(x), p))
                return x.mul_(mask) if given["inplace"] else x * mask
        if func is functional.multi_head_attention_forward:
            with self:
                return _attention_of_torch(*args, **kwargs)
        if func is functional.scaled_dot_product_attention:
            dropout_p = args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)
            if dropout_p > 0:
                with self:
                    return _attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _draw(self, draw: Callable[[], Tensor]) -> Tensor:
        if self._kept is not None:
            return next(self._kept)
        self.drawn.append(draw().detach())
        return self.drawn[-1]


# torch's own, which would otherwise be one call whose dropout can't be seen
_attention_of_torch = FunctionType(
    functional.multi_head_attention_forward.__code__,
    {**vars(functional), "has_torch_function": lambda _: False},
    argdefs=functional.multi_head_attention_forward.__defaults__,
)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Do what ``functional.scaled_dot_product_attention`` does, with a dropout of its own."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (part.repeat_interleave(groups, dim=-3) for part in (key, value))
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        is_bool = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -math.inf) if is_bool else scores + attn_mask
    is_empty = scores.isneginf().all(dim=-1, keepdim=True)  # nothing to attend to
    weights = scores.masked_fill(is_empty, 0.0).softmax(dim=-1).masked_fill(is_empty, 0.0)
    return functional.dropout(weights, dropout_p) @ value
