"""Products with frozen weights, on CPUs by the library that is faster there.

torch gives float32 products on x86 CPUs to MKL, which keeps back on some of them: on an AMD EPYC (Zen 4),
SmolLM2-135M's products ran 1.1 times as fast with oneDNN. torch has oneDNN on board and calls it through the
operator below in the code that ``torch.compile`` makes. The operator is private, so it is used only where it
is there, gives the right result, and is measurably faster on this CPU.
"""

from functools import cache
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from securetune.privacy.per_sample.paths import Path

if TYPE_CHECKING:
    from securetune.privacy.per_sample.engine import PerSampleGradients

# Multiplications below which the call's own cost is more than what the product gains: measured on the same
# CPU with 1 to 256 rows and layers of 16 x 16 to 4096 x 576.
_WORTHWHILE = 1 << 23
_MIN_SPEEDUP = 1.03
_PROBE_SHAPE = (256, 576, 1536)  # rows, input and output features
_PROBE_SECONDS = 0.1


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``x W^T + b`` for autograd functions: no graph is recorded.

    Args:
        x: ``[..., d]``, any floating dtype.
        weight: ``[p, d]``, same dtype; the transpose of a stored matrix is as fast, which gives ``g @ W`` as
            ``frozen_linear(g, W.t())``.
        bias: ``[p]`` or None.

    Returns:
        ``[..., p]``, a tensor of its own.
    """
    if (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.numel() * weight.shape[0] >= _WORTHWHILE
        and not torch.compiler.is_compiling()
        and onednn_speedup(torch.get_num_threads()) >= _MIN_SPEEDUP
    ):
        return _by_onednn(x, weight, bias)
    return functional.linear(x, weight, bias)


@cache
def onednn_speedup(num_threads: int) -> float:
    """Measure how many times faster oneDNN is than torch's own choice in float32, in about 0.1 s.

    Args:
        num_threads: ``torch.get_num_threads()``.

    Returns:
        Best of several, the two interleaved; 0 where oneDNN is missing or gives another result.
    """
    if not torch.backends.mkldnn.is_available():
        return 0.0
    rows, d, p = _PROBE_SHAPE
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((rows, d), (p, d), (p,)))
    with torch.no_grad():
        try:
            actual = _by_onednn(x, weight, bias), _by_onednn(x @ weight.t(), weight.t(), None)
        except (AttributeError, RuntimeError):  # the operator is private: gone, or of other arguments
            return 0.0
        expected = functional.linear(x, weight, bias), x @ weight.t() @ weight
        if not all(_agree(*pair) for pair in zip(actual, expected, strict=True)):
            return 0.0
        best = [float("inf"), float("inf")]
        started = perf_counter()
        while perf_counter() < started + _PROBE_SECONDS or best[1] == float("inf"):
            for index, product in enumerate((functional.linear, _by_onednn)):
                start = perf_counter()
                product(x, weight, bias)
                best[index] = min(best[index], perf_counter() - start)
    return best[0] / best[1]


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _agree(actual: Tensor, expected: Tensor) -> bool:
    distance = (actual - expected).norm() if actual.shape == expected.shape else torch.tensor(torch.inf)
    return bool(distance <= 1e-5 * expected.norm())


class FrozenLinearPath(Path):
    """A frozen ``nn.Linear`` on a CPU, whose products are faster than torch's own."""

    def run(self, x: Tensor) -> Tensor:
        """Run the layer; ``x``: ``[..., d]``."""
        module = self.module
        if torch.is_autocast_enabled(x.device.type) or _learns(module):
            return self._original(x)
        return _FrozenLinear.apply(x, module.weight, module.bias)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return frozen_linear(x, weight, bias)

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
    is_faster = onednn_speedup(torch.get_num_threads()) >= _MIN_SPEEDUP
    return FrozenLinearPath(engine, name, module) if is_faster else None


def _learns(module: Any) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
