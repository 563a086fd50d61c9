"""LoRA layers: both matrices' per-sample gradients, written straight into the flat buffer.

A LoRA layer computes ``y = W x + s B (A x)``. The gradients of ``A`` (``[r, d]``) and ``B`` (``[p, r]``) for
one sample cost the same number of FLOPs as their sum over the batch, so they are written out while the
backward pass runs: no second backward, no summed gradient that nobody reads.

Dimensions: ``B`` samples, ``T`` positions, ``d`` input features, ``p`` output features, ``r`` rank.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from securetune.errors import PrivacyError
from securetune.privacy.per_sample.frozen import FrozenLinearPath, is_ordinary
from securetune.privacy.per_sample.gradients import TrainableParameter, as_3d
from securetune.privacy.per_sample.paths import Path, trains_now
from securetune_kernels import Adapter, lora_per_sample_grads, products

if TYPE_CHECKING:
    from securetune.privacy.per_sample.engine import PerSampleGradients


@dataclass(frozen=True)
class ActiveAdapter:
    """The adapter of a layer that was active when the engine was made.

    Its parts are read anew, since wrappers exchange parameters and users change scales.
    """

    layer: Any
    key: str

    @property
    def a(self) -> nn.Parameter:
        """``[r, d]``, of all experts one after another where the layer wraps experts."""
        return self.layer.lora_A[self.key].weight

    @property
    def b(self) -> nn.Parameter:
        """``[p, r]``, likewise."""
        return self.layer.lora_B[self.key].weight

    @property
    def scaling(self) -> float:
        """What the adapter's output is multiplied by."""
        return float(self.layer.scaling[self.key])

    def is_off(self, name: str) -> bool:
        """Whether the layer runs without its adapter, or with merged weights.

        Args:
            name: The layer's name.

        Returns:
            Whether peft's own forward is the one to run.

        Raises:
            PrivacyError: If another adapter is active now.
        """
        if self.layer.disable_adapters or self.layer.merged:
            return True
        active = active_adapters(self.layer)
        if active != [self.key]:
            raise trains_now(name, f"the adapters {', '.join(active) or '(none)'} instead of {self.key}")
        return False


class LoraPath(Path):
    """A plain LoRA layer over any frozen layer; peft's own forward runs when the adapter is off or merged."""

    def __init__(self, engine: "PerSampleGradients", name: str, module: Any) -> None:
        super().__init__(engine, name, module)
        (key,) = active_adapters(module)
        self.layer = ActiveAdapter(module, key)
        self._dropout = module.lora_dropout[key]
        self._place_a, self._place_b = self.place(self.layer.a), self.place(self.layer.b)
        if self._place_a is None or self._place_b is None:
            raise PrivacyError(
                f"the adapter of layer {name} is partly frozen. Train both of its matrices, or deactivate it."
            )

    @property
    def parameters(self) -> list[nn.Parameter]:
        """``A`` and ``B``."""
        return [self.layer.a, self.layer.b]

    def row_places(self) -> list[TrainableParameter]:
        """Both."""
        assert self._place_a is not None
        assert self._place_b is not None
        return [self._place_a, self._place_b]

    def run(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the layer; ``x``: ``[B, ..., d]``."""
        if self.layer.is_off(self.name):
            return self._original(x, *args, **kwargs)
        layer, base = self.layer, self.module.base_layer
        dropped = self._dropout(x)
        if _is_plain(base) and dropped is x and not torch.is_autocast_enabled(x.device.type):
            return _LinearWithAdapter.apply(x, layer.a, layer.b, base.weight, base.bias, self)
        return _AddAdapter.apply(base(x, *args, **kwargs), dropped, layer.a, layer.b, self)

    def record(self, x: Tensor, h: Tensor, g: Tensor, g_low: Tensor) -> None:
        """Write ``dA_i = g_low_i^T x_i`` and ``dB_i = s g_i^T h_i``."""
        engine, (place_a, place_b) = self.engine, self.row_places()
        if not engine.wants(self, g):
            return
        x, g = as_3d(engine.by_sample(x, self.name)), as_3d(engine.by_sample(g, self.name))
        shape = (*x.shape[:2], -1)
        (grad_a, grad_b), is_added = engine.rows_to_write(place_a, place_b)
        adapter = Adapter(x, h.view(shape), g, g_low.view(shape), grad_a, grad_b)
        lora_per_sample_grads([adapter], scaling=self.layer.scaling, accumulate=is_added)


class _LinearWithAdapter(torch.autograd.Function):
    """``W x + b + s B (A x)`` over a frozen ``nn.Linear``, the adapter added in place."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None, path: LoraPath
    ) -> Tensor:
        y = products.linear(x, weight, bias)
        a, b = a.to(y.dtype), b.to(y.dtype)
        h = _to_rank(x.reshape(-1, x.shape[-1]), a)  # [B T, r]
        y.view(-1, y.shape[-1]).addmm_(h, b.t(), alpha=path.layer.scaling)
        ctx.save_for_backward(x, h, weight, a, b)
        ctx.path = path
        return y.detach()  # not a view, which no operation in place may follow

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grad_outputs
        x, h, weight, a, b = ctx.saved_tensors
        g2 = g.reshape(-1, g.shape[-1])
        g_low = _to_rank(g2, b.t()).mul_(ctx.path.layer.scaling)  # [B T, r]
        ctx.path.record(x, h, g, g_low)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = products.linear(g2, weight.t()).addmm_(g_low, a).view(x.shape)
        return dx, None, None, None, None, None


class _AddAdapter(torch.autograd.Function):
    """Add ``s B (A x)`` to the output of any other frozen layer (``Conv1D``, quantised), or with dropout."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, path: LoraPath) -> Tensor:
        a, b = a.to(y.dtype), b.to(y.dtype)
        h = _to_rank(x.to(y.dtype).reshape(-1, x.shape[-1]), a)
        ctx.save_for_backward(x, h, a, b)
        ctx.path = path
        return y + (h @ b.t()).mul_(path.layer.scaling).view(y.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grad_outputs
        x, h, a, b = ctx.saved_tensors
        g_low = _to_rank(g.reshape(-1, g.shape[-1]), b.t()).mul_(ctx.path.layer.scaling)
        ctx.path.record(x, h, g, g_low)
        dx = (g_low @ a).view(x.shape).to(x.dtype) if ctx.needs_input_grad[1] else None
        return g, dx, None, None, None


def _is_plain(base: nn.Module) -> bool:
    own = base.__dict__.get("forward")
    return (
        type(base) is nn.Linear
        and (own is None or isinstance(getattr(own, "__self__", None), FrozenLinearPath))
        and is_ordinary(base.weight)
    )


def _to_rank(x: Tensor, w: Tensor) -> Tensor:
    """Compute ``x w^T``; ``x``: ``[N, d]``, ``w``: ``[r, d]``.

    Transposed on CPUs, where few rows are up to twice as fast as few columns.
    """
    if x.device.type == "cpu":
        return (w @ x.t()).t()
    return x @ w.t()


def is_plain_lora(name: str, module: nn.Module) -> bool:
    """Whether a module is a LoRA layer that :class:`LoraPath` computes exactly as peft does.

    Args:
        name: The module's name.
        module: Any module.

    Returns:
        False for DoRA and other variants, LoRA on embeddings and convolutions, and LoRA with a bias.

    Raises:
        PrivacyError: If several adapters are active at once.
    """
    from peft.tuners.lora.layer import LoraLayer as PeftLoraLayer

    if not isinstance(module, PeftLoraLayer):
        return False
    adapters = active_adapters(module)
    if len(adapters) > 1:
        raise PrivacyError(
            f"layer {name} has {len(adapters)} active adapters ({', '.join(adapters)}); activate exactly one."
        )
    if not adapters or adapters[0] in getattr(module, "lora_variant", {}):
        return False
    a, b = module.lora_A[adapters[0]], module.lora_B[adapters[0]]
    if not isinstance(a, nn.Module):  # AdaLoRA's are no layers
        return False
    is_trained = a.weight.requires_grad or b.weight.requires_grad
    return bool(is_trained) and isinstance(a, nn.Linear) and b.bias is None


def active_adapters(module: Any) -> list[str]:
    """Return the names of a layer's adapters that are active, of those that it has."""
    return [key for key in module.active_adapters if key in module.lora_A]
