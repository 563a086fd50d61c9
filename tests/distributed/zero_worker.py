"""Trains a tiny model for a few private steps under DeepSpeed, and saves what came out.

    torchrun --nproc_per_node N -m tests.distributed.zero_worker OUT CASE...

A case is ``stage-model-accumulation``, then options, such as ``3-lora-2-bf16-offload``. The case ``refusals``
writes the messages of all engines that must be refused.
"""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
from torch import Tensor, nn
from torch import distributed as dist

from securetune.errors import PrivacyError
from securetune.privacy.clipping import FlatClipping
from securetune.privacy.distributed import Processes, Zero
from securetune.privacy.noise import NoiseSource
from securetune.privacy.per_sample import PerSampleGradients
from securetune.privacy.step import PrivateStep
from tests.distributed import invariance_worker as same
from tests.small_private import Ledger


def config_of(stage: int, options: set[str]) -> dict:
    """Return DeepSpeed's settings; nothing is so small that stage 3 leaves it whole."""
    zero: dict = {"stage": stage, "reduce_bucket_size": 10_000, "stage3_param_persistence_threshold": 0}
    zero["stage3_prefetch_bucket_size"] = 5_000
    zero["round_robin_gradients"] = "robin" in options
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


def make_optimizer(model: nn.Module, options: set[str]) -> torch.optim.Optimizer:
    """Build the optimizer that DeepSpeed gets, or that updates alone."""
    owned = [p for p in model.parameters() if p.requires_grad]
    if "noise" in options:
        return torch.optim.SGD(owned, lr=1.0)
    groups = [{"params": owned}]
    if "groups" in options:  # every other one
        groups = [{"params": owned[::2]}, {"params": owned[1::2], "weight_decay": 0.0, "lr": 0.02}]
    return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1, foreach=False)


def train(case: str) -> dict[str, Tensor]:
    """Train, and return the whole float32 parameters by canonical name; without DeepSpeed in stage 0."""
    stage, kind, accumulation, *rest = case.split("-")
    options = set(rest)
    model = same.make_model(kind)
    if "bf16" in options:
        model = model.bfloat16()
    if "checkpointing" in options:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer, processes, forward = make_optimizer(model, options), None, model
    if stage != "0":
        config = config_of(int(stage), options)
        engine, optimizer, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        processes, forward = Processes(), engine if "engine" in options else engine.module
    grads = PerSampleGradients(model, passes=2 if "twice" in options else 1)
    sigma = 0.0 if "bf16" in options else same.SIGMA
    step = PrivateStep(
        grads,
        optimizer,
        clipping=FlatClipping(same.CLIP),
        noise_multiplier=sigma,
        expected_batch_size=same.DIVISOR,
        noise=NoiseSource(same.KEY),
        ledger=Ledger(sigma),  # pyright: ignore[reportArgumentType]
        reduction=None if processes is None else Zero(processes, engine, grads),
    )
    losses_of = same.losses_of
    if "noise" in options:
        same.losses_of = lambda model, ids: losses_of(model, ids) * 0
    try:
        same.run(step, forward, processes, int(accumulation))
    finally:
        same.losses_of = losses_of
    result = {place.name: whole_of(place.parameter, stage) for place in grads.parameters}
    grads.detach()
    if stage != "0":
        engine.destroy()
    return result


def whole_of(parameter: nn.Parameter, stage: str) -> Tensor:
    """Return the optimizer's float32 parameter."""
    if stage == "0":
        return parameter.detach().float().clone()
    if os.environ.get("RAW"):
        return parameter.detach().float().clone()
    return deepspeed.utils.safe_get_full_fp32_param(parameter).clone()


def main() -> None:
    """Run the cases named on the command line."""
    out, cases = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    for case in cases:
        began = time.perf_counter()
        result = train(case)
        if dist.get_rank() == 0:
            print(case, f"{time.perf_counter() - began:.1f} s", flush=True)
            torch.save(result, out / f"{case}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
