"""Trains a tiny model for a few private steps in this process group, and saves what came out.

    torchrun --nproc_per_node N -m tests.distributed.invariance_worker OUT CASE...

A case is ``strategy-model-accumulation``, such as ``fsdp2-lora-4``; ``noise`` as the model takes no record.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard

from securetune.privacy.clipping import FlatClipping
from securetune.privacy.distributed import DataParallel, FullySharded, Processes
from securetune.privacy.noise import NoiseSource
from securetune.privacy.per_sample import PerSampleGradients
from securetune.privacy.step import PrivateStep
from tests.per_sample_oracle import random_parameters
from tests.small_private import Ledger
from tests.tiny import tiny_llama

KEY = bytes(range(32))
STEPS = 3
RECORDS, TOKENS = 8, 7
SIGMA, CLIP, DIVISOR = 0.7, 0.5, 8


def batch_of(step: int) -> Tensor:
    """Return the records that all processes take together at a step: fewer and fewer, the last odd."""
    count = (RECORDS, 5, 1)[step % 3]
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 200, (count, TOKENS), generator=generator)


def make_model(kind: str) -> nn.Module:
    """Build the same model everywhere: with adapters, or in full, tied or not."""
    torch.manual_seed(0)
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(tiny_llama(), LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
        return random_parameters(model)
    return random_parameters(tiny_llama(tie_word_embeddings=kind == "tied"))


def losses_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean next-token loss of each row."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(dim=1)


def run(step: PrivateStep, model: nn.Module, processes: Processes | None, accumulation: int) -> None:
    """Take the private steps, each in the same number of micro-batches on every process."""
    rank, size = (0, 1) if processes is None else (processes.rank, processes.size)
    for number in range(STEPS):
        ids = batch_of(number)
        own = ids[rank::size]
        rows = -(-len(ids) // (size * accumulation))
        for start in range(0, rows * accumulation, rows):
            part = own[start : start + rows]
            padding = rows - len(part)
            filled = torch.cat([part, torch.zeros(padding, TOKENS, dtype=torch.int64)])
            step.accumulate(losses_of(model, filled), num_padding=padding)
        step.finish()


def train(strategy: str, kind: str, accumulation: int) -> dict[str, Tensor]:
    """Train, and return the whole parameters by canonical name; for ``noise`` what one step added."""
    only_noise = kind == "noise"
    model = make_model("full" if only_noise else kind)
    processes = None if strategy == "single" else Processes()
    if strategy == "fsdp2":
        layers = [m for m in model.modules() if type(m).__name__ == "LlamaDecoderLayer"]
        for module in [*layers, model]:
            fully_shard(module)
    elif strategy == "ddp-wrapped":
        model = nn.parallel.DistributedDataParallel(model)
    grads = PerSampleGradients(model)
    reduction = None
    if processes is not None:
        sharded = strategy == "fsdp2"
        reduction = FullySharded(processes, grads.parameters) if sharded else DataParallel(processes)
        grads.agree_on_most = processes.most if sharded else None
    owned = [place.parameter for place in grads.parameters]
    if strategy in ("single", "ddp"):
        owned = [grads.flat_params]
    if only_noise:
        optimizer = torch.optim.SGD(owned, lr=1.0)
        with torch.no_grad():
            for parameter in owned:
                parameter.zero_()
    else:
        optimizer = torch.optim.AdamW(owned, lr=0.01, weight_decay=0.1, foreach=False)
    step = PrivateStep(
        grads,
        optimizer,
        clipping=FlatClipping(CLIP),
        noise_multiplier=SIGMA,
        expected_batch_size=DIVISOR,
        noise=NoiseSource(KEY),
        ledger=Ledger(SIGMA),  # pyright: ignore[reportArgumentType]
        reduction=reduction,
    )
    if only_noise:
        filler = torch.zeros(1, TOKENS, dtype=torch.int64)
        step.accumulate(losses_of(model, filler), num_padding=1)
        step.finish()
    else:
        run(step, model, processes, accumulation)
    result = {}
    for place in grads.parameters:
        value = place.parameter.detach()
        result[place.name] = (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()
    grads.detach()
    return result


def main() -> None:
    """Run the cases named on the command line."""
    out, cases = Path(sys.argv[1]), sys.argv[2:]
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for case in cases:
        strategy, kind, accumulation = case.rsplit("-", 2)
        result = train(strategy, kind, int(accumulation))
        if dist.get_rank() == 0:
            torch.save(result, out / f"{case}-{dist.get_world_size()}.pt")
        everywhere = [None] * dist.get_world_size()
        prints = {name: value.double().sum().item() for name, value in result.items()}
        dist.all_gather_object(everywhere, prints)
        assert all(found == everywhere[0] for found in everywhere), "replicas differ"
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
