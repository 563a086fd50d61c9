"""Gradient checkpointing of a model's decoder layers, in any mode."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from securetune.errors import ConfigError


def checkpoint_layers(model: nn.Module) -> None:
    """Keep only the inputs of the decoder layers in a forward pass; the backward pass runs each again.

    The layers run as they did: transformers' own switch works in training mode alone, which would turn a
    model's own dropout on and leave attacks, in evaluation mode, without it.

    Args:
        model: The model, plain or with adapters; changed in place.

    Raises:
        ConfigError: If it has no layers that can be run again.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    inner = {id(part) for layer in layers for part in layer.modules() if part is not layer}
    if not layers:
        raise ConfigError(
            f"training.gradient_checkpointing: {type(model).__name__} has no layers that can be run again. "
            "Set it to false, and training.micro_batch_tokens lower if memory runs out."
        )
    for layer in layers:
        if id(layer) not in inner:
            layer.forward = _run_again(layer.forward)


def _run_again(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
