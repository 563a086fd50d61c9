"""Convolutions, GroupNorm and InstanceNorm: a convolution is a dense layer over its unfolded windows.

Dimensions: ``N`` rows (samples, or samples times frames), ``C`` input channels, ``O`` output channels, ``L``
    output positions, ``K`` entries of one window of one channel.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from securetune.errors import PrivacyError
from securetune.privacy.per_sample.gradients import TrainableParameter
from securetune.privacy.per_sample.paths import Path, detached, record_sums, recorded, without_frozen

if TYPE_CHECKING:
    from securetune.privacy.per_sample.engine import PerSampleGradients

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


class ConvPath(Path):
    """``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``: weight by factors, of several groups by rows."""

    def row_places(self) -> list[TrainableParameter]:
        """The bias; with groups the weight too, whose factors would be larger than itself."""
        weight = self.module.weight if self.module.groups > 1 else None
        return without_frozen([self.place(weight), self.place(self.module.bias)])

    def run(self, x: Tensor) -> Tensor:
        """Run the layer; ``x``: ``[N, C, ...]``."""
        module = self.module
        weight, bias = self.place(module.weight), self.place(module.bias)
        if x.ndim != 2 + len(module.kernel_size):
            raise _not_batched(self, x, 2 + len(module.kernel_size))
        y = module._conv_forward(x, module.weight.detach(), detached(module.bias))

        def record(g: Tensor, *kept: Tensor) -> None:
            g = g.flatten(2).transpose(1, 2)  # [N, L, O]
            if weight is not None:
                self._record_weight(weight, _windows(module, kept[0]), g)
            if bias is not None:
                record_sums(self, bias, g)

        # under autocast the layer computed with the output's dtype
        return recorded(self, y, record, *([] if weight is None else [x.to(y.dtype)]))

    def _record_weight(self, weight: TrainableParameter, windows: Tensor, g: Tensor) -> None:
        """Record the weight; ``windows``: ``[N, L, C, K]``, ``g``: ``[N, L, O]``."""
        groups, engine = self.module.groups, self.engine
        if groups == 1:
            engine.record_dense(weight, windows.flatten(2), g, self.name)
            return
        dtype = engine.compute_dtype
        a = windows.unflatten(2, (groups, -1)).flatten(3).to(dtype)  # [N, L, groups, C K / groups]
        b = g.unflatten(2, (groups, -1)).to(dtype)
        products = torch.einsum("nlgo,nlgi->ngoi", b, a)
        by_sample = engine.by_sample(products, self.name)
        summed = by_sample.reshape(by_sample.shape[0], -1, *products.shape[1:]).sum(1)
        engine.record_rows(weight, summed, self.name)


class ChannelNormPath(Path):
    """``nn.GroupNorm``, and ``nn.InstanceNorm1d`` to ``3d``, which are groups of one channel."""

    def row_places(self) -> list[TrainableParameter]:
        """Weight and bias."""
        return without_frozen([self.place(self.module.weight), self.place(self.module.bias)])

    def run(self, x: Tensor) -> Tensor:
        """Run the layer; ``x``: ``[N, C, ...]``."""
        module = self.module
        weight, bias = self.place(module.weight), self.place(module.bias)
        if isinstance(module, nn.GroupNorm):
            groups = module.num_groups
        else:
            groups = module.num_features
            if x.ndim <= module._get_no_batch_dim():
                raise _not_batched(self, x, module._get_no_batch_dim() + 1)
        y = functional.group_norm(x, groups, detached(module.weight), detached(module.bias), module.eps)

        def record(g: Tensor, x: Tensor) -> None:
            dtype = self.engine.compute_dtype
            if weight is not None:
                normalized = functional.group_norm(x.to(dtype), groups, eps=module.eps)
                self._record_sums(weight, g.to(dtype) * normalized)
            if bias is not None:
                self._record_sums(bias, g.to(dtype))

        return recorded(self, y, record, x)

    def _record_sums(self, place: TrainableParameter, products: Tensor) -> None:
        """Record ``[N, C, ...]``, summed over everything but the samples and the channels."""
        channels = products.unsqueeze(2).flatten(2).sum(2)  # [N, C]
        record_sums(self, place, channels)


def conv_path(engine: "PerSampleGradients", name: str, module: nn.Module) -> Path | None:
    """Return the path of a convolution or a norm over channels, None for any other module.

    Args:
        engine: Who will record.
        name: The module's name.
        module: A module with a trainable parameter of its own.

    Returns:
        The path, not yet attached. None also for a subclass with a forward of its own.
    """
    kind = type(module)
    if isinstance(module, _CONVOLUTIONS) and any(kind.forward is known.forward for known in _CONVOLUTIONS):
        return ConvPath(engine, name, module)
    if isinstance(module, nn.GroupNorm) and kind.forward is nn.GroupNorm.forward:
        return ChannelNormPath(engine, name, module)
    if isinstance(module, _INSTANCE_NORMS) and kind.forward is nn.InstanceNorm1d.forward:
        return ChannelNormPath(engine, name, module)
    return None


def _windows(module: Any, x: Tensor) -> Tensor:
    """Unfold ``[N, C, ...]`` into what each output position sees: ``[N, L, C, K]``."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padding = module._reversed_padding_repeated_twice
    x = functional.pad(x, padding, mode=mode) if any(padding) else x
    size = len(module.kernel_size)
    for dim in range(size):
        spread = module.dilation[dim] * (module.kernel_size[dim] - 1) + 1
        # the window's entries become a new last dimension
        x = x.unfold(2 + dim, spread, module.stride[dim])[..., :: module.dilation[dim]]
    positions = range(2, 2 + size)
    x = x.permute(0, *positions, 1, *range(2 + size, 2 + 2 * size))  # [N, positions, C, window]
    return x.reshape(
        x.shape[0], math.prod(x.shape[1 : 1 + size]), x.shape[1 + size], math.prod(module.kernel_size)
    )


def _not_batched(path: Path, x: Tensor, dims: int) -> PrivacyError:
    return PrivacyError(
        f"layer {path.name} ({type(path.module).__name__}) got an input of shape {tuple(x.shape)}, which has "
        f"no batch dimension. Give it {dims} dimensions, one row per sample."
    )
