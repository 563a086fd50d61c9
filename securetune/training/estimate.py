"""Time of a run on this machine, from measurements of its parts."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from securetune.config.schema import Recipe
from securetune.models.base import computing_in
from securetune.privacy.noise import NoiseSource
from securetune.privacy.per_sample import PerSampleGradients

if TYPE_CHECKING:
    from torch import Tensor, nn

    from securetune.models.base import BaseModel

_MODELS_EVALUATED = 3  # base, plain, hardened
_PROBE_ROWS = 16
_PROBE_PARAMETERS = 1 << 22  # noise and update of so many are timed


@dataclass(frozen=True)
class Estimate:
    """Predicted cost of a run on this machine.

    Attributes:
        seconds: Predicted wall-clock seconds by stage.
        memory_bytes: Predicted peak memory of the process, if it is the only one.
        tokens_per_record: Mean length assumed.
        forward_ms_per_token: Measured, milliseconds.
        training_ms_per_token: Measured forward and backward, milliseconds; where all weights are trained,
            with norms and sum of the per-sample gradients.
        update_ms_per_step: Measured noise and update of all weights, milliseconds; 0 for adapters, where it
            does not count.
    """

    seconds: dict[str, float]
    memory_bytes: int
    tokens_per_record: float
    forward_ms_per_token: float
    training_ms_per_token: float
    update_ms_per_step: float = 0.0


class _Speed(NamedTuple):
    """Seconds per token: forward, with the gradient of the inputs, with that of what is trained."""

    forward: float
    attack: float
    training: float


def estimate_cost(recipe: Recipe, base: "BaseModel", tokens: float, *, memory_bytes: int) -> Estimate:
    """Predict the time of a run.

    Args:
        recipe: The recipe.
        base: The base model, frozen as it was loaded.
        tokens: Mean record length.
        memory_bytes: Its memory, predicted already.

    Returns:
        The prediction.

    Raises:
        PrivacyError: If a layer that is to be trained has no exact per-sample path.
    """
    speed = _measure(recipe, base, max(8, round(tokens)))
    update = _update_seconds(base) if recipe.training.method == "full" else 0.0
    most = recipe.privacy.max_records_per_user or 1  # records of one unit
    drawn = recipe.privacy.steps * recipe.privacy.expected_batch_size * most * tokens
    attack_steps = 0 if recipe.adversarial.method == "none" else recipe.adversarial.steps
    settings = recipe.evaluation
    judged = (settings.num_texts + settings.num_membership) * tokens * speed.forward
    if recipe.task == "classify":
        pgd = settings.num_attacked * len(settings.pgd_radii) * settings.pgd_steps * tokens * speed.attack
        judged += pgd + settings.num_attacked * settings.character_queries * tokens * speed.forward
    plain = drawn * speed.training + recipe.privacy.steps * update
    return Estimate(
        seconds={
            "plain fine-tune": plain,
            "hardened training": plain + drawn * attack_steps * speed.attack,
            "evaluation of three models": judged * _MODELS_EVALUATED,
        },
        memory_bytes=memory_bytes,
        tokens_per_record=tokens,
        forward_ms_per_token=speed.forward * 1e3,
        training_ms_per_token=speed.training * 1e3,
        update_ms_per_step=update * 1e3,
    )


def _measure(recipe: Recipe, base: "BaseModel", tokens: int) -> _Speed:
    """Time the decoder on one small batch."""
    decoder = base.model.get_decoder()
    width = base.model.config.get_text_config().hidden_size
    embeds = torch.zeros((_PROBE_ROWS, tokens, width), dtype=base.dtype, device=base.device)

    def run(rows: int = _PROBE_ROWS) -> "Tensor":
        with computing_in(base.autocast, base.device):
            return decoder(inputs_embeds=embeds[:rows], use_cache=False).last_hidden_state.float()

    def forward() -> None:
        with torch.no_grad():
            run()

    def attack() -> None:
        torch.autograd.grad(run().sum(), embeds)

    per_forward = _seconds(forward, base) / embeds.shape[:2].numel()
    embeds.requires_grad_(True)
    per_attack = _seconds(attack, base) / embeds.shape[:2].numel()
    if recipe.training.method == "lora":
        per_training = per_attack
    else:
        with _trained(decoder, recipe) as grads:
            grads.backward(run(2).sum(dim=(1, 2)))  # the proof of isolation, on as few rows as it takes
            summed = torch.zeros(grads.num_params, device=base.device)

            def train() -> None:
                batch = grads.backward(run().sum(dim=(1, 2)))
                norms = batch.squared_norms()
                batch.accumulate(torch.ones_like(norms), summed)

            per_training = _seconds(train, base) / embeds.shape[:2].numel()
    again = per_forward if recipe.training.gradient_checkpointing else 0.0
    return _Speed(per_forward, per_attack + again, per_training + again * recipe.training.passes)


def _seconds(work: Callable[[], None], base: "BaseModel") -> float:
    """Time the better of two runs after a first one."""
    work()
    times = []
    for _ in range(2):
        started = time.perf_counter()
        work()
        if base.device.type == "cuda":
            torch.cuda.synchronize(base.device)
        times.append(time.perf_counter() - started)
    return min(times)


@contextlib.contextmanager
def _trained(decoder: "nn.Module", recipe: Recipe) -> Iterator[PerSampleGradients]:
    """Train a frozen decoder meanwhile."""
    decoder.requires_grad_(True)
    try:
        grads = PerSampleGradients(decoder, passes=recipe.training.passes)
        try:
            yield grads
        finally:
            grads.detach()
    finally:
        decoder.requires_grad_(False)


def _update_seconds(base: "BaseModel") -> float:
    """Time noise and update of a part of the weights, and scale."""
    part = torch.nn.Parameter(torch.zeros(_PROBE_PARAMETERS, device=base.device))
    part.grad = torch.ones_like(part)
    optimizer, noise = torch.optim.AdamW([part]), NoiseSource(key=bytes(32))

    def update() -> None:
        noise.normal(step=0, stream=0, start=0, count=len(part), stddev=1.0, device=base.device)
        optimizer.step()

    num_weights = sum(parameter.numel() for parameter in base.model.parameters())
    return _seconds(update, base) * num_weights / _PROBE_PARAMETERS
