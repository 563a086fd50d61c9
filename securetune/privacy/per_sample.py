"""Exact per-sample gradients of LoRA adapters in one backward pass.

A LoRA layer computes ``y = W x + s B (A x)``. The gradients of ``A`` (``[r, d]``) and ``B`` (``[p, r]``) for
one sample cost the same number of FLOPs as their sum over the batch, so they are written straight into one
flat ``[B, P]`` buffer while the backward pass runs: no second backward, no hooks on every module, no summed
    gradient that nobody reads.

Dimensions: ``B`` samples, ``T`` positions, ``d`` input features, ``p`` output features, ``r`` rank, ``P``
    trainable parameters.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from securetune.errors import PrivacyError

# Largest relative error allowed between the flat buffer's sum and ordinary autograd, by the model's compute
# dtype: the two add the same products in another order. In bfloat16 roundings of eight bits grow through the
# layers (0.08 on SmolLM2-135M with 30 of them); a wrong scale, sign or missing part differs by about 1.
SELF_CHECK_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}
_CHECK_MATRIX_FACTOR = 3  # a single matrix may differ this many times more
_CHECK_FLOOR = 0.02  # matrices whose gradient is below this share of the whole are compared with that share
_CHECK_SCALE = 0.02  # size of the random B during the check


@dataclass
class _AdapterLayer:
    """One LoRA layer and the place of its two matrices in the flat vector."""

    name: str
    module: Any  # peft.tuners.lora.layer.LoraLayer
    a: nn.Parameter  # [r, d]
    b: nn.Parameter  # [p, r]
    scaling: float
    start: int  # flat index of a[0, 0]; b follows a

    @property
    def split(self) -> int:
        return self.start + self.a.numel()

    @property
    def stop(self) -> int:
        return self.split + self.b.numel()


class PerSampleGradients:
    """Write every sample's LoRA gradient into one flat row, in one backward pass.

    The adapter's matrices become views of one flat vector (:attr:`flat_params`), so an optimizer updates one
    tensor.

    Guarantees:
        Row ``i`` of :meth:`backward` is the gradient of ``losses[i]`` alone, as ordinary autograd computes it
        for a batch of one, up to rounding. A trainable parameter that is not part of a LoRA layer is refused,
        never skipped. Passes outside :meth:`backward` (an attack's, an evaluation's) leave the buffer and
        every ``.grad`` untouched.

    Args:
        model: A peft model with LoRA adapters, already on its device. Adapter weights must be float32 or
            float64.

    Raises:
        PrivacyError: If a trainable parameter has no exact per-sample path; the message names it and the
            remedy.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers = _find_adapter_layers(model)
        _refuse_uncovered_parameters(model, self.layers)
        first = self.layers[0].a
        if first.dtype not in (torch.float32, torch.float64):
            raise PrivacyError(
                f"adapter weights must be float32, got {first.dtype}. Keep the base model in {first.dtype} "
                "and create the "
                "adapters with autocast_adapter_dtype=True (peft's default)."
            )
        self.num_params = self.layers[-1].stop
        self.flat_params = nn.Parameter(torch.empty(self.num_params, dtype=first.dtype, device=first.device))
        self._buffer = torch.empty(
            0, dtype=first.dtype, device=first.device
        )  # [B, P] of the running backward
        self._rows = 0
        self._written: set[str] = set()
        self._recording = False
        with torch.no_grad():
            for layer in self.layers:
                self.flat_params[layer.start : layer.split] = layer.a.flatten()
                self.flat_params[layer.split : layer.stop] = layer.b.flatten()
                layer.a.data = self.flat_params.data[layer.start : layer.split].view_as(layer.a)
                layer.b.data = self.flat_params.data[layer.split : layer.stop].view_as(layer.b)
        for layer in self.layers:
            layer.module.forward = _AdapterForward(self, layer, layer.module.forward)

    def detach(self) -> None:
        """Give the layers their own forward back; parameters stay views of :attr:`flat_params`."""
        for layer in self.layers:
            if isinstance(layer.module.forward, _AdapterForward):
                del layer.module.forward

    def parameter_names(self) -> Iterator[tuple[str, torch.Size]]:
        """Yield the name and shape of every trainable matrix, in flat order."""
        for layer in self.layers:
            yield f"{layer.name}.lora_A", layer.a.shape
            yield f"{layer.name}.lora_B", layer.b.shape

    def backward(self, losses: Tensor) -> Tensor:
        """Differentiate each sample's loss and return the gradients as rows.

        Args:
            losses: ``[B]``, one loss per sample, still attached to its graph. Losses must not be coupled: row
                ``i`` may depend on sample ``i`` only.

        Returns:
            ``[B, P]``, float32: a view of a buffer that the next call overwrites.

        Raises:
            PrivacyError: If ``losses`` is not one value per sample, or a layer saw another number of samples.
        """
        if losses.ndim != 1:
            raise PrivacyError(
                f"losses must hold one value per sample, shape [B], got shape {tuple(losses.shape)}. A mean "
                "or sum over "
                "the batch mixes samples: use reduction='none' and reduce within each sample only."
            )
        self._rows = losses.shape[0]
        if self._buffer.shape[0] < self._rows:
            self._buffer = self._buffer.new_empty(self._rows, self.num_params)
        self._written.clear()
        if self._rows == 0:
            return self._buffer[:0]
        self._recording = True
        try:
            losses.sum().backward()
        finally:
            self._recording = False
        grads = self._buffer[: self._rows]
        for layer in self.layers:
            if layer.name not in self._written:
                grads[:, layer.start : layer.stop] = 0.0
        return grads

    def check(self, losses_of: Callable[[list[int]], Tensor], batch_size: int) -> float:
        """Compare a small batch with ordinary autograd, matrix by matrix, and with each sample alone.

        Run it on public examples of unequal length. The adapters hold random values meanwhile: a fresh LoRA
        has ``B = 0``, and with it a gradient of ``A`` that is zero whether right or wrong.

        Args:
            losses_of: Called with a list of row indices, returns their losses ``[len(rows)]`` from a fresh
                forward pass without dropout.
            batch_size: Number of rows that ``losses_of`` accepts; at least 1.

        Returns:
            The largest relative difference of the whole gradient.

        Raises:
            PrivacyError: If the accumulated gradient differs from ordinary autograd's, if a sample's gradient
                depends on its batch-mates (a coupled loss), or if no gradient reaches the adapters.
        """
        before = self.flat_params.detach().clone()
        generator = torch.Generator().manual_seed(0)
        try:
            with torch.no_grad():
                for layer in self.layers:
                    random = torch.randn(layer.b.shape, generator=generator, dtype=layer.b.dtype)
                    layer.b.copy_(_CHECK_SCALE * random)
            return self._compare(losses_of, list(range(batch_size)))
        finally:
            with torch.no_grad():
                self.flat_params.copy_(before)

    def _compare(self, losses_of: Callable[[list[int]], Tensor], rows: list[int]) -> float:
        tolerance = SELF_CHECK_TOLERANCE[_compute_dtype(self.model)]
        grads = self.backward(losses_of(rows)).clone()
        with self._ordinary_autograd():
            found = torch.autograd.grad(losses_of(rows).sum(), self._matrices(), allow_unused=True)
        pairs = zip(found, self._matrices(), strict=True)
        expected = [torch.zeros_like(matrix) if grad is None else grad for grad, matrix in pairs]
        whole = torch.cat([grad.flatten() for grad in expected])
        if not whole.norm() > 0:
            raise PrivacyError(
                "self-check: no gradient reaches the adapters, so training would not move them. Check that "
                "the "
                "adapters are active and that the loss depends on them."
            )
        summed = grads.sum(dim=0)
        worst = _relative_difference(summed, whole)
        # A small matrix may be wrong without showing in the whole; its own rounding is larger, though.
        floor = _CHECK_FLOOR * whole.norm()
        start = 0
        for name, shape in self.parameter_names():
            part = slice(start, start + shape.numel())
            start = part.stop
            error = (summed[part] - whole[part]).norm() / (whole[part].norm() + floor)
            if not (worst <= tolerance and error <= _CHECK_MATRIX_FACTOR * tolerance):
                raise PrivacyError(
                    f"self-check: the sum of the per-sample gradients differs from ordinary autograd by "
                    f"{worst:.2e} in the whole and {float(error):.2e} in {name} (allowed {tolerance:.0e} and "
                    f"{_CHECK_MATRIX_FACTOR * tolerance:.0e}). A layer of this model is not supported "
                    "exactly; "
                    "no privacy claim would hold."
                )
        for row in rows if len(rows) > 1 else []:
            alone = self.backward(losses_of([row]))
            coupling = _relative_difference(grads[row : row + 1], alone)
            if not coupling <= tolerance:
                raise PrivacyError(
                    f"self-check: without its batch-mates a sample's gradient changes by {coupling:.2e} "
                    "(allowed "
                    f"{tolerance:.0e}). The loss couples samples (batch normalisation, a token count over "
                    "the "
                    "batch, in-batch negatives)."
                )
            worst = max(worst, coupling)
        return worst

    def _matrices(self) -> list[nn.Parameter]:
        return [matrix for layer in self.layers for matrix in (layer.a, layer.b)]

    @contextlib.contextmanager
    def _ordinary_autograd(self) -> Iterator[None]:
        """Run peft's own forward, whose adapter gradients autograd computes itself."""
        patched = [layer.module.forward for layer in self.layers]
        for layer in self.layers:
            del layer.module.forward
        try:
            yield
        finally:
            for layer, forward in zip(self.layers, patched, strict=True):
                layer.module.forward = forward

    def _record(self, layer: _AdapterLayer, x: Tensor, h: Tensor, g: Tensor, g_low: Tensor) -> None:
        """Write one layer's gradients: ``dA_i = g_low_i^T x_i`` and ``dB_i = s g_i^T h_i``."""
        if x.shape[0] != self._rows:
            raise PrivacyError(
                f"layer {layer.name} saw {x.shape[0]} rows where the batch has {self._rows} samples, so its "
                "gradient can't "
                "be split by sample. Packed rows and routed experts are not supported here."
            )
        rows = self._buffer[: self._rows]
        # Products in the buffer's float32: exact to its rounding, and faster than many small bfloat16
        # products on a CPU.
        x, h, g, g_low = (tensor.to(rows.dtype) for tensor in (x, h, g, g_low))
        grad_a = torch.bmm(g_low.transpose(1, 2), x).flatten(1)
        grad_b = torch.bmm(g.transpose(1, 2), h).flatten(1)
        if layer.name in self._written:  # the module ran more than once in this forward: its gradients add up
            rows[:, layer.start : layer.split] += grad_a
            rows[:, layer.split : layer.stop].add_(grad_b, alpha=layer.scaling)
        else:
            rows[:, layer.start : layer.split] = grad_a
            torch.mul(grad_b, layer.scaling, out=rows[:, layer.split : layer.stop])
            self._written.add(layer.name)


class _AdapterForward:
    """Stands in for a LoRA layer's ``forward``; peft's own runs when the adapter is off or merged."""

    def __init__(self, engine: PerSampleGradients, layer: _AdapterLayer, original: Any) -> None:
        self.engine, self.layer, self.original = engine, layer, original

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        module = self.layer.module
        if module.disable_adapters or module.merged:
            return self.original(x, *args, **kwargs)
        dropout = module.lora_dropout[module.active_adapters[0]]
        x_dropped = dropout(x)
        base = module.base_layer
        if type(base) is nn.Linear and x_dropped is x:
            return _LinearWithAdapter.apply(
                x, self.layer.a, self.layer.b, base.weight, base.bias, self.engine, self.layer
            )
        return _AddAdapter.apply(
            base(x, *args, **kwargs), x_dropped, self.layer.a, self.layer.b, self.engine, self.layer
        )


def _as_3d(x: Tensor) -> Tensor:
    """View ``[B, ..., d]`` as ``[B, T, d]``."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])


class _LinearWithAdapter(torch.autograd.Function):
    """``W x + b + s B (A x)`` over a frozen ``nn.Linear``, the adapter added in place."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        engine: Any,
        layer: Any,
    ) -> Tensor:
        y = functional.linear(x, weight, bias)
        a, b = a.to(y.dtype), b.to(y.dtype)
        x2 = x.to(y.dtype).reshape(-1, x.shape[-1])
        h = x2 @ a.t()  # [B T, r]
        y.view(-1, y.shape[-1]).addmm_(h, b.t(), alpha=layer.scaling)
        ctx.save_for_backward(x, h, weight, a, b)
        ctx.engine, ctx.layer = engine, layer
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grad_outputs
        x, h, weight, a, b = ctx.saved_tensors
        g2 = g.reshape(-1, g.shape[-1])
        g_low = (g2 @ b).mul_(ctx.layer.scaling)  # [B T, r]
        _record_if_asked(ctx, x, h, g, g_low)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (g2 @ weight).addmm_(g_low, a).view(x.shape)
        return dx, None, None, None, None, None, None


class _AddAdapter(torch.autograd.Function):
    """Add ``s B (A x)`` to the output of any other frozen layer (``Conv1D``, quantised), or with dropout."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, engine: Any, layer: Any) -> Tensor:
        a, b = a.to(y.dtype), b.to(y.dtype)
        h = x.to(y.dtype).reshape(-1, x.shape[-1]) @ a.t()
        ctx.save_for_backward(x, h, a, b)
        ctx.engine, ctx.layer = engine, layer
        return y + (h @ b.t()).mul_(layer.scaling).view(y.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grad_outputs
        x, h, a, b = ctx.saved_tensors
        g_low = (g.reshape(-1, g.shape[-1]) @ b).mul_(ctx.layer.scaling)
        _record_if_asked(ctx, x, h, g, g_low)
        dx = (g_low @ a).view(x.shape) if ctx.needs_input_grad[1] else None
        return g, dx, None, None, None, None


def _record_if_asked(ctx: Any, x: Tensor, h: Tensor, g: Tensor, g_low: Tensor) -> None:
    if ctx.engine._recording:
        x3 = _as_3d(x)
        shape = (*x3.shape[:2], -1)
        ctx.engine._record(ctx.layer, x3, h.view(shape), _as_3d(g), g_low.view(shape))


def _find_adapter_layers(model: nn.Module) -> list[_AdapterLayer]:
    from peft.tuners.lora.layer import LoraLayer

    layers: list[_AdapterLayer] = []
    start = 0
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        adapters = [key for key in module.active_adapters if key in module.lora_A]
        if not adapters:
            continue
        if len(adapters) > 1:
            raise PrivacyError(
                f"layer {name} has {len(adapters)} active adapters ({', '.join(adapters)}); activate "
                "exactly one."
            )
        (key,) = adapters
        _refuse_variant(name, module, key)
        a: Any = module.lora_A[key].weight
        b: Any = module.lora_B[key].weight
        layer = _AdapterLayer(name, module, a, b, float(module.scaling[key]), start)
        layers.append(layer)
        start = layer.stop
    if not layers:
        raise PrivacyError(
            "the model has no active LoRA layer. Add one with peft.get_peft_model(model, LoraConfig(...))."
        )
    return layers


def _refuse_variant(name: str, module: Any, adapter: str) -> None:
    variants = getattr(module, "lora_variant", {})
    if adapter in variants:
        raise PrivacyError(
            f"layer {name} uses the LoRA variant {type(variants[adapter]).__name__}, which has no exact "
            "per-sample path yet. "
            "Use plain LoRA (use_dora=False and no other variant)."
        )
    if not isinstance(module.lora_A[adapter], nn.Linear):
        raise PrivacyError(
            f"layer {name} is a LoRA on {type(module.base_layer).__name__}, which has no exact per-sample "
            "path yet. Target linear "
            "layers only (lora.target_modules)."
        )
    if module.lora_B[adapter].bias is not None:
        raise PrivacyError(
            f"layer {name} has a LoRA bias, which has no exact per-sample path yet. Set lora_bias=False."
        )


def _refuse_uncovered_parameters(model: nn.Module, layers: list[_AdapterLayer]) -> None:
    covered = {id(matrix) for layer in layers for matrix in (layer.a, layer.b)}
    uncovered = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in covered
    ]
    if uncovered:
        raise PrivacyError(
            f"{len(uncovered)} trainable parameters have no exact per-sample gradient: "
            f"{', '.join(uncovered[:5])}"
            f"{', ...' if len(uncovered) > 5 else ''}. Freeze them (requires_grad_(False)) or train LoRA "
            "adapters only."
        )
    frozen = [layer.name for layer in layers if not (layer.a.requires_grad and layer.b.requires_grad)]
    if frozen:
        raise PrivacyError(
            f"the adapter of layer {frozen[0]} is partly frozen. Train both of its matrices, or deactivate "
            "it."
        )


def _compute_dtype(model: nn.Module) -> torch.dtype:
    """Dtype of the model's frozen weights, which its activations have too."""
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            return parameter.dtype
    return torch.float32


def _relative_difference(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm().clamp_min(torch.finfo(expected.dtype).tiny))
