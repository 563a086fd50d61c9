"""LayerNorm and RMSNorm: scale and shift by rows; frozen RMSNorm in fewer sweeps than autograd takes."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from securetune.privacy.per_sample.gradients import TrainableParameter, as_3d
from securetune.privacy.per_sample.layout import whole_shape
from securetune.privacy.per_sample.paths import (
    Path,
    detached,
    record_sums,
    recorded,
    without_frozen,
)
from securetune_kernels import Normalized, per_sample_sums

if TYPE_CHECKING:
    from securetune.privacy.per_sample.engine import PerSampleGradients


class LayerNormPath(Path):
    """``nn.LayerNorm``: the gradients of its weight and bias, written out."""

    def row_places(self) -> list[TrainableParameter]:
        """Weight and bias."""
        return without_frozen([self.place(self.module.weight), self.place(self.module.bias)])

    def run(self, x: Tensor) -> Tensor:
        """Run the layer; ``x``: ``[B, ..., *normalized_shape]``."""
        module = self.module
        weight, bias = self.place(module.weight), self.place(module.bias)
        shape = module.normalized_shape
        y = functional.layer_norm(x, shape, detached(module.weight), detached(module.bias), module.eps)

        def record(g: Tensor, x: Tensor) -> None:
            if weight is not None:
                normalized = functional.layer_norm(x.to(self.engine.compute_dtype), shape, eps=module.eps)
                record_sums(self, weight, normalized.mul_(g))
            if bias is not None:
                record_sums(self, bias, g)

        return recorded(self, y, record, x)


class RmsNormPath(Path):
    """``nn.RMSNorm`` and its equals in transformers, trainable or frozen.

    Args:
        engine: Who records.
        name: The module's name in the model.
        module: The module.
        eps: Added to the mean square; None for torch's choice.
        keeps_dtype: Whether the output has the input's dtype, else that of its product with the weight.
    """

    def __init__(
        self,
        engine: "PerSampleGradients",
        name: str,
        module: Any,
        eps: float | None,
        *,
        keeps_dtype: bool,
    ) -> None:
        super().__init__(engine, name, module)
        self._eps, self._keeps_dtype = eps, keeps_dtype

    def row_places(self) -> list[TrainableParameter]:
        """The weight, if it trains."""
        return without_frozen([self.place(self.module.weight)])

    def run(self, x: Tensor) -> Tensor:
        """Run the layer; ``x``: ``[B, ..., d]``."""
        if not x.requires_grad and not self.parameters:
            return self._original(x)
        device = x.device.type
        if type(self.module) is nn.RMSNorm and device != "cpu" and torch.is_autocast_enabled(device):
            x = x.float()  # as torch's autocast does
        with torch.autocast(device, enabled=False):
            return _RmsNorm.apply(x, self.module.weight, self, self._eps, self._keeps_dtype)


class _RmsNorm(torch.autograd.Function):
    """``x / rms(x) * w``, in float32 as torch and transformers compute it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, path: RmsNormPath, eps: float | None, keeps_dtype: bool
    ) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_square = torch.linalg.vecdot(wide, wide).div_(x.shape[-1]).unsqueeze_(-1)
        scale = mean_square.add_(torch.finfo(wide.dtype).eps if eps is None else eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        ctx.path = path
        normalized = wide * scale
        if x.dtype == normalized.dtype == weight.dtype:
            return normalized.mul_(weight)
        if keeps_dtype:
            return (normalized * weight).to(x.dtype)
        return normalized.to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grad_outputs
        x, weight, scale = ctx.saved_tensors
        path: RmsNormPath = ctx.path
        wide, g_wide = x.to(scale.dtype), g.to(scale.dtype)
        if ctx.needs_input_grad[1]:
            _record_scale(path, g_wide, wide, scale)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        weighted = g_wide * weight
        dots = torch.linalg.vecdot(weighted, wide).unsqueeze_(-1)
        inward = dots.mul_(scale).mul_(scale).div_(-x.shape[-1])  # [..., 1]
        dx = weighted.addcmul_(wide, inward).mul_(scale)
        return dx.to(x.dtype), None, None, None, None


def _record_scale(path: RmsNormPath, g: Tensor, x: Tensor, scale: Tensor) -> None:
    engine = path.engine
    if not engine.wants(path, g):
        return
    place = engine.place_of(path.module.weight)
    assert place is not None
    g, x, scale = (as_3d(engine.by_sample(part, path.name)) for part in (g, x, scale))
    (rows,), is_added = engine.rows_to_write(place)
    per_sample_sums(g, rows, normalized=Normalized(x, scale[..., 0]), accumulate=is_added)


def norm_path(engine: "PerSampleGradients", name: str, module: nn.Module) -> Path | None:
    """Return a norm layer's path, None where it is no known norm or nothing is gained.

    A class of another library counts as RMSNorm when its output equals the formula on random input: names do
    not tell (Gemma's multiplies by ``1 + w``).

    Args:
        engine: Who will record.
        name: The module's name.
        module: Any module.

    Returns:
        The path, not yet attached.
    """
    trains = any(p.requires_grad for p in module._parameters.values() if p is not None)
    if type(module) is nn.LayerNorm:
        return LayerNormPath(engine, name, module) if trains else None
    if type(module) is nn.RMSNorm:
        is_plain = len(module.normalized_shape) == 1 and module.weight is not None
        return RmsNormPath(engine, name, module, module.eps, keeps_dtype=True) if is_plain else None
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if type(module).__name__.endswith("RMSNorm") and isinstance(eps, float) and _is_rms_norm(module, eps):
        return RmsNormPath(engine, name, module, eps, keeps_dtype=_keeps_dtype(module))
    return None


def _keeps_dtype(module: Any) -> bool:
    weight = torch.ones(whole_shape(module.weight))
    return _forward(module, weight, torch.ones(1, len(weight), dtype=torch.bfloat16)).dtype == torch.bfloat16


def _is_rms_norm(module: Any, eps: float) -> bool:
    own = dict(module.named_parameters())
    if list(own) != ["weight"] or own["weight"].device.type == "meta" or isinstance(own["weight"], DTensor):
        return False
    shape, dtype = whole_shape(own["weight"]), own["weight"].dtype
    if len(shape) != 1:
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 3, *shape, generator=generator), torch.randn(shape, generator=generator)
    x, weight = (x * torch.tensor([1e-3, 1.0])[:, None, None]).to(dtype), weight.to(dtype)
    try:
        actual = _forward(module, weight, x)
    except (TypeError, RuntimeError):  # takes other arguments: some other layer
        return False
    wide = x.to(torch.promote_types(dtype, torch.float32))
    expected = (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).to(dtype) * weight
    tolerance = 4 * torch.finfo(dtype).eps
    return isinstance(actual, Tensor) and torch.allclose(
        actual.to(wide.dtype), expected.to(wide.dtype), rtol=tolerance, atol=0.0
    )


@torch.no_grad()
def _forward(module: Any, weight: Tensor, x: Tensor) -> Any:
    """Run a module's forward on a weight in the place of its own, which may be sharded, and without hooks."""
    other: Any = object.__new__(type(module))
    other.__dict__ = module.__dict__ | {"_parameters": {"weight": weight}}
    return type(module).forward(other, x)
