"""Adversarial perturbations of input embeddings, one sample at a time: FGSM and PGD.

A perturbation here is a function of the sample itself, the current weights and randomness addressed to that
sample, and of nothing else. That is what lets DP training use it at no extra privacy cost: given the weights
(public by adaptive composition), the gradient of the perturbed sample is still a function of one record, so
clipping it bounds the sensitivity exactly as without the attack. ``validity.py`` names objectives for which
this fails.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn

from securetune_kernels.pgd_step import pgd_step

Norm = Literal["l2_token", "linf", "l2_sample"]
LossesFn = Callable[[Tensor], Tensor]
RowLossesFn = Callable[[Tensor, Tensor], Tensor]

_DIRECTION: dict[str, Literal["sign", "normalised"]] = {
    "l2_token": "normalised",
    "linf": "sign",
    "l2_sample": "normalised",
}
_ROWS_PER_CHUNK = 8192  # keeps the float32 copy of a large vocabulary's embedding small


class PerturbResult(NamedTuple):
    """The outcome of an attack on a batch.

    Attributes:
        delta: ``[B, T, D]``, dtype of the embeddings (float32 for float64): what to add to them.
        best_loss: ``[B]``, float32: the loss at ``delta``. NaN where it was not computed (``return_last``)
            or where no iterate of the sample had a finite loss.
    """

    delta: Tensor
    best_loss: Tensor


def mean_embedding_norm(model: nn.Module) -> float:
    """Return the mean L2 norm of the model's input embeddings over its vocabulary.

    Radii in recipes are multiples of this number, so that they mean the same for any model.

    Args:
        model: A model with ``get_input_embeddings()``; a scale the embedding applies itself
            (``embed_scale``) is included.

    Returns:
        The mean norm, > 0, in embedding units.
    """
    embedding = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    weight = embedding.weight.detach()
    total = sum(chunk.float().norm(dim=-1).double().sum().item() for chunk in weight.split(_ROWS_PER_CHUNK))
    return total / weight.shape[0] * abs(float(getattr(embedding, "embed_scale", 1.0)))


@contextmanager
def attack_mode(model: nn.Module) -> Iterator[None]:
    """Freeze parameters and switch to eval mode inside the block, and restore both exactly.

    In eval mode dropout is off, so the attack sees the deterministic model and draws nothing from torch's
    random generators; with frozen parameters the backward pass stores and computes only what the input
    gradient needs.

    Guarantees:
        Every parameter's ``requires_grad`` and every submodule's ``training`` flag is the same after as
        before, also when the block raises. ``.grad``, buffers and hooks are not touched.

    Args:
        model: The model under attack.

    Yields:
        Nothing.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = [module for module in model.modules() if module.training]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        for module in training:
            module.training = False
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


def sample_seeds(unit_ids: Sequence[str], *, seed: int, step: int) -> list[int]:
    """Derive one 128-bit seed per sample from its identity.

    Guarantees:
        Entry ``i`` depends on ``unit_ids[i]``, ``seed`` and ``step`` only, never on the other samples or
        their order.

    Args:
        unit_ids: One stable identifier per sample, such as the record's digest.
        seed: The attack's seed.
        step: The training step (or restart), so that a sample drawn again starts elsewhere.

    Returns:
        ``len(unit_ids)`` integers in [0, 2**128).
    """
    keys = (f"{seed}:{step}:{unit_id}".encode() for unit_id in unit_ids)
    digests = (hashlib.blake2b(key, digest_size=16, person=b"st.perturb") for key in keys)
    return [int.from_bytes(digest.digest(), "little") for digest in digests]


def random_starts(
    seeds: Sequence[int], attack_mask: Tensor, embed_dim: int, *, norm: Norm, radius: float
) -> Tensor:
    """Draw a random perturbation inside the ball for each sample.

    L-inf: each entry uniform in [-radius, radius]. L2: uniform direction with uniform length, per token or
    per sample; a uniform point of a high-dimensional L2 ball lies on its surface, which would leave a
    single step from there only four fifths of its strength.

    Guarantees:
        Row ``i`` depends on ``seeds[i]`` and on the number of its attackable tokens only: not on
        batch-mates and not on padding. torch's and numpy's global generators are not used.

    Args:
        seeds: One non-negative seed per sample (see ``sample_seeds``).
        attack_mask: ``[B, T]``, bool: the tokens that may be perturbed.
        embed_dim: ``D``, the embedding width.
        norm: The ball's norm.
        radius: The ball's radius > 0, in embedding units.

    Returns:
        ``[B, T, D]``, float32 on the device of ``attack_mask``: zero outside the mask.
    """
    mask = attack_mask.cpu().numpy()
    starts = np.zeros((*mask.shape, embed_dim), dtype=np.float32)
    for row, seed in enumerate(seeds):
        generator = np.random.Generator(np.random.Philox(key=seed))
        shape = (int(mask[row].sum()), embed_dim)
        if norm == "linf":
            starts[row, mask[row]] = generator.uniform(-radius, radius, size=shape)
            continue
        direction = generator.standard_normal(shape)
        axis = None if norm == "l2_sample" else -1
        length = np.sqrt(np.square(direction).sum(axis=axis, keepdims=True)) if direction.size else 1.0
        scale = generator.uniform(size=1 if norm == "l2_sample" else (shape[0], 1))
        starts[row, mask[row]] = direction / length * (radius * scale)
    return torch.from_numpy(starts).to(attack_mask.device)


def surface_noise(
    seeds: Sequence[int], attack_mask: Tensor, embed_dim: int, *, norm: Norm, radius: float
) -> Tensor:
    """Draw random noise of the full radius for each sample: the control that any real attack must beat.

    Args:
        seeds: One non-negative seed per sample (see ``sample_seeds``).
        attack_mask: ``[B, T]``, bool: the tokens that may be perturbed.
        embed_dim: ``D``, the embedding width.
        norm: The ball's norm; for ``"linf"`` the noise is a random corner.
        radius: The ball's radius > 0, in embedding units.

    Returns:
        ``[B, T, D]``, float32: on the surface of the ball, zero outside the mask.
    """
    direction = random_starts(seeds, attack_mask, embed_dim, norm=norm, radius=1.0)
    return pgd_step(
        torch.zeros_like(direction),
        direction,
        attack_mask,
        step_size=radius,
        radius=radius,
        norm=norm,
        direction=_DIRECTION[norm],
    )


def default_step_size(radius: float, steps: int) -> float:
    """Return the customary step: 1.25 radii for one step, else 2.5 radii shared by all steps."""
    return 1.25 * radius if steps == 1 else 2.5 * radius / steps


def perturb(
    losses_fn: LossesFn,
    embeds: Tensor,
    attack_mask: Tensor,
    *,
    norm: Norm,
    radius: float,
    steps: int,
    step_size: float | None = None,
    random_start: Sequence[int] | None = None,
    ascent: bool = True,
    return_last: bool | None = None,
) -> PerturbResult:
    """Find, for each sample, a perturbation of its embeddings inside a ball that raises its loss.

    One step is FGSM with a random start (Wong et al. 2020, https://arxiv.org/abs/2001.03994); several are PGD
    (Madry et al. 2018, https://arxiv.org/abs/1706.06083) that returns each sample's best iterate.

    Run it inside ``attack_mode(model)``: then dropout is off and parameters get no gradient.

    Guarantees:
        ``delta[i]`` depends on sample ``i``, the weights and ``random_start[i]`` only, if ``losses_fn``
        computes row ``i`` of its result from row ``i`` of its argument. Only the gradient with respect to
        the embeddings of the *sum* of the losses is taken: ``.grad`` of every parameter stays as it was,
        and torch's random state too unless ``losses_fn`` draws from it. ``delta`` is zero outside the mask
        and within the radius in its own dtype. Adding it to bfloat16 embeddings rounds once more, by at
        most half a unit in the last place of the sum. With ``return_last=False``, ``best_loss[i]`` is the
        highest finite loss seen; at a tie the earlier iterate stays. A non-finite loss is never chosen, and
        a sample without any finite loss gets ``delta = 0``.

    Args:
        losses_fn: Maps perturbed embeddings ``[B, T, D]`` to losses ``[B]``, one per sample.
        embeds: ``[B, T, D]``, a floating dtype: the clean embeddings.
        attack_mask: ``[B, T]``, bool: the tokens that may be perturbed.
        norm: ``"l2_token"`` (each token's L2 norm), ``"linf"`` or ``"l2_sample"`` (L2 over all tokens of
            the sample).
        radius: The budget > 0, in embedding units (see ``mean_embedding_norm``).
        steps: Number of gradient steps >= 1.
        step_size: Length of a step > 0, in embedding units; None: ``default_step_size``.
        random_start: One seed per sample (see ``sample_seeds``); None starts at zero.
        ascent: Raise the loss; False lowers it (a targeted attack, or the "towards" half of a defence), and
            "highest" above then reads "lowest".
        return_last: Return the last iterate without computing its loss, which saves a forward pass. None:
            True for one step, False for several.

    Returns:
        The perturbation and the loss it reached.

    Raises:
        ValueError: If an argument is outside its range or the shapes do not agree.
    """
    _check_arguments(
        embeds, attack_mask, norm=norm, radius=radius, steps=steps, step_size=step_size, seeds=random_start
    )
    return_last = steps == 1 if return_last is None else return_last
    search = _Search(
        embeds, attack_mask, norm=norm, radius=radius, steps=steps, step_size=step_size, ascent=ascent
    )
    delta = search.start(random_start)
    best = PerturbResult(
        torch.zeros_like(delta), torch.full((embeds.shape[0],), math.nan, device=embeds.device)
    )
    for _ in range(steps):
        losses, grad = search.losses_and_grad(losses_fn, search.embeds, delta)
        if not return_last:
            best = search.keep_better(best, delta, losses)
        delta = search.step(delta, grad, search.mask)
    if return_last:
        return PerturbResult(delta, best.best_loss)
    with torch.no_grad():
        losses = _checked_losses(losses_fn(search.embeds + delta), delta)
    return search.keep_better(best, delta, losses)


def perturb_until(
    losses_fn: RowLossesFn,
    embeds: Tensor,
    attack_mask: Tensor,
    *,
    threshold: float,
    norm: Norm,
    radius: float,
    steps: int,
    step_size: float | None = None,
    random_start: Sequence[int] | None = None,
) -> PerturbResult:
    """Attack each sample until its loss exceeds a threshold, then stop working on it.

    The same search as ``perturb`` for evaluation: with a margin loss and threshold 0 a sample leaves the
    batch as soon as the model errs on it, so the work goes to the samples that still stand.

    Guarantees:
        The loss of sample ``i`` exceeds ``threshold`` here exactly if it does in ``perturb`` with the same
        arguments (up to rounding that depends on the batch's shape). A sample whose loss is not finite at
        some iterate is not counted as stopped there.

    Args:
        losses_fn: Maps perturbed embeddings ``[A, T, D]`` of the samples still active and their row numbers
            ``[A]`` to losses ``[A]``.
        embeds: ``[B, T, D]``, a floating dtype: the clean embeddings.
        attack_mask: ``[B, T]``, bool: the tokens that may be perturbed.
        threshold: A sample stops once its loss is above this.
        norm: As in ``perturb``.
        radius: As in ``perturb``.
        steps: As in ``perturb``.
        step_size: As in ``perturb``.
        random_start: As in ``perturb``.

    Returns:
        Each sample's best perturbation and its loss.

    Raises:
        ValueError: If an argument is outside its range or the shapes do not agree.
    """
    _check_arguments(
        embeds, attack_mask, norm=norm, radius=radius, steps=steps, step_size=step_size, seeds=random_start
    )
    search = _Search(
        embeds, attack_mask, norm=norm, radius=radius, steps=steps, step_size=step_size, ascent=True
    )
    delta = search.start(random_start)
    best_delta = torch.zeros_like(delta)
    best_loss = torch.full((embeds.shape[0],), math.nan, device=embeds.device)
    rows = torch.arange(embeds.shape[0], device=embeds.device)
    for step in range(steps + 1):
        if rows.numel() == 0:
            break
        active_rows, grad = rows, None
        if step < steps:
            losses, grad = search.losses_and_grad(
                lambda x, r=rows: losses_fn(x, r), search.embeds[rows], delta
            )
        else:
            with torch.no_grad():
                losses = _checked_losses(losses_fn(search.embeds[rows] + delta, rows), delta)
        better = search.keep_better(PerturbResult(best_delta[rows], best_loss[rows]), delta, losses)
        best_delta[rows], best_loss[rows] = better
        active = ~(better.best_loss > threshold)
        rows = active_rows[active]
        if grad is not None:
            delta = search.step(delta[active], grad[active], search.mask[rows])
    return PerturbResult(best_delta, best_loss)


class _Search:
    """What ``perturb`` and ``perturb_until`` share: the ball, the step and the choice of the best iterate."""

    def __init__(
        self,
        embeds: Tensor,
        attack_mask: Tensor,
        *,
        norm: Norm,
        radius: float,
        steps: int,
        step_size: float | None,
        ascent: bool,
    ) -> None:
        self.embeds = embeds.detach()
        self.mask = attack_mask
        self.norm: Norm = norm
        self.radius = radius
        self.step_size = default_step_size(radius, steps) if step_size is None else step_size
        self.sign = 1.0 if ascent else -1.0

    def start(self, seeds: Sequence[int] | None) -> Tensor:
        dtype = torch.float32 if self.embeds.dtype == torch.float64 else self.embeds.dtype
        zero = torch.zeros_like(self.embeds, dtype=dtype)
        if seeds is None:
            return zero
        start = random_starts(seeds, self.mask, self.embeds.shape[-1], norm=self.norm, radius=self.radius)
        # a zero gradient takes no step: what remains of the operation keeps the budget after the cast
        return self.step(start.to(dtype), zero, self.mask)

    def losses_and_grad(self, losses_fn: LossesFn, embeds: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            inputs = (embeds + delta).requires_grad_(True)
            losses = _checked_losses(losses_fn(inputs), delta)
            (grad,) = torch.autograd.grad(losses.sum(), inputs)
        return losses.detach(), grad

    def step(self, delta: Tensor, grad: Tensor, mask: Tensor) -> Tensor:
        return pgd_step(
            delta,
            (grad if self.sign > 0 else -grad).to(delta.dtype),
            mask,
            step_size=self.step_size,
            radius=self.radius,
            norm=self.norm,
            direction=_DIRECTION[self.norm],
        )

    def keep_better(self, best: PerturbResult, delta: Tensor, losses: Tensor) -> PerturbResult:
        losses = losses.float()
        # best_loss is NaN until a first finite loss arrives
        better = losses.isfinite() & (
            best.best_loss.isnan() | (self.sign * losses > self.sign * best.best_loss)
        )
        return PerturbResult(
            torch.where(better[:, None, None], delta, best.delta), torch.where(better, losses, best.best_loss)
        )


def _checked_losses(losses: Tensor, delta: Tensor) -> Tensor:
    if losses.shape != delta.shape[:1]:
        raise ValueError(
            f"losses_fn must return one loss per sample, shape ({delta.shape[0]},), "
            f"got {tuple(losses.shape)}. "
            "A mean over the batch would let samples influence each other's perturbation."
        )
    return losses


def _check_arguments(
    embeds: Tensor,
    attack_mask: Tensor,
    *,
    norm: str,
    radius: float,
    steps: int,
    step_size: float | None,
    seeds: Sequence[int] | None,
) -> None:
    if norm not in get_args(Norm):
        raise ValueError(f"norm must be one of {', '.join(get_args(Norm))}, got {norm!r}.")
    if not (radius > 0 and math.isfinite(radius)):
        raise ValueError(f"radius must be > 0 and finite, got {radius}.")
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}.")
    if step_size is not None and not (step_size > 0 and math.isfinite(step_size)):
        raise ValueError(f"step_size must be > 0 and finite, got {step_size}.")
    if embeds.ndim != 3:
        raise ValueError(f"embeds must be 3-D [B, T, D], got shape {tuple(embeds.shape)}.")
    if attack_mask.shape != embeds.shape[:2] or attack_mask.dtype != torch.bool:
        raise ValueError(
            f"attack_mask must be bool with shape {tuple(embeds.shape[:2])}, "
            f"got {attack_mask.dtype} with shape {tuple(attack_mask.shape)}."
        )
    if seeds is not None and len(seeds) != embeds.shape[0]:
        raise ValueError(f"random_start must hold one seed per sample ({embeds.shape[0]}), got {len(seeds)}.")
