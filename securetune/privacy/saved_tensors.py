"""Tensors that are saved with a model: what forward passes on private records write there has no noise."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from securetune.errors import PrivacyError

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}  # by bytes


class _Mark(NamedTuple):
    identity: int | None  # None for trainable parameters, which wrappers exchange and checks fill meanwhile
    version: int | None
    checksum: int | None  # writes through .data or numpy count no version


class SavedTensors:
    """The parameters and persistent buffers of a model, as they are now.

    Args:
        model: The model. Its tensors are read once, here and in :meth:`refuse_written`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._marks = _marks(model)

    def refuse_written(self) -> None:
        """Refuse a step that wrote to one of them.

        Raises:
            PrivacyError: If one is another tensor, or holds other values.
        """
        now = _marks(self._model)
        moved = sorted(name for name in now if now[name] != self._marks.get(name))
        if moved:
            raise PrivacyError(
                f"{moved[0]} changed in this step, and {len(moved) - 1} others. What a forward pass "
                "on private records writes into the model has no noise and would be saved with it. Put the "
                "module that keeps such statistics into evaluation mode, or replace it; let one that starts "
                "from its first batch see public records before; constrain weights after private.step()."
            )


def _marks(model: nn.Module) -> dict[str, _Mark]:
    saved: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        for name, tensor in (*module._buffers.items(), *module._parameters.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set:
                saved[f"{prefix}.{name}".lstrip(".")] = tensor
    checksums = _checksums(saved)
    marks: dict[str, _Mark] = {}
    for name, tensor in saved.items():
        is_trainable = isinstance(tensor, nn.Parameter) and tensor.requires_grad
        identity = None if is_trainable else id(tensor)
        version = None if is_trainable or tensor.is_inference() else tensor._version
        marks[name] = _Mark(identity, version, checksums.get(name))
    return marks


def _checksums(saved: dict[str, Tensor]) -> dict[str, int]:
    """Add up the bits of each tensor, of those that are plain memory."""
    sums: dict[torch.device, dict[str, Tensor]] = {}
    for name, tensor in saved.items():
        is_plain = tensor.layout == torch.strided and not is_traceable_wrapper_subclass(tensor)
        if is_plain and not tensor.is_meta:
            words = tensor.detach().as_subclass(Tensor).contiguous().view(-1).view(_WORDS[tensor.itemsize])
            is_even = words.nbytes % 8 == 0 and words.storage_offset() * words.itemsize % 8 == 0
            words = words.view(torch.int64) if is_even else words  # many times as fast
            sums.setdefault(tensor.device, {})[name] = words.sum(dtype=torch.int64)
    return {
        name: value
        for own in sums.values()
        for name, value in zip(own, torch.stack(list(own.values())).tolist(), strict=True)
    }
