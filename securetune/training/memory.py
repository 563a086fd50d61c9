"""Memory of one process under each strategy, by counting: an estimate for choosing, not a measurement.

``F`` frozen weights of ``b`` bytes, ``P`` trained float32 weights, ``W`` processes, and the weights of the
largest layer and of what is outside of layers (embeddings, head):

========  ===========  =====================  =========  ==============================
strategy  weights      sums of gradients      optimizer  gathered for use
========  ===========  =====================  =========  ==============================
single    bF + 4P      4P                     8P         -
ddp       bF + 4P      8P                     8P         -
zero1     bF + 4P      4P                     12P / W    -
zero2     bF + 4P      4P / W + one layer     12P / W    -
zero3     (bF+4P) / W  4P / W + one layer     12P / W    at most 10^9 weights
fsdp2     (bF+4P) / W  4P / W + one layer     8P / W     outside of layers + two layers
========  ===========  =====================  =========  ==============================

Adam keeps two float32 moments for each trained weight; DeepSpeed's optimizers keep a float32 master too.
Replicas under DDP hold the sum and what is released of it; elsewhere both are in one place. ZeRO-3 keeps up
to 10^9 weights gathered (its ``stage3_max_live_parameters``), so small models stay whole. Under every
strategy a process also holds the activations of a micro-batch and the gradients of its records.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from securetune.config.launch import STRATEGIES, StrategyName
from securetune.config.schema import Recipe
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
    """

    whole: Weights
    layer: Weights
    outside: Weights
    frozen_itemsize: int
    activation_bytes: int
    sample_bytes: int

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
        optimizer: Moments and masters.
        gathered: Weights of others, gathered for use.
        activations: What autograd keeps of one micro-batch.
        samples: Gradients of the records of one micro-batch.
        process: The process itself.
    """

    strategy: StrategyName
    weights: int
    sums: int
    optimizer: int
    gathered: int
    activations: int
    samples: int
    process: int = _PROCESS_BYTES

    @property
    def total(self) -> int:
        """All of it."""
        return sum(value for value in asdict(self).values() if isinstance(value, int))

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
    sums = 2 * trained if strategy == "ddp" else trained
    if is_sharded or strategy == "zero2":
        one_layer = _FLOAT32 * max(size.layer.trained, size.outside.trained)
        sums = _share(trained, num_processes) + one_layer
    optimizer = _MOMENTS * trained
    if strategy == "fsdp2":
        optimizer = _share(optimizer, num_processes)
    elif strategy.startswith("zero"):
        optimizer = _share((_MOMENTS + _MASTER) * trained, num_processes)
    gathered = 0
    if num_processes > 1 and strategy == "fsdp2":
        gathered = size.bytes_of(size.outside) + 2 * size.bytes_of(size.layer)
    elif num_processes > 1 and strategy == "zero3":
        count = size.whole.frozen + size.whole.trained
        gathered = whole * min(count, _LIVE_IN_ZERO3) // count
    return RankMemory(
        strategy,
        weights=_share(whole, num_processes) if is_sharded else whole,
        sums=sums,
        optimizer=optimizer,
        gathered=gathered,
        activations=size.activation_bytes,
        samples=size.sample_bytes,
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
        for heading in ("", "weights", "sums", "optimizer", "gathered", "micro-batch", "total", "fits"):
            table.add_column(heading)
        for rank in self.ranks:
            parts = (
                rank.weights,
                rank.sums,
                rank.optimizer,
                rank.gathered,
                rank.activations + rank.samples,
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


def measure_size(
    recipe: Recipe, base: "BaseModel", *, num_trained: int, tokens_per_record: float
) -> ModelSize:
    """Count the weights of a base model with adapters, and the numbers of a micro-batch.

    Args:
        recipe: The recipe.
        base: The base model.
        num_trained: Weights of all adapters.
        tokens_per_record: Mean record length.

    Returns:
        The sizes.
    """
    config = base.model.config.get_text_config()
    hidden, num_layers = config.hidden_size, config.num_hidden_layers
    feed_forward = getattr(config, "intermediate_size", None) or 4 * hidden
    item = base.dtype.itemsize
    per_token = num_layers * (_HIDDEN_VECTORS * hidden + _FEED_FORWARD_VECTORS * feed_forward) * item
    rows = max(1, recipe.training.micro_batch_tokens // max(1, round(tokens_per_record)))
    total = sum(parameter.numel() for parameter in base.model.parameters())
    blocks = blocks_of(base.model)
    layers = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks] or [total]
    return ModelSize(
        whole=Weights(total, num_trained),
        layer=Weights(max(layers), _share(num_trained, len(layers))),
        outside=Weights(max(0, total - sum(layers)), 0),
        frozen_itemsize=item,
        activation_bytes=recipe.training.micro_batch_tokens * per_token,
        sample_bytes=_FLOAT32 * rows * num_trained,
    )


def _memory_here(base: "BaseModel", num_processes: int) -> int:
    if base.device.type == "cuda":
        import torch

        return torch.cuda.get_device_properties(base.device).total_memory
    import psutil

    return psutil.virtual_memory().total // num_processes


def _share(count: int, num_processes: int) -> int:
    return -(-count // num_processes)
