"""Recurrent layers of torch: their states are laid out layer by layer, and are taken sample by sample here.

Dimensions: ``B`` samples, ``T`` positions, ``N`` layers and directions.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from securetune.errors import PrivacyError
from securetune.privacy.per_sample.functional import FunctionalPath


class RecurrentPath(FunctionalPath):
    """``nn.RNN``, ``nn.LSTM`` and ``nn.GRU``, whatever their ``batch_first``."""

    def run(self, x: Tensor | PackedSequence, state: Any = None) -> Any:
        """Run the layer.

        Args:
            x: ``[B, T, d]``, or ``[T, B, d]`` where the layer is not ``batch_first``.
            state: ``[N, B, h]``, or two of them for an LSTM; zeros when None.

        Returns:
            The output, laid out as ``x``, and the last state, as ``state``.

        Raises:
            PrivacyError: If ``x`` is packed or has no batch dimension.
        """
        layer = f"layer {self.name} ({type(self.module).__name__})"
        if isinstance(x, PackedSequence):
            raise PrivacyError(
                f"{layer} got a packed sequence, where rows of several samples lie mixed. Pad them instead, "
                "and leave the padding out of the loss."
            )
        if x.ndim != 3:
            raise PrivacyError(f"{layer} got an input of shape {list(x.shape)}. Give it a batch: [B, T, d].")
        given = () if state is None else (_swapped(state),)
        y, last = super().run(x if self.module.batch_first else _swapped(x), *given)
        return y if self.module.batch_first else _swapped(y), _swapped(last)

    def _functional(self, parameters: dict[str, Tensor], args: Any, kwargs: Any) -> Any:
        x, *state = args
        laid_out = x if self.module.batch_first else _swapped(x)
        y, last = super()._functional(parameters, (laid_out, *map(_swapped, state)), kwargs)
        return y if self.module.batch_first else _swapped(y), _swapped(last)


def recurrent_path(engine: Any, name: str, module: nn.Module) -> RecurrentPath | None:
    """Return the path of a recurrent layer, None for any other module.

    Args:
        engine: Who will record.
        name: The module's name.
        module: A module with trainable parameters.

    Returns:
        The path, not yet attached. None also for a subclass with a forward of its own.
    """
    known = (nn.RNN, nn.LSTM, nn.GRU)
    has_known_forward = any(type(module).forward is kind.forward for kind in known)
    return RecurrentPath(engine, name, module) if isinstance(module, known) and has_known_forward else None


def _swapped(state: Any) -> Any:
    """Swap the first two dimensions of a tensor, or of each one in a tuple."""
    if isinstance(state, tuple):
        return tuple(map(_swapped, state))
    return state.transpose(0, 1).contiguous()
