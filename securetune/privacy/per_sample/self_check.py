"""The self-check before training: per-sample gradients against ordinary autograd, and each sample alone."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from securetune.errors import PrivacyError

if TYPE_CHECKING:
    from securetune.privacy.per_sample.engine import PerSampleGradients

# Largest relative error allowed between the recorded sum and ordinary autograd, by the model's compute dtype:
# the two add the same products in another order. In bfloat16 roundings of eight bits grow through the layers
# (0.08 on SmolLM2-135M with 30 of them); a wrong scale, sign or missing part differs by about 1.
SELF_CHECK_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}
_PARAMETER_FACTOR = 3  # a single parameter may differ this many times more
_FLOOR = 0.02  # parameters whose gradient is below this share of the whole are compared with that share
_RANDOM_SCALE = 0.02  # of what is put into parameters of zeros during the check


def check_against_autograd(
    engine: "PerSampleGradients", losses_of: Callable[[list[int]], Tensor], batch_size: int
) -> float:
    """Do what :meth:`PerSampleGradients.check` says."""
    parameters = [place.parameter for place in engine.parameters]
    zeros = [parameter for parameter in parameters if not parameter.detach().any()]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for parameter in zeros:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.copy_(_RANDOM_SCALE * noise)
        return _compare(engine, losses_of, list(range(batch_size)))
    finally:
        with torch.no_grad():
            for parameter in zeros:
                parameter.zero_()


def _compare(
    engine: "PerSampleGradients", losses_of: Callable[[list[int]], Tensor], rows: list[int]
) -> float:
    tolerance = SELF_CHECK_TOLERANCE[_compute_dtype(engine.model)]
    grads = engine.backward(losses_of(rows)).materialize()
    parameters = [place.parameter for place in engine.parameters]
    with engine.ordinary_autograd():
        found = torch.autograd.grad(losses_of(rows).sum(), parameters, allow_unused=True)
    pairs = zip(found, parameters, strict=True)
    whole = torch.cat([_as_row(grad, parameter, grads.dtype) for grad, parameter in pairs])
    if not whole.norm() > 0:
        raise PrivacyError(
            "self-check: no gradient reaches the trainable parameters, so training would not move them. "
            "Check that adapters are active and that the loss depends on them."
        )
    summed = grads.sum(dim=0)
    worst = _relative_difference(summed, whole)
    # A small parameter may be wrong without showing in the whole; its own rounding is larger, though.
    floor = _FLOOR * whole.norm()
    for place in engine.parameters:
        part = slice(place.start, place.stop)
        error = (summed[part] - whole[part]).norm() / (whole[part].norm() + floor)
        if not (worst <= tolerance and error <= _PARAMETER_FACTOR * tolerance):
            raise PrivacyError(
                "self-check: the sum of the per-sample gradients differs from ordinary autograd by "
                f"{worst:.2e} in the whole and {float(error):.2e} in {place.name} (allowed {tolerance:.0e} "
                f"and {_PARAMETER_FACTOR * tolerance:.0e}). A layer of this model is not supported exactly; "
                "no privacy claim would hold."
            )
    for row in rows if len(rows) > 1 else []:
        alone = engine.backward(losses_of([row])).materialize()
        coupling = _relative_difference(grads[row : row + 1], alone)
        if not coupling <= tolerance:
            raise PrivacyError(
                f"self-check: without its batch-mates a sample's gradient changes by {coupling:.2e} (allowed "
                f"{tolerance:.0e}). The loss couples samples (batch normalisation, a token count over the "
                "batch, in-batch negatives)."
            )
        worst = max(worst, coupling)
    return worst


def _as_row(grad: Tensor | None, parameter: nn.Parameter, dtype: torch.dtype) -> Tensor:
    flat = parameter.new_zeros(parameter.numel()) if grad is None else grad.flatten()
    return flat.to(dtype)


def _compute_dtype(model: nn.Module) -> torch.dtype:
    """The coarsest dtype of the model's floating-point weights, which its activations are rounded to."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return max(
        dtypes & set(SELF_CHECK_TOLERANCE), key=SELF_CHECK_TOLERANCE.__getitem__, default=torch.float32
    )


def _relative_difference(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm().clamp_min(torch.finfo(expected.dtype).tiny))
