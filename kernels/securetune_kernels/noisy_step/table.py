"""Where each parameter lies in the flat vector, so that one launch updates all of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Entries that one program updates: 128 generator blocks of eight, one a thread. Counted, not swept on a GPU.
CHUNK = 1024


class ParameterTable:
    """Parameters as consecutive parts of one flat vector ``[P]``.

    Make it once; it holds the parameters' addresses, so make it again if their memory moves.

    Args:
        params: Contiguous tensors of one dtype (float32, bfloat16 or float16) and device, in the order of the
            flat vector; nothing may share memory.

    Attributes:
        params: As given.
        starts: Flat index of each parameter's first entry.
        num_params: ``P``.
        dtype: Of the parameters.
        device: Of the parameters.

    Raises:
        TypeError: If the dtypes differ or are not among those above.
        ValueError: If there is no parameter, one is not contiguous, or the devices differ.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        if not params:
            raise ValueError("params must hold at least one tensor, got none.")
        self.params = list(params)
        self.dtype, self.device = params[0].dtype, params[0].device
        for index, param in enumerate(self.params):
            if param.dtype not in DTYPES or param.dtype != self.dtype:
                raise TypeError(
                    "params must share one dtype of float32, bfloat16 and float16, got "
                    f"{self.dtype} and {param.dtype} at {index}."
                )
            if param.device != self.device:
                raise ValueError(
                    f"params must be on one device, got {self.device} and {param.device} at {index}."
                )
            if not param.is_contiguous():
                raise ValueError(
                    f"params must be contiguous, got strides {param.stride()} for shape "
                    f"{tuple(param.shape)} at {index}."
                )
        sizes = [param.numel() for param in self.params]
        self.starts = [sum(sizes[:index]) for index in range(len(sizes))]
        self.num_params = sum(sizes)
        self._chunks: Tensor | None = None

    def views(self, flat: Tensor) -> list[Tensor]:
        """Cut a flat vector into parts of the parameters' shapes."""
        return [
            flat[start : start + param.numel()].view(param.shape)
            for start, param in zip(self.starts, self.params, strict=True)
        ]

    @property
    def chunks(self) -> Tensor:
        """``[3, N]``, int64, on the device: address of the first entry, first and last flat index of a chunk.

        No chunk crosses a multiple of ``CHUNK`` or the border between two parameters.
        """
        if self._chunks is None:
            rows: list[Tensor] = []
            for start, param in zip(self.starts, self.params, strict=True):
                stop = start + param.numel()
                index = torch.arange(start // CHUNK, (stop - 1) // CHUNK + 1, device=self.device)
                low, high = (index * CHUNK).clamp(min=start), ((index + 1) * CHUNK).clamp(max=stop)
                if param.numel():
                    rows.append(torch.stack([param.data_ptr() + (low - start) * param.itemsize, low, high]))
            self._chunks = torch.cat(rows, dim=1)
        return self._chunks
