"""Step times from 1 to 1,024 processes: predicted, and up to 4 processes measured on this machine's CPU.

How fast this machine computes a step comes from one process. What 2 and 4 processes get of it, and how fast
they copy and send, comes from products, copies and collectives of their own, all at once; what a step takes
with next to nothing to compute or to send comes from a model of the same layers, but narrow. From these rates
the times for 2 and 4 processes follow by the formulae of a GPU cluster, and are compared with measured ones.
Collectives are counted in the measured runs first, and must be those of the formulae. What is not measured
says so.
"""

from __future__ import annotations

import importlib.util
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ._clusters import DGX_H100, measure_rates
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
    Strategy,
    calls_of,
    predict,
    state_bytes,
)
from ._shapes import Shape, shape_of
from ._workers import CountCollectives, run_workers
from .bench_distributed_step import PACKAGES, TINY, Private, count_collectives
from .bench_dp_lora_step import LLAMA_1B, Case, adapted_model

if TYPE_CHECKING:
    from securetune.privacy.distributed import Processes

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
NARROW = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 32}


def run(context: Context) -> Iterator[Result]:
    """Measure and predict small steps here, then predict those of large models on H100."""
    for package in ("transformers", "peft", "cryptography", "pydantic", "rfc8785"):
        if importlib.util.find_spec(package) is None:
            raise DoesNotFit(f"{package} is not installed.")
    if context.device.type == "cpu":
        yield from _validated(context)
    yield from _predicted(context)


def _validated(context: Context) -> Iterator[Result]:
    case, config = Case("small Llama", 8, 64, 8, torch.float32, SMALL), SMALL
    if context.quick:
        case, config = Case("tiny Llama", 2, 16, 4, torch.float32, TINY), TINY
    narrow = Case("narrow Llama", 1, 4, 1, torch.float32, config | NARROW)
    shape = shape_of(adapted_model(case, context.device), case.label, case.tokens)
    strategies: list[Strategy] = [
        name for name in STRATEGIES if importlib.util.find_spec("deepspeed") or "zero" not in name
    ]
    efficiency, lines = 1.0, [["processes", "strategy", "predicted", "measured", "measured / predicted"]]
    for size in MEASURED:
        names: list[Strategy] = strategies if size > 1 else ["ddp"]
        outcomes = run_workers(_worker, size, context.device, names, case, narrow, context)
        for name in names:
            measured, fixed = (_slowest(outcomes, name, model) for model in ("case", "narrow"))
            agreement = same_calls(outcomes[0][name], calls_of(name, shape, size, 1, in_recipe=False))
            rates = dict(outcomes[0]["rates"])
            if size == 1:  # what a step computes in a second, over what products alone do
                seconds = max(measured.quantiles.q50 - fixed.quantiles.q50, 1e-9)
                efficiency = case.batch * shape.flops(private=True) / seconds / rates["compute"]
            rates["compute"] *= efficiency
            here = _this_machine(fixed.quantiles.q50, rates)
            result = _side_by_side(name, case, size, shape, here, measured, agreement, context)
            lines.append(_line(size, name, result))
            yield result
    print(markdown(lines[0], lines[1:]))


def _slowest(outcomes: Sequence[Any], name: str, model: str) -> Timing:
    """Return how long the slowest process took in each round."""
    return Timing(tuple(map(max, zip(*(outcome[name][model] for outcome in outcomes), strict=True))))


def _this_machine(fixed: float, rates: dict[str, float]) -> Cluster:
    """Describe processes of this machine, whose latencies are all in the fixed time."""
    return Cluster(
        name="this machine",
        per_node=1 << 20,
        compute=rates["compute"],
        memory=math.inf,
        node_link=rates.get("node_link", math.inf),
        network=math.inf,
        start=0.0,
        node_hop=0.0,
        network_hop=0.0,
        tree_node_hop=math.inf,
        tree_network_hop=math.inf,
        side_hop=0.0,
        side_barrier=0.0,
        copies=rates["copies"],
        gather_link=rates.get("gather_link"),
        hides=False,
        fixed=fixed,
    )


def _side_by_side(
    strategy: Strategy,
    case: Case,
    size: int,
    shape: Shape,
    here: Cluster,
    measured: Timing,
    agreement: Agreement,
    context: Context,
) -> Result:
    prediction = predict(
        strategy,
        shape,
        size,
        here,
        expected_batch=case.batch * size,
        micro_batch=case.batch,
        padding=Padding(case.batch, 1),
        in_recipe=False,
    )
    parts = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in prediction._asdict().items())
    return compare_times(
        NAME,
        measured,
        Timing((prediction.total,) * len(measured.seconds)),
        agreement,
        context,
        baseline_name="prediction",
        metric=f"{strategy}_step_time",
        shape=f"{case.label} LoRA {size} x B={case.batch} T={case.tokens}",
        dtype="float32",
        packages=PACKAGES,
        note=("calibrates compute; " if size == 1 else "") + f"predicted: {parts}",
    )


def _line(size: int, strategy: str, result: Result) -> list[str]:
    seen = result.quantiles
    ratios = ", ".join(f"{seen[name]:.2f}" for name in ("ratio_q20", "ratio_q50", "ratio_q80"))
    times = [f"{(seconds or 0) * 1e3:,.0f} ms" for seconds in (result.baseline_value, seen["q50"])]
    return [f"{size}", strategy, *times, "(sets the compute)" if size == 1 else ratios]


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """Write a table in Markdown, whose columns are numbers but for the first."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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


def _worker(names: Sequence[Strategy], case: Case, narrow: Case, context: Context) -> dict[str, Any]:
    from securetune.privacy.distributed import Processes

    processes = Processes()
    found: dict[str, Any] = {"rates": measure_rates(processes)}
    for name in names:
        seconds, _ = _time_steps(name, narrow, processes, context)
        found[name] = {"narrow": seconds}
        found[name]["case"], count = _time_steps(name, case, processes, context)
        found[name] |= {"calls": count.calls, "given": count.given}
    return found


def _time_steps(
    strategy: Strategy, case: Case, processes: Processes, context: Context
) -> tuple[tuple[float, ...], CountCollectives]:
    """Return the seconds of some steps, and the collectives of one."""
    from torch import distributed as dist

    generator = torch.Generator().manual_seed(processes.rank)
    assert case.config is not None
    ids = torch.randint(0, case.config["vocab_size"], (case.batch, case.tokens), generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        step = Private(strategy, processes, adapted_model(case, context.device), ids, Path(folder))
        rounds = 3 if context.quick else 7
        timings = time_paired({"ours": step.step}, context, rounds=rounds, warmup=3, reset=dist.barrier)
        count = count_collectives(step.step)
        step.prepared.grads.detach()
    return timings["ours"].seconds, count
