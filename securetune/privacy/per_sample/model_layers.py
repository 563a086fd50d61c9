"""What layers of transformers do beside computing: fill a cache, and checkpoint themselves."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

CACHES = ("past_key_values", "layer_past")  # arguments that a layer leaves out where it checkpoints itself


def is_unused_cache(value: Any, module: nn.Module) -> bool:
    """Tell whether an argument is a cache that a layer only fills, so that it can run again without one.

    Args:
        value: Any argument.
        module: The layer.

    Returns:
        False also for what is no cache.
    """
    from transformers.cache_utils import Cache, EncoderDecoderCache

    if not isinstance(value, Cache):
        return False
    if isinstance(value, EncoderDecoderCache):
        both = (value.self_attention_cache, value.cross_attention_cache)
        return all(is_unused_cache(part, module) for part in both)
    index: Any = getattr(module, "layer_idx", None)
    own: Any = value.layers if index is None else value.layers[index : index + 1]
    states = [state for layer in own for state in getattr(layer, "has_previous_state", {}).values()]
    return not any(states) and not any(getattr(layer, "is_initialized", False) for layer in own)


def checkpointing_of(module: Any) -> Callable[..., Any] | None:
    """Return the function by which a layer checkpoints its own forward, None where it does not.

    Args:
        module: Any module.

    Returns:
        Called with a function and its arguments, as ``torch.utils.checkpoint.checkpoint``.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing and module.training:
        return module._gradient_checkpointing_func  # pyright: ignore[reportReturnType]
    return None


@contextmanager
def without_checkpointing(module: nn.Module) -> Iterator[None]:
    """Keep the layers in a module from checkpointing themselves: their parameters are replaced meanwhile.

    What they would have saved is kept then.

    Args:
        module: The module.

    Yields:
        Nothing.
    """
    layers: list[Any] = [part for part in module.modules() if getattr(part, "gradient_checkpointing", False)]
    try:
        for layer in layers:
            layer.gradient_checkpointing = False
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True
