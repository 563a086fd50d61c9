"""Memory of a process under each strategy, against sums by hand."""

import dataclasses
import io

import pytest
import torch
from rich.console import Console

from securetune.training.memory import (
    Distribution,
    ModelSize,
    Weights,
    count_adapters,
    distribute,
    measure_size,
    rank_memory,
)
from tests.sample_recipe import sample_recipe
from tests.tiny import tiny_llama

GIB = 1 << 30
# bfloat16 base of 10,000 weights, adapters of 400: 4 layers of 2,000 and 100, embeddings of 2,000
ADAPTERS = ModelSize(
    whole=Weights(10_000, 400),
    layer=Weights(2_000, 100),
    outside=Weights(2_000, 0),
    frozen_itemsize=2,
    activation_bytes=7_000,
    sample_bytes=300,
)
# the same model trained in full
FULL = dataclasses.replace(
    ADAPTERS, whole=Weights(0, 10_000), layer=Weights(0, 2_000), outside=Weights(0, 2_000)
)
BY_HAND = [
    # strategy, weights, sums, optimizer, gathered
    (ADAPTERS, "single", 21_600, 1_600, 3_200, 0),
    (ADAPTERS, "ddp", 21_600, 3_200, 3_200, 0),
    (ADAPTERS, "zero1", 21_600, 1_600 + 400, 1_200, 0),
    (ADAPTERS, "zero2", 21_600, 800 + 400, 1_200, 0),
    (ADAPTERS, "zero3", 5_400, 800 + 400, 1_200, 21_600),
    (ADAPTERS, "fsdp2", 5_400, 400 + 400, 800, 4_000 + 2 * 4_400),
    (FULL, "ddp", 40_000, 80_000, 80_000, 0),
    (FULL, "zero1", 40_000, 40_000 + 10_000, 30_000, 0),
    (FULL, "zero2", 40_000, 20_000 + 8_000, 30_000, 0),
    (FULL, "zero3", 10_000, 20_000 + 8_000, 30_000, 40_000),
    (FULL, "fsdp2", 10_000, 10_000 + 8_000, 20_000, 8_000 + 2 * 8_000),
]


@pytest.mark.parametrize(("size", "strategy", "weights", "sums", "optimizer", "gathered"), BY_HAND)
def test_four_processes_by_hand(size, strategy, weights, sums, optimizer, gathered):
    rank = rank_memory(strategy, 4, size)
    assert (rank.weights, rank.sums, rank.optimizer, rank.gathered) == (weights, sums, optimizer, gathered)
    training = weights + sums + optimizer + gathered + 7_300
    assert rank.total == max(training, rank.start) + rank.process
    assert rank.to_dict()["total"] == rank.total


def test_uneven_shards_are_as_large_as_the_largest():
    size = dataclasses.replace(ADAPTERS, whole=Weights(10_001, 0))
    assert rank_memory("fsdp2", 4, size).weights == 5_001  # 20,002 bytes / 4, rounded up


def test_two_passes_add_up_all_layers_and_early_stopping_keeps_a_copy():
    size = dataclasses.replace(FULL, passes=2, keeps_best=True)
    ddp, zero2, fsdp2 = (rank_memory(name, 4, size) for name in ("ddp", "zero2", "fsdp2"))
    assert (ddp.sums, ddp.optimizer) == (80_000, 80_000 + 40_000)
    assert (zero2.sums, zero2.optimizer) == (20_000 + 40_000, 30_000 + 10_000)
    assert (fsdp2.sums, fsdp2.optimizer) == (10_000 + 40_000, 20_000 + 10_000)


def test_a_process_holds_the_whole_model_before_it_is_shared_out():
    size = dataclasses.replace(FULL, activation_bytes=0, sample_bytes=0)
    rank = rank_memory("fsdp2", 100, size)
    assert rank.start == 40_000 + 2 * 40_000
    assert rank.total == rank.start + rank.process
    large = rank_memory("fsdp2", 100, dataclasses.replace(size, whole=Weights(0, 8 * 10**9)))
    assert large.start == 32 * 10**9 + 2 * GIB


@pytest.mark.parametrize(("strategy", "gathered"), [("ddp", 0), ("zero1", 40_000), ("fsdp2", 40_000)])
def test_on_a_cpu_the_first_process_holds_what_it_seals(strategy, gathered):
    size = dataclasses.replace(FULL, on_cpu=True, activation_bytes=0, sample_bytes=0)
    rank = rank_memory(strategy, 100, size)
    assert rank.end == rank.weights + rank.sums + rank.optimizer + gathered + 2 * 40_000
    assert rank.total == max(rank.start, rank.end) + rank.process
    large = rank_memory("fsdp2", 100, dataclasses.replace(size, whole=Weights(0, 8 * 10**9)))
    assert large.end == large.weights + large.sums + large.optimizer + 32 * 10**9 + 2 * GIB
    assert rank_memory(strategy, 100, FULL).end == 0


@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_one_process_gathers_nothing(strategy):
    assert rank_memory(strategy, 1, ADAPTERS).gathered == 0


def test_zero3_holds_a_billion_gathered_weights_of_a_large_model():
    size = dataclasses.replace(ADAPTERS, whole=Weights(8 * 10**9, 0))
    assert rank_memory("zero3", 8, size).gathered == 2 * 10**9
    assert rank_memory("zero3", 8, size).weights == 2 * 10**9


def test_a_large_model_fits_where_it_is_sharded(base):
    size = dataclasses.replace(FULL, whole=Weights(0, 8 * 10**9), layer=Weights(0, 2 * 10**8))
    distribution = distribute(size, base, num_processes=8, memory_bytes=60 * GIB)
    fits = {rank.strategy: distribution.fits(rank) for rank in distribution.ranks}
    assert fits == {"ddp": False, "fsdp2": True, "zero1": False, "zero2": True, "zero3": True}
    console = Console(width=200, file=io.StringIO())
    console.print(distribution.render())
    printed = console.file.getvalue()
    assert "Memory of each of 8 processes, about, in GiB; each has 60.0" in printed
    assert any("ddp" in line and line.rstrip(" │").endswith("no") for line in printed.splitlines())
    values = distribution.to_dict()
    assert [rank["fits"] for rank in values["ranks"]] == list(fits.values())


@pytest.fixture
def base():
    from securetune.models.base import BaseModel

    return BaseModel(
        model=tiny_llama(),
        tokenizer=None,
        name="tiny",
        digest="0" * 64,
        dtype=torch.float32,
        device=torch.device("cpu"),
        folder=None,
        description="tiny",
    )


def test_processes_of_a_cpu_share_its_memory(base):
    one, four = (distribute(ADAPTERS, base, num_processes=count) for count in (1, 4))
    assert isinstance(one, Distribution)
    assert four.available_bytes == one.available_bytes // 4


def test_sizes_of_a_model(base):
    recipe = sample_recipe({"training.micro_batch_tokens": 512, "data.max_length": 64})
    size = measure_size(recipe, base, tokens_per_record=32)
    model = base.model
    trained = count_adapters(recipe.training.lora, base)
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    total = sum(p.numel() for p in model.parameters())
    assert size.whole == Weights(total, trained)
    assert size.layer == Weights(layers[0], trained // 2)
    assert size.outside == Weights(total - sum(layers), 0)
    assert size.frozen_itemsize == 4
    assert size.sample_bytes == 4 * 16 * trained  # 512 tokens hold 16 records of 32


def test_sizes_of_a_model_that_is_trained_in_full(base):
    recipe = sample_recipe({"training.method": "full", "training.micro_batch_tokens": 512})
    size = measure_size(recipe, base, tokens_per_record=32)
    model = base.model
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    total = sum(p.numel() for p in model.parameters())
    assert size.whole == Weights(0, total)
    assert size.layer == Weights(0, layers[0])
    assert size.outside == Weights(0, total - sum(layers))
    assert size.sample_bytes == 2 * 4 * 16 * model.config.vocab_size  # label logits of 16 records
