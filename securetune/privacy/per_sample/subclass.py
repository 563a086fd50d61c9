"""Subclasses of known layers with a forward of their own."""

import logging
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from securetune.privacy.per_sample.functional import FunctionalPath
from securetune.privacy.per_sample.gradients import TrainableParameter
from securetune.privacy.per_sample.paths import PRODUCTS, TRANSPOSES, DensePath, Path

_logger = logging.getLogger(__name__)

_SUMS = (Tensor.add, Tensor.__add__, torch.add)


class _InterceptedCall(TorchFunctionMode):
    """Run a layer's ``functional`` call on its weight through the layer's path."""

    def __init__(self, path: Path, function: Any) -> None:
        super().__init__()
        self.path, self.function = path, function
        self.is_own_use = False  # whether the weight or the bias went into anything else

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (
            func is self.function
            and (args[1] if len(args) > 1 else kwargs.get("weight")) is self.path.module.weight
            and self._is_layers_own_call(args, kwargs)
        ):
            return self.path.run(args[0] if args else kwargs["input"])
        if func is Tensor.__getitem__ and args[0] is self.path.module.weight:
            ids = _looked_up(args[0].shape[0], args[1], args[0].device)
            if ids is not None and self.function is functional.embedding:
                return self.path.run(ids)
        result = func(*args, **kwargs)
        used = [leaf for leaf in tree_leaves((args, kwargs)) if self._is_parameter(leaf)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.is_own_use |= bool(used) and any(leaf is not p for leaf in made for p in used)
        return result

    def _is_parameter(self, value: Any) -> bool:
        return any(value is parameter for parameter in self.path.parameters)

    def _is_layers_own_call(self, args: Any, kwargs: Any) -> bool:
        """Whether the layer itself would call so: any other use gets an ordinary gradient, and is refused."""
        given = args[2] if len(args) > 2 else kwargs.get("bias", kwargs.get("padding_idx"))
        module = self.path.module
        return given is module.bias if self.function is functional.linear else given == module.padding_idx


def _looked_up(count: int, index: Any, device: torch.device) -> Tensor | None:
    """Ids ``[B, T]`` or ``[1, T]`` of the rows that an index of a table picks, None for any other index."""
    if isinstance(index, slice):
        index = torch.arange(count, device=device)[index]
    if not isinstance(index, Tensor) or index.is_floating_point() or index.dtype == torch.bool:
        return None
    return index[None] if index.ndim == 1 else index


class _InterceptedProduct(_InterceptedCall):
    """Run a linear layer's own call, or its ``x @ weight.T`` and ``+ bias``, through the layer's path."""

    def __init__(self, path: "DensePath") -> None:
        super().__init__(path, functional.linear)
        self._dense = path
        self._transposed: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        weight, bias = self.path.module.weight, self.path.module.bias
        if func in TRANSPOSES and args[0] is weight:
            self._transposed.append(func(*args, **(kwargs or {})))
            return self._transposed[-1]
        if func in PRODUCTS and not kwargs and any(args[1] is known for known in self._transposed):
            return self._dense.multiply(args[0])
        if func in _SUMS and not kwargs and bias is not None and args[1] is bias:
            return self._dense.add_bias(args[0])
        return super().__torch_function__(func, types, args, kwargs)

    def _is_parameter(self, value: Any) -> bool:
        return super()._is_parameter(value) or any(value is known for known in self._transposed)


class SubclassPath(Path):
    """A subclass of a known layer, which calls the known one somewhere inside, or computes in its own way.

    The first call tells. Scaled embeddings, position tables with an offset and Falcon's linear layers go the
    known layer's way; a layer whose weight is masked, normalised or quantised first is differentiated again
    for each sample.
    """

    def __init__(self, inner: Path) -> None:
        super().__init__(inner.engine, inner.name, inner.module)
        self._inner, self._tells_rows = inner, inner._tells_rows
        self._whole: FunctionalPath | None = None
        self._is_decided = any(
            p.requires_grad for child in self.module.children() for p in child.parameters()
        )

    def row_places(self) -> list[TrainableParameter]:
        """Those of the known layer; all, where the forward has its own way."""
        return (self._whole or self._inner).row_places()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the subclass' own forward."""
        if self._whole is not None:
            return self._whole.run(*args, **kwargs)
        with self._interception():
            return self._original(*args, **kwargs)

    def _interception(self) -> "_InterceptedCall":
        if isinstance(self._inner, DensePath):
            return _InterceptedProduct(self._inner)
        return _InterceptedCall(self._inner, functional.embedding)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if not self._is_decided and not torch.compiler.is_compiling():
            self._is_decided = True
            self._decide(args, kwargs)
        return super()._call(*args, **kwargs)

    def _decide(self, args: Any, kwargs: Any) -> None:
        """Run the forward once to see how it uses its parameters."""
        with torch.random.fork_rng(), torch.no_grad(), self._interception() as seen:
            self._original(*args, **kwargs)
        if not seen.is_own_use:
            return
        _logger.warning(
            "layer %s (%s) computes with its parameters in its own way, so that each sample's gradient of "
            "them is written out, which takes memory.",
            self.name,
            type(self.module).__name__,
        )
        self._whole = FunctionalPath(self.engine, self.name, self.module)
        self._whole._original = self._original
        self.engine.lay_out_again()
