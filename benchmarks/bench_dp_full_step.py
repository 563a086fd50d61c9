"""Full fine-tuning: from forward to the clipped sum, against plain gradients and against Opacus (ghost).

All arms run the same model on the same tokens with the same per-sample losses. The plain one ends with
ordinary gradients in float32; the private ones with the clipped sum over samples. The model is not tied,
since Opacus refuses tied weights. Noise and update are measured on their own, against ``torch.randn`` and
AdamW. Gradients are compared first.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

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
from .bench_dp_lora_step import LLAMA_1B, SMOLLM2, Case

NAME = "dp_full_step"
MAX_GRAD_NORM = 1.0
PACKAGES = ("transformers", "opacus")


def run(context: Context) -> Iterator[Result]:
    """Measure time and peak memory from forward to clipped sum, then noise and update."""
    for package in ("transformers", "cryptography"):
        if importlib.util.find_spec(package) is None:
            raise DoesNotFit(f"{package} is not installed.")
    cases = [Case("SmolLM2-135M untied", 8, 64, 0, torch.float32)]
    if context.device.type == "cuda" and not context.quick:
        cases = [
            Case("Llama-1B untied", 4, 1024, 0, torch.bfloat16, LLAMA_1B),
            Case("SmolLM2-135M untied", 16, 256, 0, torch.bfloat16),
            *cases,
        ]
    for case in cases:
        yield from _measure(case, context)
    yield from _measure_update(cases[-1], context)


def _measure(case: Case, context: Context) -> Iterator[Result]:
    torch.manual_seed(0)
    vocab = (case.config or SMOLLM2)["vocab_size"]
    ids = torch.randint(0, vocab, (case.batch, case.tokens), device=context.device)
    ours, plain = _Ours(_model(case, context), ids), _Plain(_model(case, context), ids)
    arms: dict[str, Callable[[], object]] = {"ours": ours.step, "plain": plain.step}
    tolerance = 1e-4 if case.dtype == torch.float32 else 5e-2
    agreements = {
        "plain": check_agreement("summed gradient", ours.summed(), plain.summed(), tolerance=tolerance)
    }
    if importlib.util.find_spec("opacus") is not None:
        opacus = _OpacusGhost(_model(case, context), ids)
        agreements["opacus"] = check_agreement(
            "clipped sum", ours.clipped(), opacus.clipped(), tolerance=tolerance
        )
        arms["opacus"] = opacus.step
    timings = time_paired(arms, context, rounds=3 if context.quick else 7)
    memory = {name: peak_memory_bytes(step, context.device) for name, step in arms.items()}
    baselines = {"plain": f"torch {torch.__version__}, no privacy"}
    if "opacus" in arms:
        baselines["opacus"] = f"opacus {metadata.version('opacus')} (ghost)"
    common = {
        "shape": f"{case.label} B={case.batch} T={case.tokens}, forward to clipped sum",
        "dtype": str(case.dtype).removeprefix("torch."),
        "packages": PACKAGES,
    }
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


def _measure_update(case: Case, context: Context) -> Iterator[Result]:
    """Noise of every parameter and AdamW: ours from ChaCha20, the baseline's from ``torch.randn``."""
    from securetune.privacy.noise import NoiseSource

    count = sum(parameter.numel() for parameter in _model(case, context).parameters())
    count = min(count, 1 << 24)  # cost per parameter does not depend on their number
    source, steps = NoiseSource(), iter(range(1 << 30))
    parameter = torch.nn.Parameter(torch.zeros(count, device=context.device))
    optimizer = torch.optim.AdamW([parameter], lr=1e-4)
    chunk = 1 << 24

    def update(noise_of: Callable[[int, int], Tensor]) -> None:
        summed = torch.ones(count, device=context.device)
        for start in range(0, count, chunk):
            part = summed[start : start + chunk]
            part += noise_of(start, len(part)).to(part)
        parameter.grad = summed.div_(case.batch)
        optimizer.step()

    def ours() -> None:
        where = {"step": next(steps), "device": context.device}
        update(lambda start, length: source.normal(start=start, count=length, stddev=1.0, **where))

    def baseline() -> None:
        update(lambda _start, length: torch.randn(length, device=context.device))

    noise = source.normal(step=next(steps), count=1 << 20, stddev=1.0, device=context.device).double()
    moments = torch.stack([noise.mean(), noise.std()]) + 1.0  # mean near 0, deviation near 1
    agreement = check_agreement(
        "mean and deviation of the noise", moments, moments.new_tensor([1.0, 2.0]), tolerance=1e-2
    )
    timings = time_paired({"ours": ours, "randn": baseline}, context, rounds=3)
    yield compare_times(
        NAME,
        timings["ours"],
        timings["randn"],
        agreement,
        context,
        baseline_name=f"torch {torch.__version__}: randn (not a secure generator) + AdamW",
        metric="noise_and_update_time",
        shape=f"P={count}",
        dtype="float32",
        packages=PACKAGES,
    )


def _model(case: Case, context: Context) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(**{**(case.config or SMOLLM2), "tie_word_embeddings": False})
    with torch.device(context.device):
        model: Any = LlamaForCausalLM(config)
    return model.to(dtype=case.dtype).train()


def _losses(model: Any, ids: Tensor) -> Tensor:
    """Each sample's mean next-token loss, ``[B]``: the same function for every arm."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    losses = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1).mean(dim=1)


class _Ours:
    """One backward pass, flat clipping, the clipped sum in float32."""

    def __init__(self, model: Any, ids: Tensor) -> None:
        from securetune.privacy.clipping import FlatClipping
        from securetune.privacy.per_sample import PerSampleGradients

        self.ids = ids
        self.grads = PerSampleGradients(model)
        self.clipping = FlatClipping(MAX_GRAD_NORM)
        self.clipping.assign(self.grads.parameter_names())
        self.accumulator = torch.zeros(self.grads.num_params, device=ids.device)

    def step(self) -> None:
        """Accumulate one clipped batch."""
        self.accumulator.zero_()
        batch = self.grads.backward(_losses(self.grads.model, self.ids))
        batch.accumulate(self.clipping.factors(batch.squared_norms()), self.accumulator)

    def summed(self) -> Tensor:
        """Return the sum of the per-sample gradients, ``[P]``."""
        self.accumulator.zero_()
        batch = self.grads.backward(_losses(self.grads.model, self.ids))
        batch.accumulate(torch.ones(batch.num_units, 1, device=self.ids.device), self.accumulator)
        return self.accumulator.clone()

    def clipped(self) -> Tensor:
        """Return the clipped sum, ``[P]``."""
        self.step()
        return self.accumulator.clone()


class _Plain:
    """Ordinary autograd."""

    def __init__(self, model: Any, ids: Tensor) -> None:
        self.model, self.ids = model, ids

    def step(self) -> None:
        """Compute the gradients."""
        self.model.zero_grad(set_to_none=False)
        _losses(self.model, self.ids).sum().backward()

    def summed(self) -> Tensor:
        """Return the gradient of the sum over samples, ``[P]``."""
        self.step()
        return torch.cat([_flat(parameter.grad) for parameter in self.model.parameters()])


class _OpacusGhost:
    """Opacus with fast gradient clipping: two backward passes."""

    def __init__(self, model: Any, ids: Tensor) -> None:
        from opacus.grad_sample import GradSampleModuleFastGradientClipping

        self.ids = ids
        self.model = GradSampleModuleFastGradientClipping(
            model,
            max_grad_norm=MAX_GRAD_NORM,  # pyright: ignore[reportArgumentType]
            use_ghost_clipping=True,
            loss_reduction="sum",
        )

    def step(self) -> None:
        """Compute the clipped sum: losses, norms, weighted losses."""
        self.model.zero_grad(set_to_none=False)
        losses = _losses(self.model, self.ids)
        losses.sum().backward(retain_graph=True)
        factors = self.model.get_clipping_coef()
        self.model.zero_grad(set_to_none=False)
        self.model.disable_hooks()
        (losses * factors).sum().backward()
        self.model.enable_hooks()

    def clipped(self) -> Tensor:
        """Return the clipped sum, ``[P]``."""
        self.step()
        return torch.cat([_flat(parameter.grad) for parameter in self.model.parameters()])


def _flat(grad: Tensor | None) -> Tensor:
    assert grad is not None
    return grad.flatten().float()
