"""Which implementation runs an op: the Triton kernel or PyTorch."""

import contextlib
import functools
import importlib.util
import logging
import os
from importlib import metadata
from typing import Literal, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "triton", "torch"]
# Where the ops are registered for torch.compile, which takes each as one node of its graph. The package's
# name, which differs between an installation and each copy that the kernel hub loads: every copy has its own.
NAMESPACE = __name__.partition(".")[0]

logger = logging.getLogger(__name__)


def resolve_backend(
    backend: Backend, tensor: Tensor, *, op: str, unsupported: str | None = None
) -> Literal["triton", "torch"]:
    """Pick the implementation that runs ``op`` on ``tensor``.

    ``"auto"`` means the environment variable ``SECURETUNE_BACKEND`` where it is set, else Triton on a GPU and
    torch on a CPU; the choice is logged once per op. ``"triton"`` asked for by name runs or raises; on CPU
    tensors it runs only in Triton's interpreter (``TRITON_INTERPRET=1`` before the first import of triton),
    which is for tests.

    Args:
        backend: What the caller asked for.
        tensor: Any tensor of the op; its device decides.
        op: Name of the op, for messages.
        unsupported: Why the Triton kernel cannot take these arguments, or ``None`` where it can.

    Returns:
        ``"triton"`` or ``"torch"``.

    Raises:
        ValueError: If the name is not ``"auto"``, ``"triton"`` or ``"torch"``.
        RuntimeError: If Triton was asked for by name and cannot run.
    """
    source = "backend"
    requested: str = backend
    if backend == "auto":
        source, requested = "SECURETUNE_BACKEND", os.environ.get("SECURETUNE_BACKEND") or "auto"
    if requested not in get_args(Backend):
        raise ValueError(f"{source} must be 'auto', 'triton' or 'torch', got {requested!r}.")
    if requested == "torch":
        return "torch"
    if requested == "auto" and not tensor.is_cuda:  # decided without looking for triton, which takes 60 us
        _log_choice_once(op, "torch", tensor.device.type, None)
        return "torch"
    obstacle = unsupported or _why_triton_cannot_run(tensor)
    if requested == "triton":
        if obstacle is not None:
            raise RuntimeError(f"{op}: {source}='triton' cannot run: {obstacle}. Use backend='torch'.")
        return "triton"
    chosen = "triton" if obstacle is None else "torch"
    _log_choice_once(op, chosen, tensor.device.type, obstacle)
    return chosen


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the device of ``tensor`` current: Triton launches there, wherever its arguments are."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def why_products_cannot_compile(tensor: Tensor) -> str | None:
    """Say why Triton cannot compile an op whose matrix products are used at once, or return None.

    Before 3.8 its compiler fails on such products in half precision for chips of compute capability 10.

    Args:
        tensor: Any factor of the products.

    Returns:
        The reason.
    """
    if not tensor.is_cuda or tensor.dtype not in (torch.bfloat16, torch.float16):
        return None
    if torch.version.hip or torch.cuda.get_device_capability(tensor.device)[0] != 10:
        return None
    version = _triton_version()
    if version is None or version >= (3, 8):
        return None
    return f"triton {version[0]}.{version[1]} cannot compile it for this chip, triton 3.8 can"


@functools.cache
def _triton_version() -> tuple[int, int] | None:
    try:
        major, minor = metadata.version("triton").split(".")[:2]
    except metadata.PackageNotFoundError:
        return None
    return int(major), int(minor)


def _has_triton() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ImportError:  # an import hook forbids it
        return False


def _why_triton_cannot_run(tensor: Tensor) -> str | None:
    if not _has_triton():
        return "triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not tensor.is_cuda and not interpreted:
        return f"the tensor is on {tensor.device}"
    return None


@functools.cache
def _log_choice_once(op: str, chosen: str, device_type: str, obstacle: str | None) -> None:
    # a GPU without its kernel is slower than the user expects, so that case is a warning
    level = logging.WARNING if chosen == "torch" and device_type == "cuda" else logging.DEBUG
    reason = f" ({obstacle})" if obstacle and device_type == "cuda" else ""
    logger.log(level, "%s on %s tensors runs on the %s backend%s.", op, device_type, chosen, reason)
