"""What a table gives for ids ``[T]``: rows of samples, or positions that all samples share; its use tells.

Dimensions: ``B`` samples, ``T`` positions, ``d`` features.
"""

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor
from torch.utils._pytree import tree_map

_BROADCAST = {
    "add",
    "add_",
    "sub",
    "mul",
    "__add__",
    "__radd__",
    "__iadd__",
    "__sub__",
    "__mul__",
    "__rmul__",
}
_IN_PLACE = {"add_", "__iadd__"}
_CASTS = {"to", "type_as", "float", "double", "half", "bfloat16", "contiguous"}


class Positions(Tensor):
    """``[T, d]`` or ``[1, T, d]``, which becomes rows for each sample where it is added to ``[B, T, d]``.

    Broadcasting would sum the samples' gradients on the way back. In any other operation this is an ordinary
    tensor, whose gradient is told apart by sample only where its rows are the samples.
    """

    ordinary: Tensor
    rows: int
    of_each_sample: Callable[[], Tensor]
    uses: set[str]
    version: int

    @classmethod
    def make(
        cls, ordinary: Tensor, rows: int, of_each_sample: Callable[[], Tensor], uses: set[str]
    ) -> "Positions":
        """Wrap a tensor.

        Args:
            ordinary: ``[T, d]`` or ``[1, T, d]``.
            rows: ``B``.
            of_each_sample: Returns it as ``[B, T, d]``.
            uses: Operations that have repeated this table's positions for each sample before.

        Returns:
            A tensor equal to ``ordinary``.
        """
        made = cast(Positions, ordinary.as_subclass(cls))
        made.ordinary, made.rows, made.of_each_sample, made.uses = ordinary, rows, of_each_sample, uses
        made.version = ordinary._version
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        own = next((value for value in args if isinstance(value, cls) and value._is_as_looked_up), None)
        if own is not None and args[0] is own:
            if name in _CASTS or _adds_first_dimension(name, args[1:]):
                return own._follow(func, name, args[1:], kwargs)
            if own._is_repeated(name, args[1:]):
                return own.of_each_sample()
        is_kept = name in _BROADCAST and not (name in _IN_PLACE and args[0] is own)
        if own is not None and is_kept and any(own._meets(value) for value in args):
            args = [value.of_each_sample() if isinstance(value, cls) else value for value in args]
        args, kwargs = tree_map(_ordinary, (tuple(args), kwargs))
        return func(*args, **kwargs)

    @property
    def _is_as_looked_up(self) -> bool:
        """Whether no operation in place has changed it since."""
        return "version" in self.__dict__ and self.version == self.ordinary._version

    def _follow(self, func: Any, name: str, args: Any, kwargs: Any) -> "Positions":
        each = self.of_each_sample
        changed = (lambda: func(each(), *args, **kwargs)) if name in _CASTS else each
        return Positions.make(func(self.ordinary, *args, **kwargs), self.rows, changed, self.uses)

    def _meets(self, other: Any) -> bool:
        shape = (self.rows, *self.ordinary.shape[-2:])
        return isinstance(other, Tensor) and not isinstance(other, Positions) and tuple(other.shape) == shape

    def _is_repeated(self, name: str, sizes: Any) -> bool:
        """Whether ``expand`` or ``repeat`` makes ``[B, T, d]`` of this.

        Where ``T`` is ``B``, it could be one row of each sample for several layers: then earlier uses decide.
        """
        if name not in ("expand", "repeat") or not sizes:
            return False
        first, *others = sizes[0] if isinstance(sizes[0], tuple | list) else sizes
        kept = [[1, 1]] if name == "repeat" else [[-1, -1], list(self.ordinary.shape[-2:])]
        if first != self.rows or others not in kept:
            return False
        if self.ordinary.shape[-2] != self.rows:
            self.uses.add(name)
        return name in self.uses


def _ordinary(value: Any) -> Any:
    return value.ordinary if isinstance(value, Positions) and "ordinary" in value.__dict__ else value


def _adds_first_dimension(name: str, args: Any) -> bool:
    index = args[0] if len(args) == 1 else ()
    if name == "__getitem__":
        return index is None or (isinstance(index, tuple) and len(index) == 1 and index[0] is None)
    return name == "unsqueeze" and isinstance(index, int) and index == 0
