"""The truth for per-sample gradients: ordinary autograd, one sample at a time; all readings against it."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from securetune.privacy.per_sample import PerSampleGradients

Losses = Callable[[nn.Module, Tensor], Tensor]


def randn(*shape: int, seed: int = 1) -> Tensor:
    """The same normal numbers each time, in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def square_losses(model: nn.Module, x: Tensor) -> Tensor:
    """Give a loss ``[B]`` whose gradient differs at every output."""
    y = model(x)
    return (y + 0.3).square().flatten(1).sum(dim=1)


def next_token_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean cross-entropy of each row's next tokens."""
    logits = model(input_ids=ids, use_cache=False).logits[:, : ids.shape[1] - 1]
    return functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(dim=1)


def one_by_one(model: nn.Module, x: Tensor, losses: Losses = square_losses) -> Tensor:
    """Differentiate one sample at a time: ``[B, P]``, float64, in the order of ``model.parameters()``."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = [torch.zeros(0, sum(p.numel() for p in parameters), dtype=torch.float64)]
    for row in x.split(1):
        found = torch.autograd.grad(losses(model, row).sum(), parameters, allow_unused=True)
        pairs = zip(found, parameters, strict=True)
        row = [p.new_zeros(p.numel()) if g is None else g.flatten() for g, p in pairs]
        rows.append(torch.cat([part.double() for part in row])[None])
    return torch.cat(rows)


def with_the_same_draws(model: nn.Module, x: Tensor, losses: Losses = square_losses) -> tuple[Tensor, Tensor]:
    """Differentiate one batch with the engine, and one loss after another without it, from one random state.

    Returns:
        ``[B, P]`` of the engine, and the truth.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(4)
    rows = [
        torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        for loss in losses(model, x)
    ]
    expected = [
        torch.cat(
            [
                p.new_zeros(p.numel()) if g is None else g.flatten()
                for g, p in zip(row, parameters, strict=True)
            ]
        )
        for row in rows
    ]
    engine = PerSampleGradients(model)
    torch.manual_seed(4)
    found = engine.backward(losses(model, x)).materialize()
    engine.detach()
    return found, torch.stack(expected)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the truth."""
    return float((actual.detach().double() - expected).norm() / expected.norm().clamp_min(1e-30))


def random_parameters(model: nn.Module, *, seed: int = 0, std: float = 0.3) -> nn.Module:
    """Move trainable parameters off their first values: zeros and ones hide wrong gradients."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter += (std * noise).to(parameter.dtype)
    return model


def assert_exact(
    model: nn.Module,
    x: Tensor,
    losses: Losses = square_losses,
    *,
    expected: Tensor | None = None,
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    tolerance: float = 1e-9,
) -> PerSampleGradients:
    """Compare rows, norms (flat and by parameter), weighted sums and joined units with the truth.

    Args:
        model: A model with trainable parameters; gets the engine.
        x: Its batch, at least one sample.
        losses: Called with the model and a batch, returns one loss per sample.
        expected: The truth, where it can't be computed with this model.
        wrap: Applied to the model after the engine.
        tolerance: Largest relative error.

    Returns:
        The engine.
    """
    expected = one_by_one(copy.deepcopy(model), x, losses) if expected is None else expected
    engine = PerSampleGradients(model)
    model = wrap(model)
    batch, num_parameters = len(x), len(engine.parameters)
    factors = torch.linspace(0.5, 2.0, batch, dtype=engine.compute_dtype)
    factors[batch // 2] = 0.0 if batch > 1 else 0.5
    for _ in range(2):  # the second pass goes without the proof of isolation
        grads = engine.backward(losses(model, x))
        assert relative_error(grads.materialize(), expected) < tolerance
        torch.testing.assert_close(
            grads.squared_norms().sqrt().double(),
            expected.norm(dim=1, keepdim=True),
            rtol=tolerance,
            atol=1e-12,
        )
        summed = torch.zeros(engine.num_params, dtype=engine.compute_dtype)
        grads.accumulate(factors[:, None], summed)
        assert not summed.requires_grad  # it would hold the graphs of all micro-batches
        truth = (factors.double()[:, None] * expected).sum(dim=0)
        assert relative_error(summed, truth) < max(tolerance, 1e-12)

    groups = list(range(num_parameters))
    parts = [expected[:, place.start : place.stop] for place in engine.parameters]
    by_group = torch.stack([part.norm(dim=1) for part in parts], dim=1)
    found = grads.squared_norms(groups, num_parameters).sqrt().double()
    assert float((found - by_group).abs().max()) < tolerance * float(by_group.max().clamp_min(1e-30))
    weights = factors[:, None] * torch.linspace(1, 2, num_parameters, dtype=engine.compute_dtype)
    summed = torch.zeros(engine.num_params, dtype=engine.compute_dtype)
    grads.accumulate(weights, summed, groups)
    truth = torch.cat(
        [(weights[:, index, None].double() * part).sum(dim=0) for index, part in enumerate(parts)]
    )
    assert relative_error(summed, truth) < tolerance

    if batch > 1:
        _assert_units(engine, losses(model, x), expected, tolerance)
    return engine


def _assert_units(engine: PerSampleGradients, losses: Tensor, expected: Tensor, tolerance: float) -> None:
    """The first and the last sample belong to one unit."""
    unit_ids = ["a", *(f"b{row}" for row in range(len(expected) - 2)), "a"]
    units = torch.cat([expected[:1] + expected[-1:], expected[1:-1]])
    grads = engine.backward(losses, unit_ids)
    assert grads.num_units == len(units)
    found = grads.squared_norms().sqrt().squeeze(1).double()
    assert float((found - units.norm(dim=1)).abs().max()) < tolerance * float(units.norm())
    factors = torch.linspace(2.0, 0.5, len(units), dtype=engine.compute_dtype)
    summed = torch.zeros(engine.num_params, dtype=engine.compute_dtype)
    grads.accumulate(factors[:, None], summed)
    assert relative_error(summed, (factors.double()[:, None] * units).sum(dim=0)) < max(tolerance, 1e-12)
