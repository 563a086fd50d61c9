"""Step times from 1 to 1,024 processes: predicted, and up to 4 processes measured on this machine's CPU.

Rates of this machine come from one process (compute) and from two (links); the times for 2 and 4 processes
follow from them by the same formulae as those of a GPU cluster, and are compared with measured ones.
Collectives are counted in the measured runs first, and must be those of the formulae. What is not measured
says so.
"""

from __future__ import annotations

import importlib.util
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from ._clusters import DGX_H100, measure_links
from ._harness import (
    Agreement,
    Context,
    DoesNotFit,
    OutputsDiffer,
    Quantiles,
    Result,
    Timing,
    compare_times,
    plain_result,
    time_paired,
)
from ._scale import (
    STRATEGIES,
    Call,
    Cluster,
    Padding,
    Prediction,
    Shape,
    Strategy,
    calls_of,
    predict,
    shape_of,
    state_bytes,
)
from ._workers import run_workers
from .bench_distributed_step import PACKAGES, TINY, Private, count_collectives
from .bench_dp_lora_step import LLAMA_1B, Case, adapted_model

NAME = "scale"
MEASURED = (1, 2, 4)
SHOWN = (8, 128, 1024)  # of the sizes in docs/scale.md
EXPECTED_BATCH = 4096
TOKENS = 1024
MICRO_BATCH = 4
LORA_RANK = 16
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
SMALL = TINY | {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "vocab_size": 4096}
Engine = Literal["ddp", "fsdp2"]


def run(context: Context) -> Iterator[Result]:
    """Measure and predict small steps here, then predict those of large models on H100."""
    for package in ("transformers", "peft", "cryptography", "pydantic", "rfc8785"):
        if importlib.util.find_spec(package) is None:
            raise DoesNotFit(f"{package} is not installed.")
    if context.device.type == "cpu":
        yield from _validated(context)
    yield from _predicted(context)


def _validated(context: Context) -> Iterator[Result]:
    case = Case("tiny Llama", 2, 16, 4, torch.float32, TINY)
    if not context.quick:
        case = Case("small Llama", 8, 64, 8, torch.float32, SMALL)
    shape = shape_of(adapted_model(case, context.device), case.label, case.tokens)
    own = run_workers(_worker, 1, context.device, "ddp", case, context)[0]
    here: Cluster | None = None
    for size in MEASURED:
        for engine in ("ddp", "fsdp2") if size > 1 else ("ddp",):
            outcomes = (
                run_workers(_worker, size, context.device, engine, case, context) if size > 1 else [own]
            )
            calls = calls_of(engine, shape, size, 1, in_recipe=False)
            agreement = same_calls(outcomes[0], calls)
            slowest = Timing(tuple(map(max, zip(*(outcome["seconds"] for outcome in outcomes), strict=True))))
            if here is None:
                here = _this_machine(case.batch * shape.flops(private=True), slowest.quantiles.q50)
            elif math.isinf(here.node_link):
                here = here._replace(**outcomes[0]["links"])
            yield _side_by_side(engine, case, size, shape, here, slowest, agreement, context)


def _this_machine(flops: float, seconds: float) -> Cluster:
    """Return what one process tells: links come later, and its update is in the time of its passes."""
    return Cluster(
        name="this machine",
        per_node=1 << 20,
        compute=flops / seconds,
        memory=math.inf,
        node_link=math.inf,
        network=math.inf,
        start=0.0,
        node_hop=0.0,
        network_hop=0.0,
        tree_node_hop=math.inf,
        tree_network_hop=math.inf,
        side_hop=0.0,
        side_barrier=0.0,
    )


def _side_by_side(
    engine: Engine,
    case: Case,
    size: int,
    shape: Shape,
    here: Cluster,
    measured: Timing,
    agreement: Agreement,
    context: Context,
) -> Result:
    cores = os.cpu_count() or 1
    crowded = here._replace(compute=here.compute / max(1.0, size / cores))
    prediction = predict(
        engine,
        shape,
        size,
        crowded,
        expected_batch=case.batch * size,
        micro_batch=case.batch,
        padding=Padding(case.batch, 1),
        in_recipe=False,
    )
    role = "calibrates compute" if size == 1 else f"links calibrated with 2 processes, {cores} cores"
    return compare_times(
        NAME,
        measured,
        Timing((prediction.total,) * len(measured.seconds)),
        agreement,
        context,
        baseline_name="prediction",
        metric=f"{engine}_step_time",
        shape=f"{case.label} LoRA {size} x B={case.batch} T={case.tokens}",
        dtype="float32",
        packages=PACKAGES,
        note=f"{role}; predicted: passes {prediction.compute:.3g} s, collectives {prediction.exposed:.3g} s, "
        f"agreement {prediction.side:.3g} s",
    )


def same_calls(outcome: Any, calls: Sequence[Call]) -> Agreement:
    """Compare counted collectives, and the bytes of the kinds that carry weights and sums, with the formulae.

    Args:
        outcome: ``calls`` and ``given`` of a process, as ``CountCollectives`` has them.
        calls: The formulae's.

    Returns:
        That they are equal.

    Raises:
        OutputsDiffer: If they are not.
    """
    expected_calls: dict[str, float] = {}
    expected_bytes: dict[str, float] = {}
    side_kinds = {call.kind for call in calls if call.is_side}
    for call in calls:
        expected_calls[call.kind] = expected_calls.get(call.kind, 0) + call.times
        if call.kind not in side_kinds:
            expected_bytes[call.kind] = expected_bytes.get(call.kind, 0) + call.times * call.given
    in_buckets = {call.kind for call in calls if call.in_buckets}
    counted_calls = {kind: count for kind, count in outcome["calls"].items() if kind not in in_buckets}
    expected_calls = {kind: count for kind, count in expected_calls.items() if kind not in in_buckets}
    counted_bytes = {kind: outcome["given"].get(kind) for kind in expected_bytes}
    if counted_calls != expected_calls or counted_bytes != expected_bytes:
        raise OutputsDiffer(
            f"counted {outcome['calls']} with {counted_bytes} bytes, the formulae say {expected_calls} with "
            f"{expected_bytes}."
        )
    return Agreement("collectives and their bytes, counted", 0.0, 0.0)


def large_shapes() -> dict[str, Shape]:
    """Describe the large models, with adapters and in full, without making them."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    shapes: dict[str, Shape] = {}
    for label, config in (("Llama-1B", LLAMA_1B), ("Llama-8B", LLAMA_8B)):
        for mode in ("LoRA", "full"):
            with torch.device("meta"):
                made: Any = LlamaForCausalLM(LlamaConfig(**config))
                model: Any = made.to(torch.bfloat16)
                if mode == "LoRA":
                    adapters = LoraConfig(r=LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
                    model = get_peft_model(model, adapters)
            name = f"{label} {mode}"
            shapes[name] = shape_of(model, name, TOKENS)
    return shapes


def predicted_pair(strategy: Strategy, shape: Shape, size: int) -> tuple[Prediction, Prediction]:
    """Predict the private and the ordinary step on H100."""
    private, ordinary = (
        predict(
            strategy,
            shape,
            size,
            DGX_H100,
            expected_batch=EXPECTED_BATCH,
            micro_batch=MICRO_BATCH,
            private=private,
        )
        for private in (True, False)
    )
    return private, ordinary


def fits(strategy: Strategy, shape: Shape, size: int) -> bool:
    """Say whether parameters, sums and optimizer state fit into a device, before any activation."""
    return state_bytes(strategy, shape, size) < DGX_H100.memory_bytes


def _predicted(context: Context) -> Iterator[Result]:
    for name, shape in large_shapes().items():
        for size in SHOWN:
            for strategy in STRATEGIES:
                if not fits(strategy, shape, size):
                    continue
                private, ordinary = predicted_pair(strategy, shape, size)
                seconds = Quantiles(private.total, private.total, private.total)
                result = plain_result(
                    NAME,
                    f"{strategy}_step_time",
                    "s",
                    seconds,
                    context,
                    shape=f"{name} on {size} GPUs, batch {EXPECTED_BATCH} T={TOKENS}",
                    dtype="bfloat16",
                    note=f"prediction; ordinary step {ordinary.total:.4g} s",
                )
                yield replace(result, device=f"{DGX_H100.name} (data sheet)")


def _worker(engine: Engine, case: Case, context: Context) -> dict[str, Any]:
    from torch import distributed as dist

    from securetune.privacy.distributed import Processes

    processes = Processes()
    generator = torch.Generator().manual_seed(processes.rank)
    assert case.config is not None
    ids = torch.randint(0, case.config["vocab_size"], (case.batch, case.tokens), generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        step = Private(engine, processes, adapted_model(case, context.device), ids, Path(folder))
        rounds = 3 if context.quick else 15
        timing = time_paired({"ours": step.step}, context, rounds=rounds, warmup=2, reset=dist.barrier)[
            "ours"
        ]
        count = count_collectives(step.step)
    return {
        "seconds": timing.seconds,
        "calls": count.calls,
        "given": count.given,
        "links": measure_links(processes) if processes.size > 1 else {},
    }
