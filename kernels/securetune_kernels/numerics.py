"""Float32 sums and products that keep their digits, for the ops' PyTorch paths and for callers of the ops."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

# Sums over blocks of this many columns: one float32 sum over millions of entries loses digits on a CPU.
BLOCK_COLUMNS = 4096


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 products in float32: autocast, TF32 and bfloat16 would loosen the clipping."""
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # pyright: ignore[reportAttributeAccessIssue]
    before = [setting.fp32_precision for setting in settings]
    with without_autocast():
        try:
            for setting in settings:
                setting.fp32_precision = "ieee"
            yield
        finally:
            for setting, value in zip(settings, before, strict=True):
                setting.fp32_precision = value


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Compute in the dtypes that are given, also inside a caller's ``torch.autocast``."""
    with contextlib.ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def add_rows(out: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Add ``rows[i]`` to ``out[index[i]]`` in a fixed order, which ``index_add_`` does not keep on a GPU.

    Args:
        out: ``[V, ...]``: added to in place.
        index: ``[N]``, int64 or int32.
        rows: ``[N, ...]``, dtype of ``out``.

    Returns:
        ``out``.
    """
    if out.is_cuda:
        return out.index_put_((index.long(),), rows, accumulate=True)
    return out.index_add_(0, index, rows)


def row_squared_norms(rows: Tensor) -> Tensor:
    """Square each row's L2 norm in blocks, so that float32 keeps its digits over millions of columns.

    Args:
        rows: ``[B, R]``, float32 or float64.

    Returns:
        ``[B]``, same dtype.
    """
    blocks = rows.shape[1] // BLOCK_COLUMNS
    split = blocks * BLOCK_COLUMNS
    norms = torch.linalg.vector_norm(rows[:, split:], dim=1).square()
    if blocks:
        parts = torch.linalg.vector_norm(rows[:, :split].unflatten(1, (blocks, BLOCK_COLUMNS)), dim=2)
        norms = norms + torch.linalg.vector_norm(parts, dim=1).square()
    return norms
