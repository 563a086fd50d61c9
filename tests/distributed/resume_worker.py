"""Trains without noise, saves in the middle, and goes on under another strategy.

torchrun --nproc_per_node N -m tests.distributed.resume_worker FOLDER save-STRATEGY... go-STRATEGY-FROM...
"""

import os
import sys
from functools import partial
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from torch import Tensor
from torch import distributed as dist

from securetune.config.schema import EarlyStoppingConfig
from securetune.privacy.distributed import Processes
from securetune.privacy.step import OrdinaryStep
from securetune.training.loop import make_optimizer
from securetune.training.state import load_state, save_state
from securetune.training.state_shards import state_shards
from securetune.training.stopping import EarlyStopping
from securetune.training.strategy import Strategy
from tests.distributed.invariance_worker import TOKENS, batch_of, losses_of, make_model
from tests.distributed.state_worker import OWNER, make_access
from tests.sample_recipe import sample_recipe

STEPS_BEFORE, STEPS_AFTER = 2, 2


def train(
    folder: Path, strategy: Strategy, *, save_as: str | None = None, go_on: str | None = None
) -> dict[str, Tensor]:
    """Train, from the start or from a save; return the whole parameters, and those of the best check."""
    model = make_model("full")
    prepared = strategy.prepare(
        model, partial(make_optimizer, sample_recipe({"training.learning_rate": 0.01}))
    )
    shards = state_shards(prepared.grads, prepared.optimizer, prepared.reduction)
    told: list[float] = []

    def tell() -> float:
        told.append(strategy.score(prepared, lambda: -float(losses_of(model, batch_of(0)).mean())))
        return told[-1]

    def score() -> float:  # the best check is the first, so that its weights are neither saved nor last
        tell()
        return -len(told) if go_on is None else -9.0

    config = EarlyStoppingConfig(method="public_validation", every=1, patience=9)
    stopping = EarlyStopping(config, [part for _, part in shards.held()], score, steps=9)
    first, last = 0, STEPS_BEFORE + STEPS_AFTER
    if go_on is not None:
        first = load_state(
            folder / go_on, make_access(folder), shards, owner=OWNER, stopping=stopping
        ).steps_done
    elif save_as is not None:
        last = STEPS_BEFORE
    step = OrdinaryStep(
        prepared.grads, prepared.optimizer, expected_batch_size=4, reduction=prepared.reduction
    )
    rank, size = (0, 1) if strategy.processes is None else (strategy.processes.rank, strategy.processes.size)
    for number in range(first, last):
        ids = batch_of(number)
        own, rows = ids[rank::size], -(-len(ids) // size)
        padding = rows - len(own)
        filled = torch.cat([own, torch.zeros(padding, TOKENS, dtype=torch.int64)])
        step.accumulate(prepared.within(partial(losses_of, model), filled), num_padding=padding)
        step.finish()
        stopping.check(number + 1)
    if save_as is not None:
        sealer = make_access(folder).sealer() if strategy.is_first else None
        save_state(
            folder / save_as,
            sealer,
            shards,
            owner=OWNER,
            stopping=stopping,
            compartment="weights",
            steps_done=last,
            steps_charged=last,
        )
    result = {place.name: strategy.whole(place).clone() for place in prepared.grads.parameters}
    stopping.restore_best()
    shards.refresh()
    tell()
    result |= {f"best {place.name}": strategy.whole(place).clone() for place in prepared.grads.parameters}
    result["scores"] = torch.tensor(told[-STEPS_AFTER - 1 :])
    prepared.grads.detach()
    return result


def main() -> None:
    """Run the commands."""
    folder, commands = Path(sys.argv[1]), sys.argv[2:]
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for command in commands:
        what, name, *rest = command.split("-")
        strategy = Strategy(name, Processes())  # pyright: ignore[reportArgumentType]
        if what == "save":
            train(folder, strategy, save_as=name)
        else:
            result = train(folder, strategy, go_on=rest[0])
            if strategy.is_first:
                torch.save(result, folder / f"{command}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
