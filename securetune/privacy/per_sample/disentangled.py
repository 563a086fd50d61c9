"""DeBERTa's disentangled attention, which projects one table of relative positions for all samples.

The table is repeated for each sample before its projections, so that these see one row per sample as every
other layer does. The values are the same.

Dimensions: ``B`` samples, ``S`` relative positions, ``d`` features.
"""

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from securetune.errors import PrivacyError
from securetune.privacy.per_sample.functional import FunctionalPath, Rerun, detach_all
from securetune.privacy.per_sample.paths import ROOT, Path, recorded

if TYPE_CHECKING:
    from securetune.privacy.per_sample.engine import PerSampleGradients

_TABLE = "rel_embeddings"
_TABLE_METHOD = "get_rel_embedding"
_BIAS_METHODS = ("disentangled_attention_bias", "disentangled_att_bias")


class RelativeTablePath(FunctionalPath):
    """The table and its norm: :class:`DisentangledPath` records what each sample makes of them.

    Args:
        engine: Who records.
        name: Name of the encoder in the model.
        encoder: The module with the table and the method that returns it.
        parts: Names of the modules in it that the method uses.
    """

    _tells_rows = False

    def __init__(self, engine: "PerSampleGradients", name: str, encoder: Any, parts: Sequence[str]) -> None:
        super().__init__(engine, name, encoder)
        self._parts = parts
        self._original = getattr(encoder, _TABLE_METHOD)

    @property
    def prefixes(self) -> list[str]:
        """Names of the modules that are handled here."""
        return [part if self.name == ROOT else f"{self.name}.{part}" for part in self._parts]

    def attach(self) -> None:
        """Stand in for the method."""
        setattr(self.module, _TABLE_METHOD, self._call)

    def detach(self) -> None:
        """Give the method back."""
        self.module.__dict__.pop(_TABLE_METHOD, None)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Return the table, ``[S, d]``; a gradient must reach it through :meth:`watch` only."""
        table = self._functional(detach_all(self._named()), args, kwargs)
        return recorded(self, table, self._refuse)

    def _refuse(self, g: Tensor) -> NoReturn:
        raise PrivacyError(
            f"the table of relative positions in {self.name} ({type(self.module).__name__}) is used outside "
            f"of disentangled attention. Freeze {', '.join(self._named())} (requires_grad_(False))."
        )

    def watch(self, table: Tensor, start: int, mask: Tensor | None) -> Tensor:
        """Record what reaches a part of the table that was repeated for each sample.

        Args:
            table: ``[B, S', d]``: rows ``[start, start + S')``, already dropped.
            start: First row.
            mask: ``[S, d]``: its dropout, None without.

        Returns:
            A tensor equal to ``table``.
        """
        named = self._named()

        def run_on(parameters: dict[str, Tensor], _: list[Tensor]) -> list[Tensor]:
            return [self._functional(parameters, (), {})[None]]

        call = Rerun(run_on, table.device.type, None)

        def record(g: Tensor, *masks: Tensor) -> None:
            size = getattr(self.module, _TABLE).num_embeddings
            whole = functional.pad(g, (0, 0, start, size - start - g.shape[1]))
            whole = whole * masks[0] if masks else whole
            self._record([whole], [], named, call, is_shared=True)

        return recorded(self, table, record, *([] if mask is None else [mask]))

    def _named(self) -> dict[str, nn.Parameter]:
        return {
            f"{part}.{name}": parameter
            for part in self._parts
            for name, parameter in getattr(self.module, part).named_parameters()
            if parameter.requires_grad
        }


class DisentangledPath(Path):
    """An attention whose projections see the table of relative positions once for each sample.

    Args:
        engine: Who records.
        name: The module's name.
        module: The attention.
        table: The path of the table, None where it is frozen.
    """

    def __init__(
        self, engine: "PerSampleGradients", name: str, module: Any, table: RelativeTablePath | None
    ) -> None:
        super().__init__(engine, name, module)
        self._table = table

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the attention's own forward."""
        given = inspect.signature(self._original).bind(*args, **kwargs).arguments
        table = given.get(_TABLE)
        if table is None:
            return self._original(*args, **kwargs)
        with _TableOfEachSample(table, len(given["hidden_states"]), self.module, self._table):
            return self._original(*args, **kwargs)


class _TableOfEachSample(TorchFunctionMode):
    """Follow the table through dropout and slicing, and repeat it where it gets its first dimension."""

    def __init__(self, table: Tensor, rows: int, module: Any, path: RelativeTablePath | None) -> None:
        super().__init__()
        self._known: list[Tensor] = [table]
        self._start = 0
        self._mask: Tensor | None = None
        self._rows, self._heads, self._path = rows, module.num_attention_heads, path

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else kwargs.get("input")
        is_repeated = func is Tensor.repeat and tuple(args[1:]) == (self._rows, 1, 1)
        if is_repeated and first.shape[0] == self._rows * self._heads:  # has each sample's rows already
            return first
        if not any(first is known for known in self._known):
            return func(*args, **kwargs)
        if func is functional.dropout:
            return self._drop(first, *args[1:], **{k: v for k, v in kwargs.items() if k != "input"})
        if func is Tensor.__getitem__:
            rows = args[1][0] if isinstance(args[1], tuple) else args[1]
            self._start += rows.indices(len(first))[0]
            return self._follow(func(*args, **kwargs))
        if func is Tensor.unsqueeze:
            if self._path is None:
                return func(*args, **kwargs).expand(self._rows, -1, -1)
            repeated = func(first.detach(), *args[1:], **kwargs).expand(self._rows, -1, -1)
            return self._path.watch(repeated, self._start, self._mask)
        return func(*args, **kwargs)

    def _drop(self, table: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if training and p > 0:
            self._mask = functional.dropout(torch.ones_like(table), p)
            table = table * self._mask
        return self._follow(table)

    def _follow(self, table: Tensor) -> Tensor:
        self._known.append(table)
        return table


def table_path(engine: "PerSampleGradients", name: str, module: nn.Module) -> RelativeTablePath | None:
    """Return the path of an encoder's trainable table, None for any other module.

    Args:
        engine: Who will record.
        name: The module's name.
        module: Any module.

    Returns:
        The path, not yet attached. None also where an attention has trainable parameters of its own, as in
        the first DeBERTa: it is differentiated as a whole, which leaves the table an ordinary gradient.
    """
    if not hasattr(module, _TABLE_METHOD) or not isinstance(getattr(module, _TABLE, None), nn.Embedding):
        return None
    parts = [_TABLE]
    if "layer_norm" in getattr(module, "norm_rel_ebd", []):
        parts.append("LayerNorm")
    path = RelativeTablePath(engine, name, module, parts)
    attentions = [child for child in module.modules() if _is_disentangled(child)]
    if not path.parameters or any(Path(engine, name, child).parameters for child in attentions):
        return None
    return path


def disentangled_path(
    engine: "PerSampleGradients", name: str, module: nn.Module, paths: Sequence[Path]
) -> DisentangledPath | None:
    """Return the path of a disentangled attention, None for any other module.

    Args:
        engine: Who will record.
        name: The module's name.
        module: Any module.
        paths: The paths chosen so far, the table's among them if it has one.

    Returns:
        The path, not yet attached. None also where nothing in it trains, or something of its own does.
    """
    if not _is_disentangled(module) or Path(engine, name, module).parameters:
        return None
    tables = [path for path in paths if isinstance(path, RelativeTablePath)]
    table = next((path for path in tables if name.startswith(f"{path.name}.") or path.name == ROOT), None)
    if table is None and not any(parameter.requires_grad for parameter in module.parameters()):
        return None
    return DisentangledPath(engine, name, module, table)


def _is_disentangled(module: nn.Module) -> bool:
    return any(hasattr(module, method) for method in _BIAS_METHODS) and hasattr(module, "num_attention_heads")
