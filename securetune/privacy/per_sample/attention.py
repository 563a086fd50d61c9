"""torch's attention layer, whatever its ``batch_first``, differentiated sample by sample.

Dimensions: ``B`` samples, ``T`` and ``S`` positions, ``H`` heads, ``d`` features.
"""

from typing import Any

from torch import Tensor, nn

from securetune.privacy.per_sample.functional import SequencePath


class AttentionPath(SequencePath):
    """``nn.MultiheadAttention``, with its dropout and any mask."""

    def run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Any:
        """Run the layer.

        Args:
            query: ``[B, T, d]``, or ``[T, B, d]`` where the layer is not ``batch_first``.
            key: ``[B, S, d]`` or ``[S, B, d]``.
            value: As ``key``.
            key_padding_mask: ``[B, S]``.
            need_weights: Whether to return the attention's weights too.
            attn_mask: ``[T, S]``, the same for all samples, or ``[B H, T, S]``.
            average_attn_weights: Whether the weights are averaged over the heads.
            is_causal: As torch's: a hint that ``attn_mask`` is causal.

        Returns:
            The output, laid out as ``query``, and the weights ``[B, T, S]``, ``[B, H, T, S]`` or None.
        """
        if query.ndim != 3:
            raise self._not_splittable(f"its input has shape {list(query.shape)}, without a batch dimension")
        is_swapped = not self.module.batch_first
        if is_swapped:
            query, key, value = self._swap(query, key, value)
        if attn_mask is not None:
            is_alike = attn_mask.ndim == 2
            attn_mask = attn_mask[None] if is_alike else attn_mask.unflatten(0, (len(query), -1))
        y, weights = super().run(
            query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )
        return y.transpose(0, 1) if is_swapped else y, weights

    def _forward(self, query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Any:
        """Run the layer on ``[B, T, d]``, with a mask of ``[1, T, S]`` or ``[B, H, T, S]``."""
        key_padding_mask, need_weights, attn_mask, *others = options
        if attn_mask is not None:
            attn_mask = attn_mask.squeeze(0) if attn_mask.ndim == 3 else attn_mask.flatten(0, 1)
        is_swapped = not self.module.batch_first
        if is_swapped:
            query, key, value = (part.transpose(0, 1) for part in (query, key, value))
        y, weights = self._original(query, key, value, key_padding_mask, need_weights, attn_mask, *others)
        return y.transpose(0, 1) if is_swapped else y, weights


def attention_path(engine: Any, name: str, module: nn.Module) -> AttentionPath | None:
    """Return the path of torch's attention layer, None for any other module.

    Args:
        engine: Who will record.
        name: The module's name.
        module: A module with trainable parameters.

    Returns:
        The path, not yet attached. None also for a subclass with a forward of its own.
    """
    if not isinstance(module, nn.MultiheadAttention) or "forward" in module.__dict__:
        return None
    is_known = type(module).forward is nn.MultiheadAttention.forward
    trains = any(parameter.requires_grad for parameter in module.parameters())
    return AttentionPath(engine, name, module) if is_known and trains else None
