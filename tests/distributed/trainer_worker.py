"""Runs the training loop of recipes in this process group, with attacks, and saves what came out.

    torchrun --nproc_per_node N -m tests.distributed.trainer_worker OUT CASE...

A case is ``strategy-kind-tokens``: ``fsdp2-adversarial-40`` has micro-batches of at most 40 tokens.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch import distributed as dist

from securetune.config.schema import AdversarialConfig
from securetune.privacy.adaptive_clipping import AdaptiveClipping
from securetune.privacy.clipping import Clipping, FlatClipping, PerLayerClipping
from securetune.privacy.distributed import Processes
from securetune.privacy.noise import NoiseSource
from securetune.privacy.sampling import PoissonSampler
from securetune.privacy.step import PrivateStep
from securetune.training.loop import Adversary, Trainer, make_optimizer
from securetune.training.strategy import Strategy
from tests.sample_recipe import sample_recipe
from tests.small_private import Ledger
from tests.unit.training.tiny_head import make_examples, make_head

KEY = bytes(range(32))
STEPS = 4
SIGMA = 0.5


def make_clipping(kind: str) -> Clipping:
    """Make the clipping of a case; the default is flat."""
    if kind == "adaptive":
        return AdaptiveClipping(0.3, 0.5, count_noise_multiplier=5.0, expected_batch_size=4)
    return PerLayerClipping(0.5) if kind == "per_layer" else FlatClipping(0.5)


def train(strategy: Strategy, kind: str, tokens: int) -> dict[str, Tensor]:
    """Train, and return the whole parameters and what was told about the steps."""
    torch.manual_seed(0)  # the same everywhere: no harm
    head, examples = make_head(dtype=torch.float32), make_examples(3 if kind == "few" else 13)
    adversary = Adversary(head, AdversarialConfig(method="pgd", radius=0.1, steps=2), seed=1)
    recipe = sample_recipe({"training.learning_rate": 0.01})
    prepared = strategy.prepare(head.model, partial(make_optimizer, recipe))
    adversary.within = prepared.within
    clipping = make_clipping(kind)
    step = PrivateStep(
        prepared.grads,
        prepared.optimizer,
        clipping=clipping,
        noise_multiplier=SIGMA,
        expected_batch_size=4,
        noise=NoiseSource(KEY),
        ledger=Ledger(SIGMA),  # pyright: ignore[reportArgumentType]
        reduction=prepared.reduction,
    )
    trainer = Trainer(
        head,
        step,
        PoissonSampler(len(examples), 0.3, key=KEY),
        examples,
        micro_batch_tokens=tokens,
        adversary=adversary,
        strategy=strategy,
        within=prepared.within,
        filler=examples[0],
    )
    results = [trainer.run_step(number) for number in range(1, STEPS + 1)]
    told = {
        "losses": torch.tensor([float("nan") if one.loss is None else one.loss for one in results]),
        "samples": torch.tensor([one.num_samples for one in results]),
        "thresholds": torch.tensor(list(clipping.thresholds.values())),
    }
    return {place.name: strategy.whole(place) for place in prepared.grads.parameters} | told


def main() -> None:
    """Run the cases named on the command line."""
    out, cases = Path(sys.argv[1]), sys.argv[2:]
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for case in cases:
        name, kind, tokens = case.split("-")
        result = train(Strategy(name, Processes()), kind, int(tokens))  # pyright: ignore[reportArgumentType]
        if dist.get_rank() == 0:
            torch.save(result, out / f"{case}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
