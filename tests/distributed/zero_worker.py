"""Trains a tiny model for a few private steps under DeepSpeed, and saves what came out.

    torchrun --nproc_per_node N -m tests.distributed.zero_worker OUT CASE...

A case is ``stage-model-accumulation``, then options, such as ``3-lora-2-bf16-offload``; stage 0 is one
process without DeepSpeed. The case ``refusals`` writes the messages of engines that must be refused.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from torch import Tensor, nn
from torch import distributed as dist

from securetune.errors import PrivacyError
from securetune.privacy.clipping import FlatClipping
from securetune.privacy.distributed import Processes, Zero
from securetune.privacy.noise import NoiseSource
from securetune.privacy.per_sample import PerSampleGradients
from securetune.privacy.reduction import SingleProcess
from securetune.privacy.step import PrivateStep
from tests.distributed.invariance_worker import CLIP, DIVISOR, KEY, SIGMA, losses_of, make_model, run
from tests.small_private import Ledger


def config_of(stage: int, options: set[str]) -> dict[str, Any]:
    """Return DeepSpeed's settings; nothing is so small that stage 3 leaves it whole."""
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": 10_000,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 5_000,
        "round_robin_gradients": "robin" in options,
    }
    if "subgroups" in options:
        zero["sub_group_size"] = 2_000
    if "offload" in options:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,  # without it DeepSpeed clips to 1
        "zero_optimization": zero,
        "bf16": {"enabled": "bf16" in options},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


class Masters(SingleProcess):
    """One process that updates float32 copies of bfloat16 parameters: the truth for DeepSpeed's."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.masters = [parameter.detach().float() for parameter in parameters]

    def refuse_other_parameters(self, grads, optimizer) -> None:
        pass

    def assign(self, grads, optimizer, layer, shard) -> None:
        for place, master in zip(grads.parameters, self.masters, strict=True):
            master.grad = shard[place.start : place.stop].view(place.shape)

    def update(self, grads, optimizer) -> None:
        optimizer.step()
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                parameter.copy_(master)


class Attacked(nn.Module):
    """Takes ids, and answers for their perturbed embeddings: the perturbation follows one gradient step."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        embed = self.model.get_input_embeddings()
        plain = embed(input_ids).detach().requires_grad_()
        logits = self.model(inputs_embeds=plain, **options).logits
        (gradient,) = torch.autograd.grad(logits.logsumexp(-1).sum(), plain)
        return self.model(inputs_embeds=embed(input_ids) + 0.05 * gradient.sign(), **options)


def make_optimizer(owned: list[Any], options: set[str]) -> torch.optim.Optimizer:
    """Build the optimizer that DeepSpeed gets, or that updates alone."""
    if "noise" in options:
        return torch.optim.SGD(owned, lr=1.0)
    groups: list[dict[str, Any]] = [{"params": owned}]
    if "groups" in options:  # every other parameter
        groups = [{"params": owned[::2]}, {"params": owned[1::2], "weight_decay": 0.0, "lr": 0.02}]
    return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1, foreach=False)


def make_engine(model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    """Initialize DeepSpeed."""
    import deepspeed

    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def prepare(model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    """Let accelerate initialize DeepSpeed."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DeepSpeedPlugin

    AcceleratorState._reset_state()  # that of an earlier case
    return Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config)).prepare(model, optimizer)[0]


def make_model_in_parts(kind: str, config: dict[str, Any]) -> nn.Module:
    """Let transformers build the model under ``zero.Init``, which never holds it whole."""
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    values = list(make_model(kind).parameters())
    while_alive = HfDeepSpeedConfig(config)
    model = make_model(kind)
    del while_alive
    for parameter, value in zip(model.parameters(), values, strict=True):
        with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
            parameter.data.copy_(value)
    return model


def private_step(
    grads: PerSampleGradients, optimizer: Any, *, reduction: Any, sigma: float = SIGMA
) -> PrivateStep:
    """Make the private step of all cases."""
    return PrivateStep(
        grads,
        optimizer,
        clipping=FlatClipping(CLIP),
        noise_multiplier=sigma,
        expected_batch_size=DIVISOR,
        noise=NoiseSource(KEY),
        ledger=Ledger(sigma),  # pyright: ignore[reportArgumentType]
        reduction=reduction,
    )


def train(case: str) -> dict[str, Tensor]:
    """Train, and return the whole float32 parameters by canonical name."""
    stage, kind, accumulation, *rest = case.split("-")
    options = set(rest)
    config = config_of(int(stage), options)
    model = make_model_in_parts(kind, config) if "init" in options else make_model(kind)
    if "bf16" in options:
        model = model.bfloat16()
    if "checkpointing" in options:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})  # pyright: ignore[reportCallIssue]
    owned: list[Any] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    processes = reduction = None
    forward: Any = model
    if stage == "0":
        if "bf16" in options:
            reduction = Masters(owned)
            owned = reduction.masters
        optimizer: Any = make_optimizer(owned, options)
    else:
        make = prepare if "accelerate" in options else make_engine
        engine = make(model, make_optimizer(owned, options), config)
        optimizer, processes = engine.optimizer, Processes()
        forward = engine if options & {"engine", "accelerate"} else engine.module
    grads = PerSampleGradients(model, passes=2 if "twice" in options else 1)
    if stage != "0":
        reduction = Zero(processes, engine, grads)
    step = private_step(grads, optimizer, reduction=reduction)
    if "noise" in options:  # no gradient at all
        step.accumulate(losses_of(forward, torch.zeros(1, 7, dtype=torch.int64)), num_padding=1)
        step.finish()
    else:
        run(step, Attacked(forward) if "attack" in options else forward, processes, int(accumulation))
    values = reduction.masters if isinstance(reduction, Masters) else grads.owned_by_optimizer[0]
    result = {place.name: whole(value) for place, value in zip(grads.parameters, values, strict=True)}
    grads.detach()
    return result


def whole(parameter: Tensor) -> Tensor:
    """Return the whole parameter, and its float32 copy where DeepSpeed has one."""
    if parameter.dtype == torch.float32 and not hasattr(parameter, "ds_id"):
        return parameter.detach().clone()
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter).clone()


def refusals() -> dict[str, str]:
    """Return the messages of engines and steps that must be refused."""
    found: dict[str, str] = {}

    def refuse(
        name: str, stage: int, use: Callable[[Any, PerSampleGradients, Any], Any], **changes: Any
    ) -> None:
        model = make_model("tied")
        optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], set())
        bf16 = {"bf16"} if "data_types" in changes else set()
        engine = make_engine(model, optimizer, config_of(stage, bf16) | changes)
        try:
            use(engine, PerSampleGradients(engine.module), optimizer)
        except PrivacyError as error:
            found[name] = str(error)

    def make(engine: Any, grads: PerSampleGradients, _: Any) -> None:
        Zero(Processes(), engine, grads)

    def step_base_optimizer(engine: Any, grads: PerSampleGradients, optimizer: Any) -> None:
        private_step(grads, optimizer, reduction=Zero(Processes(), engine, grads))

    def flatten(engine: Any, grads: PerSampleGradients, _: Any) -> None:
        assert grads.flat_params is not None
        make(engine, grads, _)

    def unfreeze(engine: Any, grads: PerSampleGradients, _: Any) -> None:
        grads.detach()
        engine.module.extra = nn.Linear(2, 2)
        make(engine, PerSampleGradients(engine.module), _)

    def freeze(engine: Any, grads: PerSampleGradients, _: Any) -> None:
        grads.detach()
        engine.module.lm_head.weight.requires_grad_(False)
        other = PerSampleGradients(engine.module)
        engine.module.lm_head.weight.requires_grad_(True)
        make(engine, other, _)

    def scale_loss(engine: Any, grads: PerSampleGradients, _: Any) -> None:
        step = private_step(grads, engine.optimizer, reduction=Zero(Processes(), engine, grads))
        step.accumulate(losses_of(engine.module, torch.zeros(2, 7, dtype=torch.int64)))
        engine.optimizer.override_loss_scale(8.0)
        step.finish()

    def overflow(engine: Any, grads: PerSampleGradients, _: Any) -> None:
        step = private_step(grads, engine.optimizer, reduction=Zero(Processes(), engine, grads))
        losses = losses_of(engine.module, torch.arange(14).view(2, 7))
        step.accumulate_public(losses, weight=float("inf"))
        step.finish()

    def half_of_the_processes(engine: Any, grads: PerSampleGradients, _: Any) -> None:
        processes = Processes()
        processes.size += 1
        Zero(processes, engine, grads)

    scheduler = {"type": "WarmupLR", "params": {"warmup_num_steps": 2}}
    refuse("gradient_clipping", 1, make, gradient_clipping=1.0)
    refuse("gradient_accumulation_steps", 3, make, gradient_accumulation_steps=2)
    refuse("scheduler", 2, make, scheduler=scheduler)
    refuse("grad_accum_dtype", 1, make, data_types={"grad_accum_dtype": "fp32"})
    refuse("stage 0", 0, make)
    refuse("base optimizer", 2, step_base_optimizer)
    refuse("flat_params", 1, flatten)
    refuse("missing parameter", 2, unfreeze)
    refuse("unknown parameter", 3, freeze)
    refuse("loss scale", 2, scale_loss)
    refuse("other processes", 3, half_of_the_processes)
    for stage in (1, 2, 3):
        refuse(f"overflow {stage}", stage, overflow)
    return found


def main() -> None:
    """Run the cases named on the command line."""
    from accelerate import PartialState

    out, cases = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    PartialState(backend="gloo")
    for case in cases:
        if case == "refusals":
            (out / f"refusals-{dist.get_rank()}.json").write_text(json.dumps(refusals()))
            continue
        result = train(case)
        if dist.get_rank() == 0:
            torch.save(result, out / f"{case}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
