"""How many rows the running forward pass has, as the arguments of its modules tell.

A layer's input does not always tell the number of samples: position ids often come as ``[1, T]``, one row
for all of them, and the lookup is then done per sample; images are split into windows, and several texts
of one sample, ``[B, C, T]``, become ``[B * C, T]``.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from securetune.errors import PrivacyError
from securetune.privacy.per_sample.functional import FunctionalPath
from securetune.privacy.per_sample.paths import Path, no_copies

_BATCH_ARGUMENTS = ("input_ids", "inputs_embeds", "hidden_states", "pixel_values")


class RowWatch:
    """Watch the arguments of a model, and of the modules above embeddings and above functional paths.

    Args:
        model: The model.
        paths: Its paths.

    Attributes:
        batch_rows: Number of samples in the running forward pass; None where no argument told.
        nearest_rows: Number of rows that the innermost watched module got: windows of images, where it splits
            them.
        positions_first: First dimensions ``T, B`` of what a layer over sequences got; None where none told.
    """

    def __init__(self, model: nn.Module, paths: Sequence[Path]) -> None:
        self.batch_rows: int | None = None
        self._given: torch.Size | None = None  # shape of the model's own argument
        self._all_given: frozenset[torch.Size] = frozenset()  # shapes of all its arguments
        self._flat: dict[tuple[str, frozenset[torch.Size]], set[int]] = {}  # rows of a layer, by arguments
        self._outputs: set[tuple[str, int]] = set()  # layers, and how many rows came out of them
        self._choices: torch.Size | None = None  # [B, C, T] of the last ids with several texts of a sample
        self._are_folded = False
        self.nearest_rows: int | None = None
        self.positions_first: torch.Size | None = None
        modules = dict(model.named_modules())
        above_embeddings: set[str] = {""}
        above: set[str] = {""}
        for path in paths:
            parts = path.name.split(".")
            names = {name for i in range(len(parts)) if (name := ".".join(parts[:i])) in modules}
            if isinstance(path.module, nn.Embedding):
                above_embeddings |= names
            if isinstance(path.module, nn.Embedding) or isinstance(path, FunctionalPath):
                above |= names
        modules[""] = model

        def watch(name: str) -> Any:
            is_root, tells_samples = name == "", name in above_embeddings

            def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if not torch.is_grad_enabled():
                    if is_root:  # an evaluation, of another number of rows
                        self.nearest_rows = None
                    return
                named, tensors = _tensors(args, kwargs)
                if is_root:
                    self._all_given |= {value.shape for value in tensors}
                told = next((value for value in [*named, *tensors] if value.ndim >= 2), None)
                # inner modules may be called with one row for all samples, which tells nothing
                if told is not None and (named or is_root or told.shape[0] > 1):
                    self.nearest_rows = told.shape[0]
                    if is_root:  # one that is shared may come first
                        shapes = [told.shape] if named else [v.shape for v in tensors if v.ndim >= 2]
                        self._given = max(shapes, key=lambda shape: shape[0])
                    if tells_samples:
                        self.batch_rows = told.shape[0]
                        are_choices = told.ndim == 3 and not told.is_floating_point()
                        self._choices, self._are_folded = told.shape if are_choices else None, False

            return modules[name].register_forward_pre_hook(_Hook(note), with_kwargs=True)

        self._hooks = [watch(name) for name in sorted(above)]

    @property
    def given_samples(self) -> int | None:
        """Number of samples that the model itself got; None where no argument told."""
        given = self._given
        if given is not None and given[:2] == self.positions_first:
            return given[1]
        return self.batch_rows if given is None else given[0]

    def note_output(self, name: str, rows: int) -> None:
        """Learn how many rows came out of a layer."""
        self._outputs.add((name, rows))

    def rows_unlike_the_arguments(self, samples: int) -> frozenset[tuple[str, int]] | None:
        """Name the layers whose rows are no samples, and not all positions of one of the model's arguments.

        Their number may follow from the data, as that of the positions without padding.

        Args:
            samples: ``B``.

        Returns:
            Each with its rows; None where their number was another for arguments of the same shapes, an
                argument holds all samples' rows one after another, or the forward pass was before the last
                backward pass, so that nothing is known of it.
        """
        given = self._all_given
        if not given and not self._outputs:
            return None
        alike = {
            math.prod(shape[:dims])
            for shape in given
            if shape[:1] == (samples,)
            for dims in range(1, len(shape) + 1)
        }
        flat: dict[str, set[int]] = {}
        for name, rows in self._outputs:
            if rows > samples:
                flat.setdefault(name, set()).add(rows)
        has_changed = False
        for name, rows in flat.items():
            if self._flat.setdefault((name, given), rows) != rows:
                self._flat[name, given] = set()  # unequal to all that follow
                has_changed = True
        unlike = frozenset((name, count) for name, rows in flat.items() for count in rows - alike)
        is_packed = any(len(shape) > 1 and shape[0] > samples for shape in given)
        return None if has_changed or (unlike and is_packed) else unlike

    def rows_to_look_up(self, ids: Tensor) -> int | None:
        """Number of rows that share ids, if these are for all rows, as the arguments and earlier ids told.

        Args:
            ids: ``[B, T]``, ``[B * C, T]`` or ``[1, T]``: what a table looks up now.

        Returns:
            ``B`` or ``B * C``; None where no argument told.
        """
        if self._choices is None:
            return self.batch_rows
        folded = self._choices[:2].numel()
        self._are_folded |= ids.ndim == 2 and ids.shape == (folded, self._choices[2])
        return folded if self._are_folded else self.batch_rows

    def forget(self) -> None:
        """Forget the pass, once it is differentiated."""
        self.batch_rows = self.nearest_rows = self._given = self._choices = None
        self.positions_first = None
        self._are_folded = False
        self._all_given = frozenset()
        self._outputs.clear()

    def detach(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()


def _tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Find the tensors with known names, and all: those in a dictionary or tuple if there are no others."""
    named = [kwargs[key] for key in _BATCH_ARGUMENTS if isinstance(kwargs.get(key), Tensor)]
    given = [*args, *kwargs.values()]
    tensors = [value for value in given if isinstance(value, Tensor)]
    if any(value.ndim >= 2 for value in tensors):
        return named, tensors
    for value in given:
        if isinstance(value, list | tuple):
            inner = _tensors(value, {})
        elif isinstance(value, Mapping):
            inner = _tensors((), value)
        elif is_dataclass(value) or type(value) is SimpleNamespace:
            inner = _tensors((), vars(value))
        else:
            continue
        named, tensors = [*named, *inner[0]], [*tensors, *inner[1]]
    return named, tensors


class _Hook:
    def __init__(self, note: Callable[..., None]) -> None:
        self._note: Any = torch.compiler.disable(note)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._note(module, args, kwargs)

    def __reduce__(self) -> NoReturn:
        raise no_copies()


def not_by_sample(name: str, shape: Sequence[int], samples: int) -> PrivacyError:
    """Explain why a layer's gradient can't be split by sample.

    Args:
        name: The layer's name.
        shape: Shape of what it saw.
        samples: Samples in the batch.

    Returns:
        The error to raise.
    """
    if not shape:
        return PrivacyError(
            f"the loss uses an output of layer {name} that has no batch dimension, so its gradient can't "
            "be split by sample: a balance loss or another mean over the batch. Leave it out of the loss "
            "or freeze the layer."
        )
    return PrivacyError(
        f"layer {name} saw {shape[0]} rows where the batch has {samples} samples, so its gradient can't be "
        "split by sample. Give it batch-first input, one row per sample (a table of positions: ids of shape "
        "[1, T]; experts that take sorted tokens: a list named experts), or freeze it; packed rows are not "
        "supported here."
    )
