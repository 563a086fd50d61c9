"""DeepSpeed's ZeRO-1, 2 and 3: its optimizer updates its own shards, from gradients that we reduce and noise.

DeepSpeed's path of gradients stays unused: per-sample gradients never become ``.grad``, and its hooks are
switched off, so that nothing averages, scales or clips. Each block's clipped sum is reduced to the processes
that own its entries, and gets the noise of their addresses. The released pieces make up the gradient of this
process' partition, which DeepSpeed's optimizer takes as its own: it updates the float32 partition and gathers
the parameters. Padding gets no noise and stays zero.
"""

import weakref
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from securetune.errors import PrivacyError
from securetune.privacy.distributed.blocks import group_by_block
from securetune.privacy.distributed.collectives import Processes
from securetune.privacy.distributed.zero_partitions import CutParameters, FlatGroups, Piece, pieces_within
from securetune.privacy.per_sample import PerSampleGradients
from securetune.privacy.per_sample.gradients import TrainableParameter
from securetune.privacy.reduction import Address, SingleProcess, require_exactly

_BUCKET = 1 << 26  # 256 MiB of float32 at a time
_STAGE_3 = "DeepSpeedZeroOptimizer_Stage3"
_OPTIMIZERS = ("DeepSpeedZeroOptimizer", _STAGE_3)
# What ZeRO-3's hooks count down in a backward pass, to gather a module's parameters and to free them.
_COUNTERS = ("applied_pre_backward_ref_cnt", "ds_grads_remaining")


class Zero(SingleProcess):
    """Reduce into the partitions of a DeepSpeed engine of ZeRO stage 1, 2 or 3.

    Forward passes go through the engine or ``engine.module``; ``engine.backward`` and ``engine.step`` are not
    called. Schedulers step the optimizer that was given to ``deepspeed.initialize``. In stage 3 forward and
    backward passes gather parameters, so all processes must run the same ones.

    Args:
        processes: Those of the run, in the order of the engine's.
        engine: As ``deepspeed.initialize`` or accelerate's ``prepare`` returns it; its own reduction of
            gradients is switched off for good.
        grads: Per-sample gradients of ``engine.module``.

    Raises:
        PrivacyError: If a setting of the engine would average, scale, clip or skip, or its optimizer owns
            other parameters than the trainable ones.
    """

    def __init__(self, processes: Processes, engine: Any, grads: PerSampleGradients) -> None:
        self.processes, self._engine = processes, engine
        _refuse_settings(engine)
        optimizer = engine.optimizer
        is_stage_3 = type(optimizer).__name__ == _STAGE_3
        self.reduces_micro_batches = is_stage_3 or optimizer.partition_gradients
        self._shards = CutParameters(optimizer) if is_stage_3 else FlatGroups(optimizer)
        self.refuse_other_parameters(grads, optimizer)
        self._shards.require(processes)
        pieces = list(self._shards.pieces(grads.parameters))
        self._pieces = {layer.start: pieces_within(layer, pieces) for layer in self.layers(grads.parameters)}
        self._partitions: list[Tensor] | None = None
        _switch_off_reduction(engine)
        if is_stage_3:
            grads.agree_on_most = processes.most
            grads.before_pass = _HookCounters(engine.module, optimizer)

    def layers(self, parameters: Sequence[TrainableParameter]) -> Sequence[slice]:
        """Return the range of each block of the model; in stage 1, ranges of at most 64 Mi entries."""
        if self.reduces_micro_batches:
            return [slice(block[0].start, block[-1].stop) for block in group_by_block(parameters)]
        stop = parameters[-1].stop
        return [slice(start, min(start + _BUCKET, stop)) for start in range(0, stop, _BUCKET)]

    def reduce_sum(self, layer: slice, summed: Tensor) -> Tensor:
        """Add up, and keep this process' pieces, one after another."""
        pieces = self._pieces[layer.start]
        if any(left.stop != right.start for left, right in pairwise(pieces)):
            summed = torch.cat([summed[p.start - layer.start : p.stop - layer.start] for p in pieces])
        sizes = [0] * self.processes.size
        for piece in pieces:
            sizes[piece.owner] += piece.stop - piece.start
        return self.processes.sum_shards(summed, sizes)

    def places(self, layer: slice, shard: Tensor) -> Sequence[tuple[Tensor, Address]]:
        """Return the pieces, each with its address."""
        return [(part, Address(piece.start, (len(part),), (1,))) for piece, part in self._own(layer, shard)]

    def assign(
        self,
        grads: PerSampleGradients,
        optimizer: torch.optim.Optimizer,
        layer: slice,
        shard: Tensor,
    ) -> None:
        """Put each piece into the partition of its group."""
        if self._partitions is None:
            self._partitions = self._shards.new_partitions(like=shard)
        for piece, part in self._own(layer, shard):
            self._partitions[piece.group][piece.offset : piece.offset + len(part)] = part

    def update(self, grads: PerSampleGradients, optimizer: torch.optim.Optimizer) -> None:
        """Hand the partitions over, and let the engine's optimizer step."""
        partitions, self._partitions = self._partitions, None
        assert partitions is not None
        self._shards.hand_over(partitions)
        super().update(grads, optimizer)
        if self._engine.optimizer.overflow:
            raise PrivacyError(
                "DeepSpeed skipped the update, since the released gradient is not finite; the step is "
                "charged. Clipped sums and noise are finite, so the public gradient is not: see its losses."
            )

    def add_counts(self, *counts: Tensor) -> None:
        """Add up over all processes."""
        self.processes.add(*counts)

    def refuse_other_parameters(self, grads: PerSampleGradients, optimizer: torch.optim.Optimizer) -> None:
        """Refuse another optimizer than the engine's, other parameters, and settings that matter."""
        _refuse_settings(self._engine)
        if optimizer is not self._engine.optimizer:
            raise PrivacyError(
                f"the private step got {type(optimizer).__name__}, which is not the engine's optimizer. Give "
                "it engine.optimizer: accelerate's wrapper does not step, and what deepspeed.initialize was "
                "given updates nothing on its own."
            )
        _, flat = grads.owned_by_optimizer
        if flat is not None:
            raise PrivacyError(
                "grads.flat_params moves the parameters out of DeepSpeed's own flat vectors. Make "
                "PerSampleGradients after deepspeed.initialize, and do not ask for flat_params."
            )
        owned = [parameter for group in self._shards.groups for parameter in group]
        require_exactly([place for place in grads.parameters if place.stop > place.start], owned)

    def owned_masters(self) -> list[tuple[Address, nn.Parameter, slice]]:
        """Return what this process updates: address, float32 partition, and the place in that."""
        own = [piece for pieces in self._pieces.values() for piece in pieces]
        return [
            (Address(piece.start, (piece.stop - piece.start,), (1,)), *self._shards.master(piece))
            for piece in own
            if piece.owner == self.processes.rank
        ]

    @property
    def partition_optimizer(self) -> torch.optim.Optimizer:
        """What updates the float32 partitions, and keeps their state."""
        return self._engine.optimizer.optimizer

    def refresh_parameters(self) -> None:
        """Make the model's parameters those of the float32 partitions, once those were restored."""
        self._shards.refresh()

    def _own(self, layer: slice, shard: Tensor) -> list[tuple[Piece, Tensor]]:
        own = [piece for piece in self._pieces[layer.start] if piece.owner == self.processes.rank]
        return list(zip(own, shard.split([piece.stop - piece.start for piece in own]), strict=True))


class _HookCounters:
    """Lets ZeRO-3's hooks run in every backward pass through a graph: they are made for one.

    Before a module's backward they gather its parameters, after it they free them, and they count both down.
    """

    def __init__(self, module: nn.Module, optimizer: Any) -> None:
        self._modules = list(module.modules())
        # since 0.19: frees what a module holds whose inputs needed no gradient
        self._free = getattr(optimizer.parameter_offload, "release_backward_leftovers", lambda: None)
        self._losses: weakref.ref[Tensor] | None = None
        self._counts: list[tuple[nn.Module, str, int]] = []

    def __call__(self, losses: Tensor) -> None:
        self._free()
        if self._losses is not None and self._losses() is losses:
            for module, name, count in self._counts:
                setattr(module, name, count)
            return
        self._losses = weakref.ref(losses)
        self._counts = [
            (module, name, module.__dict__[name])
            for module in self._modules
            for name in _COUNTERS
            if name in module.__dict__
        ]


def _switch_off_reduction(engine: Any) -> None:
    """Keep DeepSpeed from reducing ``.grad`` in a backward pass: there is none, and its hooks expect one."""
    engine.enable_backward_allreduce = False
    for name in ("_grad_acc_hooks", "_leaf_module_hooks"):
        for hook in getattr(engine.optimizer, name, []):
            hook.remove()


def _refuse_settings(engine: Any) -> None:
    """Refuse by name what would touch the gradient between the noise and the update, or skip the update."""
    optimizer: Any = getattr(engine, "optimizer", None)
    kind, inner = type(optimizer).__name__, getattr(optimizer, "optimizer", None)
    if not hasattr(engine, "zero_optimization_stage"):
        raise PrivacyError(
            f"Zero needs the engine that deepspeed.initialize returned, got a {type(engine).__name__}."
        )
    problems: list[str] = []
    if engine.fp16_enabled():
        problems.append("fp16.enabled is true: its loss scaler skips steps by data. Set bf16.enabled instead")
    elif engine.zero_optimization_stage() not in (1, 2, 3):
        problems.append(
            f"zero_optimization.stage is {int(engine.zero_optimization_stage())}: set 1, 2 or 3, or use "
            "DataParallel without DeepSpeed"
        )
    elif kind == "BF16_Optimizer":
        problems.append(
            "data_types.grad_accum_dtype is fp32 in stage 1 with bf16, which is another optimizer "
            f"({kind}). Leave it out: sums are in float32 anyway"
        )
    elif kind not in _OPTIMIZERS:
        problems.append(
            f"the engine's optimizer is a {kind}, which has a gradient path of its own. Leave out ZenFlow, "
            "SuperOffload and MiCS, and give deepspeed.initialize an optimizer"
        )
    elif type(inner).__module__.startswith("deepspeed.runtime"):
        problems.append(
            f"DeepSpeed's {type(inner).__name__} changes gradients or their exchange before the update. Use "
            "torch.optim.AdamW; with CPU offload DeepSpeed makes its DeepSpeedCPUAdam of it"
        )
    elif getattr(optimizer, "swap_optimizer", False):
        problems.append("zero_optimization.offload_optimizer.device is nvme: set cpu or none")
    elif optimizer.loss_scale != 1:
        problems.append(f"the loss scale is {optimizer.loss_scale:g}: it must be 1")
    clip = max(engine.gradient_clipping(), getattr(optimizer, "clip_grad", 0.0))
    if clip > 0:
        default = " (DeepSpeed's default)" if clip == 1 else ""
        problems.append(
            f"gradient_clipping is {clip:g}{default}: it would scale the noisy sum by its norm. Set it to 0 "
            "(not to auto); privacy.max_grad_norm clips each sample"
        )
    steps = engine.gradient_accumulation_steps()
    if steps != 1:
        problems.append(
            f"gradient_accumulation_steps is {steps}: the engine would divide each sample's gradient by it. "
            "Set it to 1: the private step accumulates micro-batches itself"
        )
    if engine.lr_scheduler is not None:
        problems.append(
            "the engine has a learning-rate scheduler, which only engine.step would step. Leave it out of "
            "DeepSpeed's configuration, and step one over the optimizer that DeepSpeed was given"
        )
    if problems:
        raise PrivacyError("DeepSpeed: " + "; ".join(problems) + ".")
