"""Where each trainable parameter lies: in the flat vector, and in the buffer of written rows."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from securetune.errors import PrivacyError
from securetune.privacy.per_sample.gradients import TrainableParameter
from securetune.privacy.per_sample.paths import Path
from securetune.privacy.per_sample.tied_uses import TiedUsesPath

# What wrappers put into parameter names: torch.compile, FSDP, activation checkpointing, DDP.
_WRAPPER_NAMES = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_WRAPPERS = (nn.parallel.DistributedDataParallel,)


def trainable_parameters(model: nn.Module) -> list[TrainableParameter]:
    """Find a model's trainable parameters, in canonical order: that of ``model.named_parameters()``.

    Args:
        model: Any model.

    Returns:
        At least one, with names without those of wrappers.

    Raises:
        PrivacyError: If there is none, or they are on several devices.
    """
    places: list[TrainableParameter] = []
    start = 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        for inserted in _WRAPPER_NAMES:
            name = name.replace(inserted, "")
        if isinstance(model, _WRAPPERS):
            name = name.removeprefix("module.")
        _refuse_kind(name, parameter)
        shape = whole_shape(parameter)
        stop = start + shape.numel()
        places.append(TrainableParameter(name, parameter, len(places), start, stop, shape))
        start = stop
    if not places:
        raise PrivacyError(
            "the model has no trainable parameter. Unfreeze some (requires_grad_(True)), or add adapters "
            "with peft.get_peft_model(model, LoraConfig(...))."
        )
    devices = {str(place.parameter.device) for place in places}
    if len(devices) > 1 or "meta" in devices:
        raise PrivacyError(
            f"trainable parameters must be on one device, got {', '.join(sorted(devices))}. Move the model "
            "first."
        )
    return places


def _refuse_kind(name: str, parameter: nn.Parameter) -> None:
    if is_lazy(parameter):
        raise PrivacyError(f"{name} has no shape yet. Run the model once on any input before.")
    if parameter.is_complex():
        kind = str(parameter.dtype).removeprefix("torch.")
        raise PrivacyError(
            f"{name} is {kind}, and clipping and noise are for real numbers. Make it a real parameter "
            "(torch.view_as_real) that forward turns into a complex one, or freeze it."
        )


def refuse_changed(
    parameters: Sequence[TrainableParameter], frozen: Sequence[tuple[str, nn.Parameter]]
) -> None:
    """Refuse a pass on other trainable parameters than those that the engine was made for.

    Args:
        parameters: Those that trained then.
        frozen: Names and parameters that were frozen then.

    Raises:
        PrivacyError: If one was frozen or unfrozen since, or has a hook that its gradients would not meet.
    """
    unfrozen = [name for name, parameter in frozen if parameter.requires_grad]
    if unfrozen:
        raise PrivacyError(
            f"{unfrozen[0]} was unfrozen after PerSampleGradients was made, and {len(unfrozen) - 1} others: "
            "it would train without clipping and without noise. Freeze it again, or unfreeze it before."
        )
    no_longer = [place.name for place in parameters if not place.parameter.requires_grad]
    if no_longer:
        raise PrivacyError(
            f"{no_longer[0]} was frozen after PerSampleGradients was made, and {len(no_longer) - 1} others: "
            "noise would still move it. Unfreeze it again, or freeze it before."
        )
    hooked = [place.name for place in parameters if place.parameter._backward_hooks]
    if hooked:
        raise PrivacyError(
            f"{hooked[0]} has a hook (register_hook), and {len(hooked) - 1} others: hooks change summed "
            "gradients, of which there are none here. Remove it; to train a part of a table use peft's "
            "TrainableTokensConfig, to leave parameters out freeze them."
        )


def refuse_joined(model: nn.Module, parameters: Sequence[TrainableParameter]) -> None:
    """Refuse parameters that joined the model since, and were differentiated in the ordinary way.

    Reentrant checkpointing hides them from :func:`refuse_outside`.

    Args:
        model: The model.
        parameters: Those that trained when the engine was made.

    Raises:
        PrivacyError: If there is one; another optimizer may train it.
    """
    known = {id(place.parameter) for place in parameters}
    joined = {name: p for name, p in model.named_parameters() if p.grad is not None and id(p) not in known}
    if joined:
        for parameter in joined.values():
            parameter.grad = None
        raise PrivacyError(
            f"{next(iter(joined))} joined the model after PerSampleGradients was made, and {len(joined) - 1} "
            "others: its gradient is neither clipped nor noised. Add all layers first, or freeze it "
            "(requires_grad_(False))."
        )


def refuse_gradients(parameters: Sequence[TrainableParameter], when: str) -> None:
    """Refuse ordinary gradients, which are neither clipped nor noised, and take them away.

    Args:
        parameters: The trainable ones.
        when: When they came.

    Raises:
        PrivacyError: If there is any.
    """
    found = [place for place in parameters if place.parameter.grad is not None]
    if not found:
        return
    for place in found:
        place.parameter.grad = None
    names = ", ".join(place.name for place in found[1:6])
    others = f" The same holds for {names}{', ...' if len(found) > 6 else ''}." if names else ""
    raise PrivacyError(
        f"{found[0].name} got an ordinary gradient {when}, which is neither clipped nor noised: it is used "
        "outside of its module's forward, or another backward() ran. Freeze it (requires_grad_(False)) or "
        "call its module (for an output layer on an embedding's weight: an nn.Linear with that weight); then "
        f"start the step again.{others}"
    )


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Return a parameter's shape; DeepSpeed's ZeRO-3 leaves none of it in the parameter between its uses."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether a wrapper (FSDP2, ZeRO-3) holds a part of the parameter only, between its uses."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_shape")


def count_owners(model: nn.Module, paths: Sequence[Path]) -> dict[int, int]:
    """Count the owners and further uses of each parameter, by its id: more than one where it is tied."""
    owners: dict[int, int] = {}
    used = [parameter for path in paths if isinstance(path, TiedUsesPath) for parameter in path.again]
    for parameter in (*(p for module in model.modules() for p in module._parameters.values()), *used):
        if parameter is not None:
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return owners


def lay_out_rows(
    parameters: Sequence[TrainableParameter], paths: Sequence[Path]
) -> dict[int, tuple[int, int]]:
    """Give a range of buffer columns to each parameter whose path writes rows.

    Args:
        parameters: The trainable parameters in canonical order.
        paths: All paths.

    Returns:
        First and last column, exclusive, by the parameter's index.
    """
    written = {place.index for path in paths for place in path.row_places()}
    columns: dict[int, tuple[int, int]] = {}
    start = 0
    for place in parameters:
        if place.index in written:
            columns[place.index] = (start, start + place.shape.numel())
            start += place.shape.numel()
    return columns


def flatten(parameters: Sequence[TrainableParameter]) -> nn.Parameter:
    """Make the trainable parameters views of a single one.

    Args:
        parameters: In canonical order; their data is replaced.

    Returns:
        ``[P]``, of their dtype.

    Raises:
        PrivacyError: If their dtypes differ, or they are sharded.
    """
    if any(is_sharded(place.parameter) for place in parameters):
        raise PrivacyError(
            "flat_params needs whole parameters, and these are sharded (FSDP2 or ZeRO-3). Give the optimizer "
            "the parameters themselves."
        )
    dtypes = {place.parameter.dtype for place in parameters}
    if len(dtypes) > 1:
        raise PrivacyError(
            f"flat_params needs one dtype, the trainable parameters have {', '.join(map(str, dtypes))}. Give "
            "the optimizer the parameters themselves."
        )
    flat = nn.Parameter(torch.cat([place.parameter.detach().flatten() for place in parameters]))
    for place in parameters:
        place.parameter.data = flat.data[place.start : place.stop].view_as(place.parameter)
    return flat


def refuse_moved(parameters: Sequence[TrainableParameter], flat: nn.Parameter) -> None:
    """Refuse parameters that are no longer views of the flat one, which is what an optimizer would move.

    Args:
        parameters: The trainable ones.
        flat: ``[P]``, from :func:`flatten`.

    Raises:
        PrivacyError: If one was moved or cast since.
    """
    for place in parameters:
        where, own = flat.data_ptr() + place.start * flat.itemsize, place.parameter
        if own.numel() and (own.data_ptr() != where or own.dtype != flat.dtype):
            raise PrivacyError(
                f"{place.name} was moved or cast (model.to, .half, .data = ...) after flat_params was made, "
                "so updates of flat_params miss it. Move the model first, or give the optimizer the "
                "parameters themselves."
            )
