"""Memory of one process under each strategy, by counting: an estimate for choosing, not a measurement.

``F`` frozen weights of ``b`` bytes, ``P`` trained float32 weights, ``W`` processes, and the weights of the
largest layer and of what is outside of layers (embeddings, head):

========  ===========  =====================  =========  ==============================
strategy  weights      sums of gradients      optimizer  gathered for use
========  ===========  =====================  =========  ==============================
single    bF + 4P      4P                     8P         -
ddp       bF + 4P      8P                     8P         -
zero1     bF + 4P      4P + 4P / W            12P / W    -
zero2     bF + 4P      8P / W + one layer     12P / W    -
zero3     (bF+4P) / W  8P / W + one layer     12P / W    at most 10^9 weights
fsdp2     (bF+4P) / W  4P / W + one layer     8P / W     outside of layers + two layers
========  ===========  =====================  =========  ==============================

Before the model is shared out, each process holds the whole of it, and the first one checks its gradients,
at most 2 GiB of them at once. At the end the first one holds all that was trained beside its shares, on the
CPU, and seals it: files of at most 1 GiB, two of them at once. Adam keeps two float32 moments for each
trained weight; DeepSpeed's optimizers keep a float32 master too. DDP and ZeRO hold the sum and, beside it,
what is released of it; elsewhere both are in one place. ZeRO-3 keeps up to 10^9 weights gathered (its
``stage3_max_live_parameters``), so small models stay whole. Early stopping keeps one more copy of the
trained weights, shared out like the moments. Under every strategy a process also holds the activations of a
micro-batch and the gradients of its records. What the C library keeps of freed memory is not counted.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from securetune.config.launch import STRATEGIES, StrategyName
from securetune.config.schema import LoraConfig, Recipe
from securetune.models.weights import SHARD_BYTES
from securetune.privacy.per_sample.self_check import CHECKED_AT_ONCE
from securetune.training.strategy import blocks_of

if TYPE_CHECKING:
    from rich.table import Table

    from securetune.models.base import BaseModel

_FLOAT32 = 4
_MOMENTS, _MASTER = 2, 1
_LIVE_IN_ZERO3 = 10**9  # default of stage3_max_live_parameters
# Activations that autograd keeps, in numbers per token and layer: measured on Llama-shaped models as about 18
# vectors of the hidden size and 6 of the feed-forward size.
_HIDDEN_VECTORS, _FEED_FORWARD_VECTORS = 18, 6
# Layers that are trained keep their inputs too (2 of the hidden, 1 of the feed-forward size). Once they are
# differentiated, and until the norms are known, inputs and output gradients alone are kept.
_INPUT_VECTORS, _FACTOR_HIDDEN_VECTORS, _FACTOR_FEED_FORWARD_VECTORS = 2, 7, 3
_PROCESS_BYTES = 900 << 20  # Python, torch and transformers themselves


@dataclass(frozen=True)
class Weights:
    """Numbers of weights: of a model, of a layer, or of what is outside of layers.

    Attributes:
        frozen: Frozen weights.
        trained: Trained weights, in float32.
    """

    frozen: int
    trained: int


@dataclass(frozen=True)
class ModelSize:
    """What the memory of a process depends on.

    Attributes:
        whole: All weights.
        layer: Those of the largest layer.
        outside: Those outside of layers.
        frozen_itemsize: Bytes of a frozen weight.
        activation_bytes: What autograd keeps of one micro-batch.
        sample_bytes: Gradients of the records of one micro-batch.
        passes: Backward passes of a micro-batch; two add up all layers before any is reduced.
        keeps_best: Whether early stopping keeps a copy of the best weights.
        on_cpu: Whether the device is the CPU, whose memory also holds what is sealed at the end.
    """

    whole: Weights
    layer: Weights
    outside: Weights
    frozen_itemsize: int
    activation_bytes: int
    sample_bytes: int
    passes: int = 1
    keeps_best: bool = False
    on_cpu: bool = False

    def bytes_of(self, weights: Weights) -> int:
        """Return the bytes of some weights."""
        return self.frozen_itemsize * weights.frozen + _FLOAT32 * weights.trained


@dataclass(frozen=True)
class RankMemory:
    """Predicted peak memory of one process, in bytes.

    Attributes:
        strategy: How processes share the model and its training.
        weights: Weights that the process owns.
        sums: Float32 sums of clipped gradients.
        optimizer: Moments, masters and the best weights of early stopping.
        gathered: Weights of others, gathered for use.
        activations: What autograd keeps of one micro-batch.
        samples: Gradients of the records of one micro-batch.
        start: Before the model is shared out: the whole of it, and what the self-check compares at once.
        end: While the first process seals what was trained, if that is in the same memory; else 0.
        process: The process itself.
    """

    strategy: StrategyName
    weights: int
    sums: int
    optimizer: int
    gathered: int
    activations: int
    samples: int
    start: int
    end: int
    process: int = _PROCESS_BYTES

    @property
    def total(self) -> int:
        """The largest of the peaks at the start, in training and at the end."""
        training = self.weights + self.sums + self.optimizer + self.gathered + self.activations + self.samples
        return max(self.start, training, self.end) + self.process

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it, with the total."""
        return {**asdict(self), "total": self.total}


def rank_memory(strategy: StrategyName, num_processes: int, size: ModelSize) -> RankMemory:
    """Count the memory of one process.

    Args:
        strategy: How processes share the model and its training.
        num_processes: Number of processes, >= 1.
        size: The model and a micro-batch.

    Returns:
        The parts, as the table of this module gives them.
    """
    is_sharded = strategy in ("fsdp2", "zero3")
    whole, trained = size.bytes_of(size.whole), _FLOAT32 * size.whole.trained
    sums = trained
    if is_sharded or strategy == "zero2":
        at_once = trained
        if size.passes == 1:
            at_once = _FLOAT32 * max(size.layer.trained, size.outside.trained)
        sums = _share(trained, num_processes) + at_once
    if strategy == "ddp":
        sums += trained  # what is released
    elif strategy.startswith("zero"):
        sums += _share(trained, num_processes)
    checked = 2 * min(trained, _FLOAT32 * CHECKED_AT_ONCE)
    copies = _MOMENTS + size.keeps_best + (_MASTER if strategy.startswith("zero") else 0)
    is_whole = strategy in ("single", "ddp")
    optimizer = copies * trained if is_whole else _share(copies * trained, num_processes)
    gathered = 0
    if num_processes > 1 and strategy == "fsdp2":
        gathered = size.bytes_of(size.outside) + 2 * size.bytes_of(size.layer)
    elif num_processes > 1 and strategy == "zero3":
        count = size.whole.frozen + size.whole.trained
        gathered = whole * min(count, _LIVE_IN_ZERO3) // count
    weights = _share(whole, num_processes) if is_sharded else whole
    end = 0
    if size.on_cpu:
        gathered_to_seal = 0 if is_whole else trained
        end = weights + sums + optimizer + gathered_to_seal + 2 * min(trained, SHARD_BYTES)
    return RankMemory(
        strategy,
        weights=weights,
        sums=sums,
        optimizer=optimizer,
        gathered=gathered,
        activations=size.activation_bytes,
        samples=size.sample_bytes,
        start=whole + checked,
        end=end,
    )


@dataclass(frozen=True)
class Distribution:
    """Predicted memory of each of several processes.

    Attributes:
        num_processes: Number of processes.
        available_bytes: Memory that each of them has.
        ranks: One entry per strategy.
    """

    num_processes: int
    available_bytes: int
    ranks: list[RankMemory]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return {
            "num_processes": self.num_processes,
            "available_bytes": self.available_bytes,
            "ranks": [{**rank.to_dict(), "fits": self.fits(rank)} for rank in self.ranks],
        }

    def fits(self, rank: RankMemory) -> bool:
        """Say whether a process has as much memory as a strategy needs."""
        return rank.total <= self.available_bytes

    def render(self) -> "Table":
        """Return it as a rich table for a terminal."""
        from rich.table import Table

        title = (
            f"Memory of each of {self.num_processes:,} processes, about, in GiB; each has "
            f"{self.available_bytes / 2**30:.1f}"
        )
        table = Table(title=title, title_justify="left")
        parts_of = ("weights", "sums", "optimizer", "gathered", "micro-batch", "at start", "at end")
        for heading in ("", *parts_of, "total", "fits"):
            table.add_column(heading)
        for rank in self.ranks:
            parts = (
                rank.weights,
                rank.sums,
                rank.optimizer,
                rank.gathered,
                rank.activations + rank.samples,
                rank.start,
                rank.end,
                rank.total,
            )
            figures = [f"{part / 2**30:.2f}" for part in parts]
            table.add_row(rank.strategy, *figures, "yes" if self.fits(rank) else "no")
        return table


def distribute(
    size: ModelSize, base: "BaseModel", *, num_processes: int, memory_bytes: int | None = None
) -> Distribution:
    """Predict the memory of each of several processes under every strategy they can have.

    Args:
        size: The model and a micro-batch.
        base: The base model, for its device.
        num_processes: Number of processes, >= 1.
        memory_bytes: Memory that each of them has; None takes what this machine has: a GPU's memory, or a
            process' part of the memory of the CPU.

    Returns:
        The prediction.
    """
    available = memory_bytes or _memory_here(base, num_processes)
    ranks = [rank_memory(strategy, num_processes, size) for strategy in STRATEGIES if strategy != "single"]
    return Distribution(num_processes, available, ranks)


def measure_size(recipe: Recipe, base: "BaseModel", *, tokens_per_record: float) -> ModelSize:
    """Count the weights of a base model with what is trained of it, and the numbers of a micro-batch.

    Args:
        recipe: The recipe.
        base: The base model, in the weights the recipe trains.
        tokens_per_record: Mean record length.

    Returns:
        The sizes.
    """
    settings, item = recipe.training, base.dtype.itemsize
    rows = max(1, settings.micro_batch_tokens // max(1, round(tokens_per_record)))
    total = sum(parameter.numel() for parameter in base.model.parameters())
    blocks = blocks_of(base.model)
    layers = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks] or [total]
    outside = max(0, total - sum(layers))
    activations = settings.micro_batch_tokens * _numbers_per_token(recipe, base) * item
    on_cpu = base.device.type == "cpu"
    keeps_best = settings.early_stopping.method != "none"
    if settings.lora is not None:
        num_trained = count_adapters(settings.lora, base)
        return ModelSize(
            whole=Weights(total, num_trained),
            layer=Weights(max(layers), _share(num_trained, len(layers))),
            outside=Weights(outside, 0),
            frozen_itemsize=item,
            activation_bytes=activations,
            sample_bytes=_FLOAT32 * rows * num_trained,
            keeps_best=keeps_best,
            on_cpu=on_cpu,
        )
    activations += 0 if base.autocast is None else base.autocast.itemsize * total  # weights as they compute
    if on_cpu:  # in the update two vectors of all weights come and go
        activations = max(activations, 2 * _FLOAT32 * total)
    # gradients of the logits, at one token of each record or at all, kept and then joined
    positions = rows if recipe.task == "classify" else settings.micro_batch_tokens
    return ModelSize(
        whole=Weights(0, total),
        layer=Weights(0, max(layers)),
        outside=Weights(0, outside),
        frozen_itemsize=item,
        activation_bytes=activations,
        sample_bytes=2 * _FLOAT32 * positions * base.model.config.get_text_config().vocab_size,
        passes=settings.passes,
        keeps_best=keeps_best,
        on_cpu=on_cpu,
    )


def _numbers_per_token(recipe: Recipe, base: "BaseModel") -> int:
    """Count the numbers that a token keeps in all layers until they are differentiated."""
    config = base.model.config.get_text_config()
    hidden, num_layers = config.hidden_size, config.num_hidden_layers
    feed_forward = getattr(config, "intermediate_size", None) or 4 * hidden
    one_layer = _HIDDEN_VECTORS * hidden + _FEED_FORWARD_VECTORS * feed_forward
    factors = 0
    if recipe.training.method == "full":
        one_layer += _INPUT_VECTORS * hidden + feed_forward
        if recipe.training.passes == 1:
            factors = _FACTOR_HIDDEN_VECTORS * hidden + _FACTOR_FEED_FORWARD_VECTORS * feed_forward
    if recipe.training.gradient_checkpointing:
        return one_layer + (hidden + factors) * num_layers
    return one_layer * num_layers


def count_adapters(lora: LoraConfig, base: "BaseModel") -> int:
    """Count the weights of all adapters.

    Args:
        lora: The recipe's ``training.lora`` section.
        base: The base model.

    Returns:
        The number.
    """
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


def _memory_here(base: "BaseModel", num_processes: int) -> int:
    if base.device.type == "cuda":
        return torch.cuda.get_device_properties(base.device).total_memory
    import psutil

    return psutil.virtual_memory().total // num_processes


def _share(count: int, num_processes: int) -> int:
    return -(-count // num_processes)
