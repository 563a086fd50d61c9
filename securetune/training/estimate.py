"""Time and memory of a run on this machine: what can be measured is measured, the rest is counted."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from securetune.config.schema import LoraConfig, Recipe
from securetune.models.base import computing_in
from securetune.privacy.noise import NoiseSource
from securetune.privacy.per_sample import PerSampleGradients

if TYPE_CHECKING:
    from torch import Tensor, nn

    from securetune.models.base import BaseModel

_MODELS_EVALUATED = 3  # base, plain, hardened
_PROBE_ROWS = 16
_PROBE_PARAMETERS = 1 << 22  # noise and update of so many are timed
# Activations that autograd keeps, in numbers per token and layer: measured on Llama-shaped models as about 18
# vectors of the hidden size and 6 of the feed-forward size.
_HIDDEN_VECTORS, _FEED_FORWARD_VECTORS = 18, 6
# Layers that are trained keep their inputs too (2 and 1), and until the norms are known inputs and output
# gradients alone (7 and 3): the tensors that are alive on such models, counted.
_TRAINED_HIDDEN, _TRAINED_FEED_FORWARD = 20, 7
_FACTOR_HIDDEN, _FACTOR_FEED_FORWARD = 7, 3
# Bytes per weight that is trained: itself, the sum, two moments of Adam. On a CPU two more vectors come and
# go in its update, and when the state is saved.
_STATE_BYTES, _UPDATE_BYTES = 16, 8
PROCESS_BYTES = 900 << 20  # Python, torch and transformers themselves


@dataclass(frozen=True)
class Estimate:
    """Predicted cost of a run on this machine.

    Attributes:
        seconds: Predicted wall-clock seconds by stage.
        memory_bytes: Predicted peak memory of the process.
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


def estimate_cost(recipe: Recipe, base: "BaseModel", tokens: float) -> Estimate:
    """Predict time and memory of a run.

    Args:
        recipe: The recipe.
        base: The base model, frozen as it was loaded.
        tokens: Mean record length.

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
        memory_bytes=_memory(recipe, base, tokens),
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

    def run() -> "Tensor":
        with computing_in(base.autocast, base.device):
            return decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state.float()

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

    return _seconds(update, base) * _num_weights(base) / _PROBE_PARAMETERS


def _num_weights(base: "BaseModel") -> int:
    return sum(parameter.numel() for parameter in base.model.parameters())


def _memory(recipe: Recipe, base: "BaseModel", tokens: float) -> int:
    settings, num_weights = recipe.training, _num_weights(base)
    if settings.method == "full":
        weights = _STATE_BYTES + (_UPDATE_BYTES if base.device.type == "cpu" else 0)
        weights += 4 if settings.early_stopping.method != "none" else 0
        weights += 0 if base.autocast is None else base.autocast.itemsize
    else:
        weights = base.dtype.itemsize
    fixed = PROCESS_BYTES + num_weights * weights
    return fixed + activation_bytes(recipe, base) + sample_bytes(recipe, base, tokens)


def activation_bytes(recipe: Recipe, base: "BaseModel") -> int:
    """Count what autograd and the per-sample gradients keep of the decoder's layers in a micro-batch.

    Args:
        recipe: The recipe.
        base: The base model.

    Returns:
        Bytes.
    """
    settings = recipe.training
    config = base.model.config.get_text_config()
    hidden, layers = config.hidden_size, config.num_hidden_layers
    feed_forward = getattr(config, "intermediate_size", None) or 4 * hidden
    one_layer = _HIDDEN_VECTORS * hidden + _FEED_FORWARD_VECTORS * feed_forward
    factors = 0
    if settings.method == "full":
        one_layer = _TRAINED_HIDDEN * hidden + _TRAINED_FEED_FORWARD * feed_forward
        if settings.passes == 1:
            factors = _FACTOR_HIDDEN * hidden + _FACTOR_FEED_FORWARD * feed_forward
    per_token = one_layer * layers
    if settings.gradient_checkpointing:
        per_token = one_layer + (hidden + factors) * layers
    return settings.micro_batch_tokens * per_token * base.dtype.itemsize


def sample_bytes(recipe: Recipe, base: "BaseModel", tokens: float) -> int:
    """Count the gradients of a micro-batch that are kept until norms are known: of adapters, or of logits.

    Args:
        recipe: The recipe.
        base: The base model.
        tokens: Mean record length.

    Returns:
        Bytes.
    """
    rows = _rows(recipe, tokens)
    if recipe.training.method == "lora":
        return 4 * rows * count_trained(recipe, base)
    positions = rows if recipe.task == "classify" else recipe.training.micro_batch_tokens
    return 2 * 4 * positions * base.model.config.get_text_config().vocab_size


def count_trained(recipe: Recipe, base: "BaseModel") -> int:
    """Count the weights that a recipe trains.

    Args:
        recipe: The recipe.
        base: The base model.

    Returns:
        The number.
    """
    lora = recipe.training.lora
    return _num_weights(base) if lora is None else _adapter_parameters(lora, base)


def _rows(recipe: Recipe, tokens: float) -> int:
    return max(1, recipe.training.micro_batch_tokens // max(1, round(tokens)))


def _adapter_parameters(lora: LoraConfig, base: "BaseModel") -> int:
    total = 0
    output = base.model.get_output_embeddings()
    for name, module in base.model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.ndim != 2:
            continue
        if module is output or isinstance(module, torch.nn.Embedding):
            continue
        if lora.target_modules == "all-linear" or name.rpartition(".")[2] in lora.target_modules:
            total += lora.rank * sum(weight.shape)
    return total
