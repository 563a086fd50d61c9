"""A model's sizes and FLOPs, without the model."""

from __future__ import annotations

import math
from typing import Any, NamedTuple


class Parameter(NamedTuple):
    """A parameter of ``rows`` times ``width`` entries; ``place`` is its number in the model."""

    name: str
    place: int
    rows: int
    width: int
    item_bytes: int
    trainable: bool

    @property
    def entries(self) -> int:
        """How many numbers it holds."""
        return self.rows * self.width

    def shard(self, size: int) -> int:
        """Entries of the largest part where rows are split over ``size`` processes."""
        return -(-self.rows // size) * self.width


class Shape(NamedTuple):
    """A model and the length of its samples.

    Attributes:
        name: For tables.
        units: Parameters that FSDP2 gathers together: each block's, then all others.
        forward: FLOPs of a sample's forward pass.
        backward: FLOPs of the gradients of its activations.
        weights: FLOPs of the gradients of what is trained, the same for a clipped sum.
        norms: FLOPs that only clipping needs, by the cheaper of the kernels' two ways.
    """

    name: str
    units: tuple[tuple[Parameter, ...], ...]
    forward: float
    backward: float
    weights: float
    norms: float

    @property
    def parameters(self) -> list[Parameter]:
        """All parameters, frozen or not."""
        return [parameter for unit in self.units for parameter in unit]

    @property
    def trainable(self) -> list[Parameter]:
        """What is trained, in canonical order."""
        trained = [parameter for parameter in self.parameters if parameter.trainable]
        return sorted(trained, key=lambda parameter: parameter.place)

    def flops(self, *, private: bool) -> float:
        """Return the FLOPs of a sample."""
        return self.forward + self.backward + self.weights + (self.norms if private else 0.0)


def shape_of(model: Any, name: str, tokens: int) -> Shape:
    """Read sizes and FLOPs from a Llama-shaped model, which may be on the meta device.

    Attention counts whole squares, as a kernel without causal skipping computes them.
    """
    from torch import nn

    from securetune.training.strategy import blocks_of

    blocks = blocks_of(model)
    block_of = {id(p): number for number, block in enumerate(blocks) for p in block.parameters()}
    units: list[list[Parameter]] = [[] for _ in range(len(blocks) + 1)]
    for place, (key, p) in enumerate(model.named_parameters()):
        width = math.prod(p.shape[1:])
        units[block_of.get(id(p), -1)].append(
            Parameter(key, place, p.shape[0], width, p.element_size(), p.requires_grad)
        )
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    products = sum(2.0 * tokens * layer.weight.numel() for layer in linear)
    trained = [layer for layer in linear if layer.weight.requires_grad]
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 4.0 * tokens**2 * head * config.num_attention_heads * config.num_hidden_layers
    is_lora = any(".lora_" in parameter.name for unit in units for parameter in unit)
    norms = 0.0
    if not is_lora:  # of adapters every sample's gradient is written down, and its norm read from there
        for layer in trained:
            outputs, inputs = layer.weight.shape
            norms += min(2.0 * tokens * inputs * outputs, float(tokens**2 * (inputs + outputs)))
    return Shape(
        name,
        tuple(tuple(unit) for unit in units),
        forward=products + attention,
        backward=products + 2 * attention,
        weights=sum(2.0 * tokens * layer.weight.numel() for layer in trained),
        norms=norms,
    )
