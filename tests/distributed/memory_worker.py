"""Trains as a recipe does, and writes the peak memory of each process beside what the plan counts.

torchrun --nproc_per_node N -m tests.distributed.memory_worker RECIPE OUT
"""

import ctypes
import gc
import json
import sys
from functools import partial
from pathlib import Path

from securetune.config.loader import load_recipe
from securetune.training.access import prepare_access
from securetune.training.finetune import fine_tune
from securetune.training.memory import measure_size, rank_memory
from securetune.training.plan import make_plan
from securetune.training.prepare import prepare_data
from securetune.training.strategy import Strategy, start_strategy
from securetune.training.subjects import load_recipe_base


def resident(name: str) -> int:
    """Return ``VmRSS`` or ``VmHWM``, its peak, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def forget_peak() -> None:
    """Give free memory back, and let the peak start anew."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    """Train, and write one file for each process."""
    recipe, out = load_recipe(Path(sys.argv[1])), Path(sys.argv[2])
    strategy = start_strategy(recipe)
    rank = 0 if strategy.processes is None else strategy.processes.rank
    found = {"strategy": strategy.name}
    prepare = Strategy.prepare

    def preparing(*args, **options):
        prepared = prepare(*args, **options)
        found["peak_at_start"] = resident("VmHWM")
        forget_peak()
        return prepared

    Strategy.prepare = preparing
    with strategy.open_run(recipe, resume=False) as run:
        access = strategy.each(partial(prepare_access, recipe, run))
        base = load_recipe_base(recipe)
        data = strategy.each(partial(prepare_data, recipe, run, base.tokenizer))
        plan = make_plan(recipe, base=base, tokens_per_record=data.mean_tokens)
        size = measure_size(recipe, base, tokens_per_record=data.mean_tokens)
        num_processes = 1 if strategy.processes is None else strategy.processes.size
        found["counted"] = rank_memory(strategy.name, num_processes, size).to_dict()
        del base
        forget_peak()
        found["before"] = resident("VmRSS")
        fine_tune("hardened", recipe, run, access, data, plan, strategy=strategy)
        found["peak"] = resident("VmHWM")
        (out / f"{strategy.name}-{rank}.json").write_text(json.dumps(found))
        strategy.finish()


if __name__ == "__main__":
    main()
