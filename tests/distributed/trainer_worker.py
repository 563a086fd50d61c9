"""Runs the training loop of recipes in this process group, with attacks, and saves what came out.

    torchrun --nproc_per_node N -m tests.distributed.trainer_worker OUT CASE...

A case is ``strategy-kind-tokens``: ``fsdp2-adversarial-40`` has micro-batches of at most 40 tokens.
"""

import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from torch import distributed as dist

from securetune.config.launch import Launch
from securetune.config.schema import AdversarialConfig
from securetune.models.checkpointing import checkpoint_layers
from securetune.privacy.adaptive_clipping import AdaptiveClipping
from securetune.privacy.clipping import Clipping, FlatClipping, PerLayerClipping
from securetune.privacy.distributed import Processes, SharedLedger
from securetune.privacy.ledger import Ledger as LedgerOnDisk
from securetune.privacy.ledger import LedgerHeader
from securetune.privacy.matrix_factorization import CorrelatedNoise, MatrixMechanism, WholeRunCharge
from securetune.privacy.noise import NoiseSource
from securetune.privacy.participation import EpochOrderSampler
from securetune.privacy.sampling import PoissonSampler
from securetune.privacy.step import PrivateStep
from securetune.privacy.units import UserSampler
from securetune.training.loop import Adversary, Trainer, make_optimizer
from securetune.training.strategy import Strategy
from tests.sample_recipe import sample_recipe
from tests.small_private import Ledger
from tests.tiny import tiny_llama, tiny_model, tiny_tokenizer
from tests.unit.training.tiny_head import make_examples, make_head

KEY = bytes(range(32))
STEPS = 4
SIGMA = 0.5
LAYERS = {
    "vocab_size": len(tiny_tokenizer()),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
UNATTACKED = ("plain", "users")  # a micro-batch is then one forward pass, which ZeRO-3 foresees
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
FAMILIES = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=LAYERS["vocab_size"], n_embd=32, n_layer=2, n_head=4, n_positions=64, **NO_DROPOUT
    ),
    "qwen3": lambda: transformers.Qwen3Config(**LAYERS),
    "mixtral": lambda: transformers.MixtralConfig(**LAYERS, num_local_experts=3, num_experts_per_tok=2),
}


def make_clipping(kind: str) -> Clipping:
    """Make the clipping of a case; the default is flat."""
    if kind == "adaptive":
        return AdaptiveClipping(0.3, 0.5, count_noise_multiplier=5.0, expected_batch_size=4)
    return PerLayerClipping(0.5) if kind == "per_layer" else FlatClipping(0.5)


def make_whole(kind: str) -> nn.Module | None:
    """Make a model that is trained in full, with a tied output layer; None for adapters on the usual one."""
    if kind in ("full", "users", "checkpointed", "twice", "offloaded"):
        return tiny_llama()
    if kind not in FAMILIES:
        return None
    config = FAMILIES[kind]()
    config.tie_word_embeddings = True
    return tiny_model(config)


def open_ledger(processes: Processes | None) -> LedgerOnDisk:
    """Open a new ledger of users that pays for one mechanism, whose file the first process writes."""
    header = LedgerHeader(
        unit="user",
        max_records_per_unit=2,
        sampler="fixed order",
        sample_rate=1.0,
        noise_multiplier=SIGMA,
        max_grad_norm=0.5,
        delta=1e-5,
        expected_batch_size=4,
        planned_steps=1,
        reportable_epsilon=False,
    )
    path = Path(tempfile.mkdtemp()) / "ledger.jsonl"
    return LedgerOnDisk(path, header) if processes is None else SharedLedger(path, header, processes)


def train(strategy: Strategy, kind: str, tokens: int) -> dict[str, Tensor]:
    """Train, and return the whole parameters and what was told about the steps."""
    torch.manual_seed(0)  # the same everywhere: no harm
    examples = make_examples(3 if kind == "few" else 13)
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    head = make_head(dtype=dtype, model=make_whole(kind))
    for name, parameter in head.model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    if kind in ("checkpointed", "adapters_checkpointed", "twice"):
        checkpoint_layers(head.model)
    adversary = None
    if kind not in UNATTACKED:
        adversary = Adversary(head, AdversarialConfig(method="pgd", radius=0.1, steps=2), seed=1)
    recipe = sample_recipe({"training.learning_rate": 0.01})
    passes = 2 if kind == "twice" else 1
    prepared = strategy.prepare(head.model, partial(make_optimizer, recipe), passes=passes)
    if adversary is not None:
        adversary.within = prepared.within
    sampler = PoissonSampler(len(examples), 0.3, key=KEY)
    noise, ledger, charged = NoiseSource(KEY), Ledger(SIGMA), None
    if kind == "users":
        examples = [replace(one, user_id=f"user{index % 5}") for index, one in enumerate(examples)]
        order = EpochOrderSampler(5, 2, steps=STEPS, key=KEY)
        sampler = UserSampler([one.user_id for one in examples], order, max_records_per_user=2, key=KEY)
        noise = CorrelatedNoise(MatrixMechanism(participation=order.participation, bands=2), KEY)
        charged = open_ledger(strategy.processes)
        ledger = WholeRunCharge(charged, noise.mechanism)
    clipping = make_clipping(kind)
    step = PrivateStep(
        prepared.grads,
        prepared.optimizer,
        clipping=clipping,
        noise_multiplier=SIGMA,
        expected_batch_size=4,
        noise=noise,
        ledger=ledger,  # pyright: ignore[reportArgumentType]
        reduction=prepared.reduction,
    )
    trainer = Trainer(
        head,
        step,
        sampler,
        examples,
        micro_batch_tokens=tokens,
        adversary=adversary,
        strategy=strategy,
        within=prepared.within,
        filler=examples[0],
    )
    results = [trainer.run_step(number) for number in range(1, STEPS + 1)]
    if charged is not None:
        assert charged.state.steps_charged == 1  # the mechanism, on every process
        charged.close()
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
        is_offloaded = kind == "offloaded"
        launch = Launch(
            name,  # pyright: ignore[reportArgumentType]
            offload_optimizer=is_offloaded,
            offload_parameters=is_offloaded and name in ("fsdp2", "zero3"),
        )
        result = train(Strategy(launch.strategy, Processes(), launch=launch), kind, int(tokens))
        if dist.get_rank() == 0:
            torch.save(result, out / f"{case}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
