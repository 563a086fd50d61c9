"""Frozen linear layers on CPUs, whose products are faster than torch's own."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from securetune.privacy.per_sample.paths import Path
from securetune_kernels import products

if TYPE_CHECKING:
    from securetune.privacy.per_sample.engine import PerSampleGradients


class FrozenLinearPath(Path):
    """A frozen ``nn.Linear`` on a CPU, whose products are faster than torch's own."""

    def run(self, x: Tensor) -> Tensor:
        """Run the layer; ``x``: ``[..., d]``."""
        module = self.module
        is_faster = is_ordinary(module.weight) and not torch.is_autocast_enabled(x.device.type)
        if not is_faster or _learns(module):
            return self._original(x)
        return _FrozenLinear.apply(x, module.weight, module.bias)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return products.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return _FrozenLinear.apply(grad_outputs[0], weight.t(), None), None, None


def frozen_linear_path(engine: "PerSampleGradients", name: str, module: nn.Module) -> Path | None:
    """Return the path of a frozen linear layer, None where it is no such layer or nothing is gained.

    Args:
        engine: Whose passes run through the layer.
        name: The module's name.
        module: Any module.

    Returns:
        The path, not yet attached.
    """
    if type(module) is not nn.Linear or "forward" in module.__dict__ or _learns(module):
        return None
    weight = module.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return None
    return FrozenLinearPath(engine, name, module) if products.prefers_onednn() else None


def is_ordinary(weight: Tensor) -> bool:
    """Whether a weight is a tensor of numbers, no subclass that stores them quantised (torchao's)."""
    return type(weight) in (Tensor, nn.Parameter)


def _learns(module: Any) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
