"""Recurrent layers of torch: states, dropout between layers and packed sequences, taken sample by sample.

Dimensions: ``B`` samples, ``T`` positions, ``N`` layers and directions, ``h`` features of one direction.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from securetune.errors import PrivacyError
from securetune.privacy.per_sample.functional import SequencePath


class RecurrentPath(SequencePath):
    """``nn.RNN``, ``nn.LSTM`` and ``nn.GRU``, whatever their ``batch_first``."""

    def run(self, x: Tensor | PackedSequence, state: Any = None) -> Any:
        """Run the layer.

        Args:
            x: ``[B, T, d]``, or ``[T, B, d]`` where the layer is not ``batch_first``; or a packed sequence,
                whose rows run one sample after another in the backward pass.
            state: ``[N, B, h]``, or two of them for an LSTM; zeros when None.

        Returns:
            The output, laid out as ``x``, and the last state, as ``state``.

        Raises:
            PrivacyError: If ``x`` has no batch dimension.
        """
        given = None if state is None else _swapped(state)
        if isinstance(x, PackedSequence):
            self._is_looped = True
            self.engine.warn_of_loop(self.name, self.module, "its sequence is packed")
            padded, lengths = pad_packed_sequence(x, batch_first=True)
            y, last = super().run(padded, given, self._masks(x), lengths)
            return _packed_as(x, y, lengths), _swapped(last)
        if x.ndim != 3:
            raise PrivacyError(
                f"layer {self.name} ({type(self.module).__name__}) got an input of shape {list(x.shape)}. "
                "Give it a batch: [B, T, d]."
            )
        is_swapped = not self.module.batch_first
        y, last = super().run(self._swap(x)[0].contiguous() if is_swapped else x, given, self._masks(x), None)
        return _swapped(y) if is_swapped else y, _swapped(last)

    def _masks(self, x: Tensor | PackedSequence) -> list[Tensor]:
        """Draw the dropout masks between the layers, as torch lays them out: ``[B, T, N h]`` each."""
        layer = self.module
        if not (layer.training and layer.dropout):
            return []
        data = _swapped(x) if layer.batch_first and isinstance(x, Tensor) else x.data
        width = (1 + layer.bidirectional) * (getattr(layer, "proj_size", 0) or layer.hidden_size)
        ones = data.new_ones(*data.shape[:-1], width, requires_grad=False)
        masks = [functional.dropout(ones, layer.dropout) for _ in range(layer.num_layers - 1)]
        if isinstance(x, PackedSequence):
            return [pad_packed_sequence(x._replace(data=mask), batch_first=True)[0] for mask in masks]
        return [_swapped(mask) for mask in masks]

    def _forward(self, x: Tensor, state: Any, masks: Sequence[Tensor], lengths: Tensor | None) -> Any:
        """Run the layer on ``[B, T, d]``; states, and those returned, are ``[B, N, h]``."""
        layer = self.module
        given = None if state is None else _swapped(state)
        if masks:
            return self._layer_by_layer(x, given, masks, lengths)
        if lengths is None:
            y, last = self._original(x if layer.batch_first else _swapped(x), given)
            return y if layer.batch_first else _swapped(y), _swapped(last)
        y, last = self._original(_packed(x, lengths), given)
        return pad_packed_sequence(y, batch_first=True, total_length=x.shape[1])[0], _swapped(last)

    def _layer_by_layer(self, x: Tensor, state: Any, masks: Sequence[Tensor], lengths: Tensor | None) -> Any:
        """Run one layer after another; ``state``: ``[N, B, h]``."""
        layer = self.module
        is_lstm, directions = layer.mode == "LSTM", 1 + layer.bidirectional
        run_one = getattr(torch._VF, layer.mode.lower())  # pyright: ignore[reportAttributeAccessIssue]
        if state is None:
            sizes = [getattr(layer, "proj_size", 0) or layer.hidden_size, layer.hidden_size]
            zeros = [x.new_zeros(layer.num_layers * directions, len(x), size) for size in sizes]
            state = tuple(zeros) if is_lstm else zeros[0]
        last: list[Any] = []
        for index in range(layer.num_layers):
            own = slice(directions * index, directions * (index + 1))
            weights = [getattr(layer, name) for names in layer._all_weights[own] for name in names]
            options = (weights, layer.bias, 1, 0.0, True, layer.bidirectional)
            start = tuple(part[own] for part in state) if is_lstm else state[own]
            if lengths is None:
                x, *after = run_one(x, start, *options, True)
            else:
                packed = _packed(x, lengths)
                data, *after = run_one(
                    packed.data, packed.batch_sizes, _selected(start, packed.sorted_indices), *options
                )
                x, _ = pad_packed_sequence(
                    packed._replace(data=data), batch_first=True, total_length=x.shape[1]
                )
                after = [_selected(part, packed.unsorted_indices) for part in after]
            last.append(after)
            if index < len(masks):
                x = x * masks[index].to(x.dtype)
        ends = tuple(torch.cat(parts) for parts in zip(*last, strict=True))
        return x, _swapped(ends if is_lstm else ends[0])


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
    if isinstance(module, known) and any(type(module).forward is kind.forward for kind in known):
        return RecurrentPath(engine, name, module)
    return None


def _swapped(state: Any) -> Any:
    """Swap the first two dimensions of a tensor, or of each one in a tuple."""
    if isinstance(state, tuple):
        return tuple(map(_swapped, state))
    return state.transpose(0, 1).contiguous()


def _selected(state: Any, order: Tensor | None) -> Any:
    """Put the samples of ``[N, B, h]``, or of each one in a tuple, in another order."""
    assert order is not None, "packed without sorting"
    if isinstance(state, tuple):
        return tuple(part.index_select(1, order) for part in state)
    return state.index_select(1, order)


def _packed(x: Tensor, lengths: Tensor) -> PackedSequence:
    return pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)


def _packed_as(given: PackedSequence, y: Tensor, lengths: Tensor) -> PackedSequence:
    """Pack ``[B, T, h]`` in the order of another sequence."""
    if given.sorted_indices is not None:
        y, lengths = y.index_select(0, given.sorted_indices), lengths[given.sorted_indices.cpu()]
    return given._replace(data=pack_padded_sequence(y, lengths, batch_first=True).data)
