"""Output layers that a module makes of a layer's weight: ``functional.linear(x, self.table.weight)``."""

import functools
import inspect
import re
from collections.abc import Sequence
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from securetune.privacy.per_sample.paths import PRODUCTS, TRANSPOSES, DensePath, Path

if TYPE_CHECKING:
    from securetune.privacy.per_sample.engine import PerSampleGradients

# a product with a layer's weight, its transpose, or another name for it
_PRODUCT = r"(?:(?:linear|matmul)\(\s*[^,]+,\s*|@\s*|\bt\(\s*|transpose\(\s*)OWN\.([\w.]+)\.weight\b"
_TRANSPOSE = r"\bOWN\.([\w.]+)\.weight\.(?:t\(|T\b|mT\b|transpose\()"
_ALIAS = r"=\s*OWN\.([\w.]+)\.weight\s*$"


class TiedUsesPath(Path):
    """A module that multiplies with the weights of tables or linear layers inside, next to calling them.

    It owns no parameter: the products are recorded as further uses of the layers' weights. Any other use of
    them gets an ordinary gradient, which the engine refuses.

    Args:
        engine: Who records.
        name: The module's name.
        module: The module.
        layers: Names, in the model, of the layers and the layers.
    """

    def __init__(
        self, engine: "PerSampleGradients", name: str, module: Any, layers: Sequence[tuple[str, nn.Module]]
    ) -> None:
        super().__init__(engine, name, module)
        self._owned = []  # the layers' own paths look after them
        self._uses = [DensePath(engine, layer_name, layer) for layer_name, layer in layers]
        self.again: list[nn.Parameter] = [use.module.weight for use in self._uses]

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward."""
        with _TiedProducts(self._uses):
            return self._original(*args, **kwargs)


class _TiedProducts(TorchFunctionMode):
    """Run products with a layer's weight, or with its transpose, through the layer's path."""

    def __init__(self, uses: Sequence[DensePath]) -> None:
        super().__init__()
        self._uses = uses
        self._transposed: list[tuple[Tensor, DensePath]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():  # within a layer's own path
            return func(*args, **kwargs)
        if func in TRANSPOSES and (use := self._use_of(args[0])) is not None:
            transposed = func(*args, **kwargs)
            self._transposed.append((transposed, use))
            return transposed
        if func is functional.linear and len(args) > 1:
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            y = self._multiply(args[0], args[1], is_transposed=True)
            if y is not None:
                return y if bias is None else y + bias
        if func in PRODUCTS and not kwargs:
            y = self._multiply(args[0], args[1], is_transposed=False)
            if y is not None:
                return y
        return func(*args, **kwargs)

    def _use_of(self, weight: Any) -> DensePath | None:
        return next((use for use in self._uses if weight is use.module.weight), None)

    def _multiply(self, x: Tensor, weight: Any, *, is_transposed: bool) -> Tensor | None:
        """Multiply with ``weight^T`` or ``weight``, itself the weight of a layer or its transpose."""
        use = self._use_of(weight)
        if use is not None:
            return use.multiply(x, is_transposed=is_transposed)
        use = next((use for known, use in self._transposed if weight is known), None)
        return None if use is None else use.multiply(x, is_transposed=not is_transposed)


def tied_uses_path(engine: "PerSampleGradients", name: str, module: nn.Module) -> TiedUsesPath | None:
    """Return the path of a module whose source names the weight of a trainable layer inside.

    Args:
        engine: Who will record.
        name: The module's name.
        module: Any module without parameters of its own.

    Returns:
        The path, not yet attached; None where there is no such layer.
    """
    prefix = f"{name}." if name else ""
    layers: list[tuple[str, nn.Module]] = []
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    for key in () if code is None else _weights_named_in(code):
        try:
            layer = module.get_submodule(key)
        except AttributeError:
            continue
        if isinstance(layer, nn.Embedding | nn.Linear) and layer.weight.requires_grad:
            layers.append((f"{prefix}{key}", layer))
    return TiedUsesPath(engine, name, module, layers) if layers else None


@functools.cache  # by code: a class would keep alive what its methods close over
def _weights_named_in(code: CodeType) -> tuple[str, ...]:
    try:
        source = inspect.getsource(code)
    except (OSError, TypeError):  # made where no file is
        return ()
    own = re.escape(code.co_varnames[0] if code.co_argcount else "self")
    patterns = (pattern.replace("OWN", own) for pattern in (_PRODUCT, _TRANSPOSE, _ALIAS))
    return tuple(
        dict.fromkeys(key for pattern in patterns for key in re.findall(pattern, source, re.MULTILINE))
    )


__all__ = ["TiedUsesPath", "tied_uses_path"]
