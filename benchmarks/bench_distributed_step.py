"""One DP-LoRA step on two processes against the ordinary LoRA step under torch's own DDP and FSDP2.

Both arms of a pair run the same model on the same batches, one batch for each process, and update with AdamW.
The private one also clips each sample, adds noise, and charges a ledger that both processes share. Released
gradients are compared first, without clipping and noise. A round takes as long as its slowest process.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ._harness import (
    Agreement,
    Context,
    DoesNotFit,
    Result,
    Timing,
    check_agreement,
    compare_memory,
    compare_times,
    time_paired,
)
from ._workers import CountCollectives, run_workers
from .bench_dp_lora_step import (
    LEARNING_RATE,
    LLAMA_1B,
    MAX_GRAD_NORM,
    SMOLLM2,
    Case,
    adapted_model,
    ledger_header,
)

if TYPE_CHECKING:
    from securetune.config.launch import StrategyName
    from securetune.privacy.distributed import Processes

NAME = "distributed_step"
PROCESSES = 2
PACKAGES = ("transformers", "peft")
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
Engine = Literal["ddp", "fsdp2"]
BASELINES = {"ddp": "DistributedDataParallel", "fsdp2": "fully_shard"}
_ROUNDS = {"ddp": 11, "fsdp2": 5}  # a round of the sharded model takes much longer on a CPU
MIB = 2**20


def run(context: Context) -> Iterator[Result]:
    """Measure time and bytes of a step, first over whole and then over sharded models."""
    for package in ("transformers", "peft", "cryptography", "pydantic", "rfc8785"):
        if importlib.util.find_spec(package) is None:
            raise DoesNotFit(f"{package} is not installed.")
    if context.device.type == "cuda" and torch.cuda.device_count() < PROCESSES:
        raise DoesNotFit(f"needs {PROCESSES} GPUs. On the CPU: --device cpu.")
    case = Case("SmolLM2-135M", 4, 64, 8, torch.float32)
    if context.quick:
        case = Case("tiny Llama", 2, 16, 4, torch.float32, TINY)
    elif context.device.type == "cuda":
        case = Case("Llama-1B", 16, 1024, 16, torch.bfloat16, LLAMA_1B)
    for engine in ("ddp", "fsdp2"):
        with tempfile.TemporaryDirectory() as folder:
            outcomes = run_workers(_worker, PROCESSES, context.device, engine, case, context, Path(folder))
        yield from _compare(engine, case, outcomes, context)


def _compare(engine: Engine, case: Case, outcomes: list[Any], context: Context) -> Iterator[Result]:
    slowest = {
        arm: Timing(tuple(map(max, *(outcome["seconds"][arm] for outcome in outcomes))))
        for arm in ("ours", "plain")
    }
    own = outcomes[0]
    agreement = Agreement(*own["agreement"])
    sent = ", ".join(f"{kind} {count / MIB:.2f} MiB" for kind, count in own["sent"].items())
    common = {
        "shape": f"{case.label} {PROCESSES} x B={case.batch} T={case.tokens} r={case.rank} all-linear",
        "dtype": str(case.dtype).removeprefix("torch."),
        "packages": PACKAGES,
        "baseline_name": f"torch {torch.__version__} {BASELINES[engine]}, no privacy",
    }
    note = f"process 0 gave each step: {sent}; collectives: ours {_listed(own, 'ours')}, baseline "
    note += _listed(own, "plain")
    yield compare_times(
        NAME,
        slowest["ours"],
        slowest["plain"],
        agreement,
        context,
        metric=f"{engine}_step_time",
        note=note,
        **common,
    )
    yield compare_memory(
        NAME,
        own["ring"]["ours"],
        own["ring"]["plain"],
        agreement,
        context,
        metric=f"{engine}_bytes_sent",
        note="each process to its neighbour on a ring",
        **common,
    )


def _listed(outcome: Any, arm: str) -> str:
    return ", ".join(f"{kind} x{count}" for kind, count in sorted(outcome["calls"][arm].items()))


def _worker(engine: Engine, case: Case, context: Context, folder: Path) -> dict[str, Any]:
    from securetune.privacy.distributed import Processes

    processes = Processes()
    generator = torch.Generator().manual_seed(processes.rank)
    vocab = (case.config or SMOLLM2)["vocab_size"]
    ids = torch.randint(0, vocab, (case.batch, case.tokens), generator=generator).to(context.device)
    ours = Private(engine, processes, adapted_model(case, context.device), ids, folder)
    plain = _Plain(engine, adapted_model(case, context.device), ids)
    tolerance = 1e-4 if case.dtype == torch.float32 else 5e-2
    agreement = check_agreement(
        "released gradient, unclipped and without noise",
        ours.unclipped(),
        plain.gradient(),
        tolerance=tolerance,
    )
    arms: dict[str, Callable[[], object]] = {"ours": ours.step, "plain": plain.step}
    rounds = 3 if context.quick else _ROUNDS[engine]
    timings = time_paired(arms, context, rounds=rounds, warmup=1, reset=dist.barrier)
    counted = {name: count_collectives(step) for name, step in arms.items()}
    processes.sent.clear()
    ours.step()
    return {
        "seconds": {name: timing.seconds for name, timing in timings.items()},
        "agreement": agreement,
        "calls": {name: count.calls for name, count in counted.items()},
        "ring": {name: round(count.sent(processes.size)) for name, count in counted.items()},
        "sent": processes.sent,
    }


def count_collectives(step: Callable[[], object]) -> CountCollectives:
    """Count the collectives of one step."""
    with CountCollectives() as count:
        step()
    return count


class Private:
    """securetune's step as a recipe takes it, over the engine's layout of the model.

    Args:
        engine: How the processes share the model.
        processes: Those of the run.
        model: With its adapters; the same on every process.
        ids: This process' batch.
        folder: Of the ledger, which the first process writes.
    """

    def __init__(
        self, engine: StrategyName, processes: Processes, model: Any, ids: Tensor, folder: Path
    ) -> None:
        from securetune.privacy.distributed import SharedLedger
        from securetune.training.strategy import Strategy

        self.ids, self.causal = ids, model.get_base_model()
        self.prepared = Strategy(engine, processes).prepare(model, _adamw)
        self.batch = len(ids) * processes.size
        uncharged = SimpleNamespace(
            state=SimpleNamespace(header=SimpleNamespace(noise_multiplier=0.0, reportable_epsilon=False)),
            charge=lambda: None,
        )
        self._unclipped = self._private_step(1e18, 0.0, uncharged)
        ledger = SharedLedger(folder / "ledger.jsonl", ledger_header(), processes)
        self.private = self._private_step(MAX_GRAD_NORM, 1.0, ledger)

    def _private_step(self, max_grad_norm: float, noise_multiplier: float, ledger: Any) -> Any:
        from securetune.privacy.clipping import FlatClipping
        from securetune.privacy.noise import NoiseSource
        from securetune.privacy.step import PrivateStep

        return PrivateStep(
            self.prepared.grads,
            self.prepared.optimizer,
            clipping=FlatClipping(max_grad_norm),
            noise_multiplier=noise_multiplier,
            expected_batch_size=self.batch,
            noise=NoiseSource(),
            ledger=ledger,
            reduction=self.prepared.reduction,
        )

    def losses(self) -> Tensor:
        """Return each sample's mean next-token loss, ``[B]``."""
        from securetune.models.frozen_head import frozen_head_losses

        hidden = self.causal.model(input_ids=self.ids, use_cache=False).last_hidden_state[:, :-1]
        weight, targets = self.causal.lm_head.weight, self.ids[:, 1:]
        return (
            frozen_head_losses(hidden.flatten(0, 1), weight, None, targets.flatten())
            .view(targets.shape)
            .mean(dim=1)
        )

    def step(self) -> None:
        """Take one private step."""
        self.private.accumulate(self.prepared.within(self.losses))
        self.private.finish()

    def unclipped(self) -> Tensor:
        """Return what a step without clipping and noise gives to the optimizer, ``[P]``."""
        self._unclipped.accumulate(self.prepared.within(self.losses))
        return released(self.prepared.optimizer, self._unclipped.finish)


class _Plain:
    """The ordinary way: torch's wrapper, the model's own loss, autograd, AdamW."""

    def __init__(self, engine: Engine, model: Any, ids: Tensor) -> None:
        self.ids = ids
        if engine == "ddp":
            devices = [ids.device] if ids.is_cuda else None
            self.model: Any = nn.parallel.DistributedDataParallel(model, device_ids=devices)
        else:
            from torch.distributed.fsdp import fully_shard

            for block in model.get_base_model().model.layers:
                fully_shard(block)
            self.model = fully_shard(model)
        self.optimizer = _adamw([p for p in self.model.parameters() if p.requires_grad])

    def backward(self) -> None:
        """Fill the gradients of the mean over all samples."""
        self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss.backward()

    def step(self) -> None:
        """Take one ordinary step."""
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def gradient(self) -> Tensor:
        """Return what the optimizer is given, ``[P]``."""
        self.backward()
        gradient = released(self.optimizer, self.optimizer.step)
        self.optimizer.zero_grad(set_to_none=True)
        return gradient


def released(optimizer: torch.optim.Optimizer, update: Callable[[], object]) -> Tensor:
    """Run an update and return the gradient that the optimizer was given in it, whole, ``[P]``."""
    found: list[Tensor] = []

    def keep(*_: Any) -> None:
        for parameter in optimizer.param_groups[0]["params"]:
            grad: Any = parameter.grad
            found.append((grad.full_tensor() if hasattr(grad, "full_tensor") else grad).flatten().clone())

    hook = optimizer.register_step_pre_hook(keep)
    update()
    hook.remove()
    return torch.cat(found)


def _adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE)
