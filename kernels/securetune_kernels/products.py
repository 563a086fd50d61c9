"""Matrix products, on CPUs by the library that is faster there.

torch gives float32 products on x86 CPUs to MKL, which does not use all of some of them: with oneDNN,
SmolLM2-135M's products ran 1.1 times as fast on one AMD EPYC, and 2.2 times on a newer one. torch has oneDNN
on board and calls it through the operator below in the code that ``torch.compile`` makes. The operator is
private, so it is used only where it is there, gives the right result, and is measurably faster on this CPU.
"""

from functools import cache
from time import perf_counter

import torch
from torch import Tensor
from torch.nn import functional

# Multiplications below which the call's own cost is more than what the product gains: measured on the same
# CPU with 1 to 256 rows and layers of 16 x 16 to 4096 x 576.
_WORTHWHILE = 1 << 23
_MIN_SPEEDUP = 1.03
_PROBE_SHAPE = (256, 576, 1536)  # rows, input and output features
_PROBE_SECONDS = 0.1
_ROWS = 1024  # of a sum that are computed at once, so that no second matrix of its size is needed


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``x W^T + b`` for autograd functions: no graph is recorded.

    Args:
        x: ``[..., d]``, any floating dtype.
        weight: ``[p, d]``, same dtype; the transpose of a stored matrix is as fast, which gives ``g @ W`` as
            ``linear(g, W.t())``.
        bias: ``[p]`` or None.

    Returns:
        ``[..., p]``, a tensor of its own.
    """
    if _is_for_onednn(x, weight, weight.shape[0]):
        return _by_onednn(x, weight, bias)
    return functional.linear(x, weight, bias)


def add_product(out: Tensor, g: Tensor, a: Tensor) -> None:
    """Add ``g^T a``, the gradient of a dense layer's weight, to ``out``.

    Args:
        out: ``[p, d]``, any floating dtype.
        g: ``[N, p]``, same dtype: gradients of the layer's outputs.
        a: ``[N, d]``, same dtype: the layer's inputs.
    """
    if out.dtype == a.dtype and _is_for_onednn(g, a.t(), a.shape[1]):
        for rows, columns in zip(out.split(_ROWS), g.split(_ROWS, dim=1), strict=True):
            rows.add_(_by_onednn(columns.t(), a.t(), None))
    else:
        out.addmm_(g.t(), a)


def prefers_onednn() -> bool:
    """Whether oneDNN is faster than torch's own float32 products, with the present number of threads."""
    return onednn_speedup(torch.get_num_threads()) >= _MIN_SPEEDUP


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


def _is_for_onednn(x: Tensor, weight: Tensor, num_columns: int) -> bool:
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.numel() * num_columns >= _WORTHWHILE
        # with any other strides oneDNN takes a path that is a thousand times slower
        and (weight.is_contiguous() or weight.t().is_contiguous())
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and prefers_onednn()
    )


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _agree(actual: Tensor, expected: Tensor) -> bool:
    distance = (actual - expected).norm() if actual.shape == expected.shape else torch.tensor(torch.inf)
    return bool(distance <= 1e-5 * expected.norm())
