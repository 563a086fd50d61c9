"""The training loop: Poisson sample, micro-batches, per-sample perturbation, per-sample losses, one step."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from securetune.adversarial.embedding import attack_mode, mean_embedding_norm, perturb, sample_seeds
from securetune.config.schema import AdversarialConfig, Recipe
from securetune.data.collate import Batch, collate, length_buckets
from securetune.data.encode import Example
from securetune.errors import MachineError
from securetune.models.concurrent import num_at_once, run_at_once
from securetune.models.task import ClassifyHead, GenerateHead
from securetune.privacy.per_sample import PerSampleGradients
from securetune.privacy.step import OrdinaryStep, PrivateStep
from securetune.privacy.units import DrawnRecord, UserSampler
from securetune.training.drawing import UnitSampler
from securetune.training.dropout import AdapterDropout
from securetune.training.strategy import Strategy, call

Head = ClassifyHead | GenerateHead


@dataclass(frozen=True)
class StepResult:
    """What one step did. Everything but ``step`` is an un-noised statistic of private data.

    Attributes:
        step: Number of the step, from 1.
        loss: Mean loss over the samples drawn, under attack where training is adversarial, with label
            smoothing and dropout where there are any; None if none was drawn.
        num_samples: Samples drawn.
        num_tokens: Tokens, padding included.
        clipped_fraction: Share of units whose gradient was shortened, the mean over the groups of parameters
            that are clipped apart; None without clipping or without samples.
        seconds: Wall-clock time.
    """

    step: int
    loss: float | None
    num_samples: int
    num_tokens: int
    clipped_fraction: float | None
    seconds: float


class Adversary:
    """Perturbs each sample's embeddings inside a ball, towards higher loss, during training.

    Args:
        head: The model under attack, with its task.
        config: The recipe's ``adversarial`` section; its lengths are multiples of the mean embedding norm.
        seed: Start of the attacks; sample, step and seed decide a start, never the other samples.

    Attributes:
        within: Calls a function that uses the model's parameters, which may be sharded otherwise.
    """

    def __init__(self, head: Head, config: AdversarialConfig, *, seed: int) -> None:
        self._head = head
        self.within: Callable[..., Any] = call
        self._config = config
        self._seed = seed
        self._unit = mean_embedding_norm(head.causal)

    def perturb(self, embeds: Tensor, batch: Batch, *, step: int) -> Tensor:
        """Return the perturbed embeddings.

        Args:
            embeds: ``[B, T, D]``, the model's dtype: the clean embeddings.
            batch: Their batch.
            step: The training step.

        Returns:
            ``[B, T, D]``, same dtype. Their gradient is that of ``embeds``: the perturbation is a constant.
        """
        clean = embeds.detach()
        delta = torch.zeros_like(clean)
        # a model that is shared out among processes runs in their common order
        at_once = num_at_once(embeds.device) if self.within is call else 1
        parts = torch.arange(len(embeds)).tensor_split(at_once)

        def attack(rows: Tensor) -> None:
            part = batch.select(rows)
            longest = part.input_ids.shape[1]
            delta[rows, :longest] = self._delta(clean[rows, :longest], part, step).to(delta.dtype)

        with attack_mode(self._head.model):
            for _ in run_at_once(attack, [rows for rows in parts if len(rows)], at_once):
                pass
        return embeds + delta

    def _delta(self, embeds: Tensor, batch: Batch, step: int) -> Tensor:
        config = self._config
        return perturb(
            lambda perturbed: self.within(self._head.losses, perturbed, batch),
            embeds,
            batch.attack_mask.to(embeds.device),
            norm=config.norm,
            radius=config.radius * self._unit,
            steps=config.steps,
            step_size=None if config.step_size is None else config.step_size * self._unit,
            random_start=sample_seeds(batch.unit_ids, seed=self._seed, step=step),
        ).delta


class Trainer:
    """Runs one step at a time over the private examples, so that its caller can save and show in between.

    Args:
        head: The model that is trained, and its task.
        step: Ordinary or private.
        sampler: Draws each step's samples, one by one or user by user; positions behind the examples are
            empty places.
        examples: The training examples.
        micro_batch_tokens: Most tokens, padding included, in one pass.
        adversary: None trains on clean embeddings. Attacks run without dropout and label smoothing.
        dropout: Gives the samples their masks; None for a model without dropout.
        label_smoothing: Share of each target that is spread evenly, in [0, 1).
        strategy: The processes that share the step; each draws the same sample and takes its part. One
            process when None.
        within: Calls a function that uses the model's parameters, which may be sharded otherwise.
        filler: A public example, which keeps a process in step that has none of a micro-batch's samples;
            needed with several processes.
    """

    def __init__(
        self,
        head: Head,
        step: OrdinaryStep,
        sampler: UnitSampler,
        examples: Sequence[Example],
        *,
        micro_batch_tokens: int,
        adversary: Adversary | None = None,
        dropout: AdapterDropout | None = None,
        label_smoothing: float = 0.0,
        strategy: Strategy | None = None,
        within: Callable[..., Any] | None = None,
        filler: Example | None = None,
    ) -> None:
        self._head = head
        self._strategy = strategy or Strategy()
        self._within = within or call
        self._filler = filler
        self._step = step
        self._sampler = sampler
        self._examples = examples
        self._micro_batch_tokens = micro_batch_tokens
        self._adversary = adversary
        self._dropout = dropout
        self._label_smoothing = label_smoothing
        self._num_drawn = 0  # a resumed run has a new sampler, which counts from 0 too

    def run_step(self, number: int) -> StepResult:
        """Draw a sample, accumulate its gradients, update.

        Args:
            number: Number of the step, from 1.

        Returns:
            What happened.

        Raises:
            PrivacyError: If the budget is spent.
            MachineError: If memory runs out; the step is then not charged.
        """
        started = time.monotonic()
        taken = self._sampler.draw(self._num_drawn)
        self._num_drawn += 1
        places = [place.position if isinstance(place, DrawnRecord) else place for place in taken]
        drawn = [self._examples[place] for place in places if place < len(self._examples)]
        by_user = isinstance(self._sampler, UserSampler)
        totals = torch.zeros(3, dtype=torch.float64)  # loss, samples, tokens
        for examples, num_padding in self._micro_batches(drawn, by_user=by_user):
            batch = collate(examples).to(self._device)
            with _out_of_memory_advice(), self._masks(batch, number):
                micro_losses = self._losses(batch, number)
                if isinstance(self._step, PrivateStep):
                    users = [example.user_id for example in examples] if by_user and not num_padding else None
                    self._step.accumulate(micro_losses, users, num_padding=num_padding)
                else:
                    self._step.accumulate(micro_losses, num_padding=num_padding)
            if not num_padding:
                micro_loss = float(micro_losses.detach().sum())
                totals += totals.new_tensor([micro_loss, len(micro_losses), batch.input_ids.numel()])
        self._step.finish(totals)
        loss, num_samples = float(totals[0]), int(totals[1])
        mean_loss = loss / num_samples if num_samples else None
        return StepResult(
            step=number,
            loss=mean_loss if mean_loss is not None and math.isfinite(mean_loss) else None,
            num_samples=num_samples,
            num_tokens=int(totals[2]),
            clipped_fraction=_clipped_fraction(self._step),
            seconds=time.monotonic() - started,
        )

    def _micro_batches(
        self, drawn: Sequence[Example], *, by_user: bool
    ) -> Iterator[tuple[list[Example], int]]:
        """Yield this process' micro-batches, with how many of their rows are padding: all or none.

        Every process yields the same number, so that those with fewer samples keep pace.
        """
        processes = self._strategy.processes
        own = (
            list(drawn)
            if processes is None
            else share_of(drawn, processes.rank, processes.size, by_user=by_user)
        )
        buckets = length_buckets(own, self._micro_batch_tokens, by_user=by_user)
        num_missing = self._strategy.most(len(buckets)) - len(buckets)  # agreed before the first pass
        for bucket in buckets:
            yield [own[index] for index in bucket], 0
        for _ in range(num_missing):
            assert self._filler is not None, "several processes need a filler"
            yield [self._filler], 1

    @property
    def _device(self) -> torch.device:
        return self._step.grads.device

    def _losses(self, batch: Batch, number: int) -> Tensor:
        if self._adversary is None:  # one forward pass of the outermost module, which ZeRO-3 can foresee
            return self._within(lambda: self._losses_of(self._head.embed(batch), batch))
        embeds = self._adversary.perturb(self._within(self._head.embed, batch), batch, step=number)
        return self._within(self._losses_of, embeds, batch)

    def _losses_of(self, embeds: Tensor, batch: Batch) -> Tensor:
        return self._head.losses(embeds, batch, label_smoothing=self._label_smoothing)

    def _masks(self, batch: Batch, number: int) -> contextlib.AbstractContextManager[None]:
        """Hold the dropout masks of a micro-batch until its backward pass is done."""
        return contextlib.nullcontext() if self._dropout is None else self._dropout.masks(batch, step=number)


def share_of(drawn: Sequence[Example], rank: int, size: int, *, by_user: bool = False) -> list[Example]:
    """Take one process' part of a sample that all processes drew alike.

    Guarantees:
        The parts hold every example once, and differ by at most one unit (record or user); all records of a
        user are in one part. Long examples are dealt first, so that parts are of similar length.

    Args:
        drawn: The whole sample.
        rank: Number of the process.
        size: Number of processes.
        by_user: Keep the records of a user together.

    Returns:
        The process' examples; may be none.
    """
    units: dict[object, list[Example]] = {}
    for index, example in enumerate(drawn):
        units.setdefault(example.user_id if by_user else index, []).append(example)
    longest_first = sorted(units.values(), key=lambda unit: -max(len(example.input_ids) for example in unit))
    return [example for unit in longest_first[rank::size] for example in unit]


def check_gradients(
    head: Head, grads: PerSampleGradients, examples: Sequence[Example], *, label_smoothing: float = 0.0
) -> None:
    """Compare per-sample gradients with ordinary autograd, before anything is trained.

    Args:
        head: The model that is trained, in evaluation mode.
        grads: Its per-sample gradients.
        examples: Public examples of unequal length, so that nothing here depends on a private record.
        label_smoothing: As in training.

    Raises:
        PrivacyError: If they differ, or if the loss couples samples.
    """

    def losses_of(rows: list[int]) -> Tensor:
        batch = collate([examples[row] for row in rows]).to(grads.device)
        return head.losses(head.embed(batch), batch, label_smoothing=label_smoothing)

    with head.full_precision():  # what is checked are paths, and coarse arithmetic would hide small errors
        grads.check(losses_of, len(examples))


def make_optimizer(recipe: Recipe, parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    """Make the recipe's AdamW.

    Args:
        recipe: The recipe.
        parameters: The flat vector of all trainable parameters alone, or themselves.

    Returns:
        The optimizer.
    """
    settings = recipe.training
    return torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )


def activate_dropout(model: nn.Module) -> None:
    """Switch on the adapters' dropout and nothing else: the frozen base stays in evaluation mode.

    Args:
        model: A peft model, or one that is trained in full, without adapters.
    """
    model.eval()
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and "lora_dropout" in name:
            module.train()


def _clipped_fraction(step: OrdinaryStep) -> float | None:
    fractions = step.clipping.clipped_fraction if isinstance(step, PrivateStep) else None
    known = [fraction for fraction in fractions or () if not math.isnan(fraction)]
    return sum(known) / len(known) if known else None


@contextlib.contextmanager
def _out_of_memory_advice() -> Iterator[None]:
    """Turn an out-of-memory error into one that names the remedy."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
            raise MachineError(
                "memory ran out in a training step. Lower training.micro_batch_tokens (the result does not "
                "depend on it), data.max_length or training.lora.rank, or set "
                "training.gradient_checkpointing to true (and training.passes to 2 with training.method "
                "'full')."
            ) from error
        raise
