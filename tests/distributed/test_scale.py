"""The formulae of benchmarks/_scale.py against counted collectives of real runs and other sources."""

import math
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import scale_tables
from benchmarks._clusters import DGX_H100
from benchmarks._harness import OutputsDiffer
from benchmarks._scale import Call, calls_of, expected_padding, predict, seconds_of
from benchmarks._scale import Strategy as EngineName
from benchmarks._shapes import shape_of
from benchmarks._workers import CountCollectives, run_workers
from benchmarks.bench_dp_lora_step import ledger_header
from benchmarks.bench_scale import large_shapes, same_calls
from securetune.data.collate import length_buckets
from securetune.privacy.clipping import FlatClipping
from securetune.privacy.distributed import Processes, SharedLedger
from securetune.privacy.noise import NoiseSource
from securetune.privacy.sampling import PoissonSampler
from securetune.privacy.step import PrivateStep
from securetune.training.loop import Trainer, share_of
from securetune.training.strategy import Strategy
from tests.distributed.launching import group_of_one
from tests.per_sample_oracle import random_parameters
from tests.tiny import tiny_llama
from tests.unit.training.tiny_head import make_examples, make_head

CPU = torch.device("cpu")
KEY = bytes(range(32))
MICRO_BATCH_TOKENS = 24
STEPS = 5
DOCS = Path(__file__).resolve().parents[2] / "docs" / "scale.md"


def make_model(kind: str) -> Any:
    """A head with adapters, or all of the base model trained but its output layer."""
    if kind == "lora":
        return make_head(dtype=torch.float32)
    is_wide = kind in ("wide", "freed")  # so that ZeRO-3 does not keep all of it gathered
    model = random_parameters(
        tiny_llama(tie_word_embeddings=False, intermediate_size=3200 if is_wide else 64)
    )
    model.lm_head.requires_grad_(False)
    return make_head(model=model)


def count_steps(cases: list[tuple[EngineName, str]]) -> list[dict[str, Any]]:
    """Run the training loop for some steps of each case, and count the last; in each process."""
    processes = Processes()
    return [count_step(processes, engine, kind) for engine, kind in cases]


def count_step(processes: Processes, engine: EngineName, kind: str) -> dict[str, Any]:
    head, examples = make_model(kind), make_examples(14)
    strategy = Strategy(engine, processes)
    with pytest.MonkeyPatch.context() as patch:
        if kind == "freed":
            options = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
            patch.setattr("securetune.training.strategy._offloading", lambda _: options)
        prepared = strategy.prepare(head.model, lambda parameters: torch.optim.AdamW(parameters, lr=0.01))
    sampler = PoissonSampler(len(examples), 0.9, key=KEY)
    with tempfile.TemporaryDirectory() as folder:
        step = PrivateStep(
            prepared.grads,
            prepared.optimizer,
            clipping=FlatClipping(1.0),
            noise_multiplier=1.0,
            expected_batch_size=8,
            noise=NoiseSource(KEY),
            ledger=SharedLedger(Path(folder) / "ledger.jsonl", ledger_header(), processes),
            reduction=prepared.reduction,
        )
        trainer = Trainer(
            head,
            step,
            sampler,
            examples,
            micro_batch_tokens=MICRO_BATCH_TOKENS,
            strategy=strategy,
            within=prepared.within,
            filler=examples[0],
        )
        for number in range(1, STEPS):  # the proof that samples are apart takes passes of its own at first,
            trainer.run_step(number)  # and ZeRO-3 learns in which order it must gather
        processes.sent.clear()
        with CountCollectives() as count:
            trainer.run_step(STEPS)
    drawn = [examples[place] for place in sampler.draw(STEPS - 1)]
    shares = [share_of(drawn, rank, processes.size) for rank in range(processes.size)]
    micro_batches = [len(length_buckets(share, MICRO_BATCH_TOKENS)) for share in shares]
    prepared.grads.detach()
    return {
        "calls": count.calls,
        "given": count.given,
        "sent": dict(processes.sent),
        "micro_batches": max(micro_batches),
    }


CASES: list[tuple[EngineName, str]] = [
    *((name, kind) for name in ("ddp", "fsdp2", "zero1", "zero2", "zero3") for kind in ("lora", "full")),
    ("zero3", "wide"),
    ("zero3", "freed"),
]


@pytest.mark.parametrize("size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_formulae_are_what_real_runs_do(size, monkeypatch):
    cases = [case for case in CASES if size > 1 or not case[0].startswith("zero")]
    if size == 1:
        with group_of_one():
            outcomes = count_steps(cases)
    else:
        outcomes = run_workers(count_steps, size, CPU, cases)[0]
    for (engine, kind), outcome in zip(cases, outcomes, strict=True):
        shape = shape_of(make_model(kind).model, kind, tokens=8)
        if kind == "freed":
            monkeypatch.setattr("benchmarks._scale._REUSED", 0)
        calls = calls_of(engine, shape, size, outcome["micro_batches"])
        same_calls(outcome, calls)
        total = 4 * sum(parameter.entries for parameter in shape.trainable)
        reductions = 1 if engine in ("ddp", "zero1") else outcome["micro_batches"]
        if engine == "ddp" or size > 1:
            assert outcome["sent"]["reduce_scatter"] == total * reductions


def test_collectives_that_differ_are_told():
    outcome = {"calls": {"all_gather": 1}, "given": {"all_gather": 8}}
    with pytest.raises(
        OutputsDiffer, match=r"counted .*'all_gather': 1.* the formulae say .*'all_gather': 2"
    ):
        same_calls(outcome, [Call("all_gather", 8, 2)])


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_forward_flops_are_those_that_torch_counts(kind):
    head, tokens, samples = make_model(kind), 16, 3
    model = head.model.float()
    shape = shape_of(model, kind, tokens)
    model.config._attn_implementation = "eager"  # torch does not count the CPU's fused attention
    ids = torch.randint(0, 200, (samples, tokens))
    with FlopCounterMode(display=False) as count:
        model(input_ids=ids, use_cache=False)
    assert count.get_total_flops() == pytest.approx(samples * shape.forward, rel=0.02)


def test_padding_is_the_mean_of_drawn_samples():
    generator = random.Random(0)
    size, micro_batch, expected = 8, 2, 20.0
    shares, batches, draws = 0, 0, 4000
    for _ in range(draws):
        count = sum(generator.random() < expected / 2000 for _ in range(2000))
        largest = len(share_of(make_examples(1) * count, 0, size))
        shares += largest
        batches += math.ceil(largest / micro_batch)
    padding = expected_padding(expected, size, micro_batch)
    assert padding.share == pytest.approx(shares / draws, rel=0.02)
    assert padding.micro_batches == pytest.approx(batches / draws, rel=0.02)


def test_shapes_are_those_of_the_published_models():
    shapes = large_shapes()
    assert sum(p.entries for p in shapes["Llama-1B full"].trainable) == 1_235_814_400  # Llama 3.2 1B
    assert sum(p.entries for p in shapes["Llama-8B full"].trainable) == 8_030_261_248  # Llama 3.1 8B


def test_ring_time_is_bytes_over_the_slowest_link():
    call = Call("reduce_scatter", 64e9, 1)
    fast, slow = seconds_of(call, 8, DGX_H100), seconds_of(call, 16, DGX_H100)
    assert fast == pytest.approx(64e9 * 7 / 8 / 450e9, rel=1e-3)
    assert slow == pytest.approx(64e9 * 15 / 16 / 400e9, rel=1e-3)


def test_one_process_computes_only():
    shape = large_shapes()["Llama-1B LoRA"]
    prediction = predict("fsdp2", shape, 1, DGX_H100, expected_batch=100, micro_batch=4)
    assert prediction.exposed == prediction.side == 0
    assert prediction.compute == pytest.approx(100 * shape.flops(private=True) / DGX_H100.compute)


def test_tables_of_the_docs_are_those_of_the_tool():
    text = DOCS.read_text()
    for table in scale_tables.tables():
        assert table in text, "run python -m benchmarks.scale_tables and paste its output into docs/scale.md"
