"""The self-check before training: per-sample gradients against ordinary autograd, and each sample alone."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from securetune.errors import PrivacyError
from securetune.privacy.per_sample.gradients import TrainableParameter

if TYPE_CHECKING:
    from securetune.privacy.per_sample.engine import PerSampleGradients

# Largest relative error allowed between the recorded sum and ordinary autograd, by the model's compute dtype:
# the two add the same products in another order. In bfloat16 roundings of eight bits grow through the layers
# (0.08 on SmolLM2-135M with 30 of them); a wrong scale, sign or missing part differs by about 1.
SELF_CHECK_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}
_PARAMETER_FACTOR = 3  # a single parameter may differ this many times more
_FLOOR = 0.02  # parameters whose gradient is below this share of the whole are compared with that share
CHECKED_AT_ONCE = 1 << 28  # entries whose gradients are compared at once: two times 1 GiB
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
    parts = list(_parts(engine.parameters))
    differences: list[float] = []
    lengths: list[float] = []
    for part in parts:
        compared = _against_autograd(engine, losses_of, rows, part)
        differences += compared[0]
        lengths += compared[1]
    whole = math.hypot(*lengths)
    if not whole > 0:
        raise PrivacyError(
            "self-check: no gradient reaches the trainable parameters, so training would not move them. "
            "Check that adapters are active and that the loss depends on them."
        )
    worst = math.hypot(*differences) / whole
    for place, difference, length in zip(engine.parameters, differences, lengths, strict=True):
        # A small parameter may be wrong without showing in the whole; its own rounding is larger, though.
        error = difference / (length + _FLOOR * whole)
        if not (worst <= tolerance and error <= _PARAMETER_FACTOR * tolerance):
            raise PrivacyError(
                "self-check: the sum of the per-sample gradients differs from ordinary autograd by "
                f"{worst:.2e} in the whole and {error:.2e} in {place.name} (allowed {tolerance:.0e} "
                f"and {_PARAMETER_FACTOR * tolerance:.0e}). A layer of this model is not supported exactly; "
                "no privacy claim would hold."
            )
    for row in rows if len(rows) > 1 else []:
        weights = [float(other == row) for other in rows]
        changes: list[float] = []
        lengths = []
        for part in parts:
            compared = _against_alone(engine, losses_of, rows, weights, part)
            changes += compared[0]
            lengths += compared[1]
        coupling = math.hypot(*changes) / max(math.hypot(*lengths), torch.finfo(torch.float32).tiny)
        if not coupling <= tolerance:
            raise PrivacyError(
                f"self-check: without its batch-mates a sample's gradient changes by {coupling:.2e} (allowed "
                f"{tolerance:.0e}). The loss couples samples (batch normalisation, a token count over the "
                "batch, in-batch negatives)."
            )
        worst = max(worst, coupling)
    return worst


def _against_autograd(
    engine: "PerSampleGradients",
    losses_of: Callable[[list[int]], Tensor],
    rows: list[int],
    part: Sequence[TrainableParameter],
) -> tuple[list[float], list[float]]:
    """Return by how much the sum differs from ordinary autograd, and how long it is, for each parameter."""
    summed = _weighted_sum(engine, losses_of(rows), [1.0] * len(rows), part)
    with engine.ordinary_autograd():
        parameters = [place.parameter for place in part]
        found = torch.autograd.grad(losses_of(rows).sum(), parameters, allow_unused=True)
    expected = [
        torch.zeros_like(ours) if grad is None else grad.flatten().to(ours.dtype)
        for ours, grad in zip(summed, found, strict=True)
    ]
    return _differences(summed, expected)


def _against_alone(
    engine: "PerSampleGradients",
    losses_of: Callable[[list[int]], Tensor],
    rows: list[int],
    weights: list[float],
    part: Sequence[TrainableParameter],
) -> tuple[list[float], list[float]]:
    """Return by how much a sample among others differs from the same alone, and how long that is."""
    row = rows[weights.index(1.0)]
    among = _weighted_sum(engine, losses_of(rows), weights, part)
    alone = _weighted_sum(engine, losses_of([row]), [1.0], part)
    return _differences(among, alone)


def _differences(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> tuple[list[float], list[float]]:
    pairs = zip(ours, expected, strict=True)
    return [float((one - other).norm()) for one, other in pairs], [float(other.norm()) for other in expected]


def _parts(parameters: Sequence[TrainableParameter]) -> Iterator[list[TrainableParameter]]:
    """Cut the parameters into neighbours of at most ``CHECKED_AT_ONCE`` entries, or a larger one alone."""
    part: list[TrainableParameter] = []
    for place in parameters:
        if part and place.stop - part[0].start > CHECKED_AT_ONCE:
            yield part
            part = []
        part.append(place)
    yield part


def _weighted_sum(
    engine: "PerSampleGradients", losses: Tensor, weights: list[float], part: Sequence[TrainableParameter]
) -> list[Tensor]:
    """Sum the samples' gradients of some neighbouring parameters, as training does."""
    batch = engine.backward(losses)
    factors = torch.tensor(weights, device=engine.device)[:, None]
    (summed,) = batch.accumulate_layers(factors, [slice(part[0].start, part[-1].stop)])
    return list(summed.split([place.stop - place.start for place in part]))


def _compute_dtype(model: nn.Module) -> torch.dtype:
    """The coarsest dtype of the model's floating-point weights, which its activations are rounded to."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return max(
        dtypes & set(SELF_CHECK_TOLERANCE), key=SELF_CHECK_TOLERANCE.__getitem__, default=torch.float32
    )
