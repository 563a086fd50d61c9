"""Differentially private training inside a torch loop that somebody else wrote.

The loop keeps its model, loss, optimizer and scheduler. What changes is where batches come from (a secret
sample of each step), and who differentiates and updates: :class:`PrivateTraining`, in the places of
``loss.backward()`` and ``optimizer.step()``.
"""

import logging
import math
import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from securetune.errors import PrivacyError
from securetune.privacy.accounting import PrivacyPlan, PrivacySpec, plan_privacy
from securetune.privacy.clipping import Clipping, FlatClipping
from securetune.privacy.ledger import Ledger, LedgerHeader
from securetune.privacy.noise import NoiseSource
from securetune.privacy.per_sample import PerSampleGradients
from securetune.privacy.sampling import PoissonSampler, Sampler, refuse_other_records
from securetune.privacy.saved_tensors import SavedTensors
from securetune.privacy.step import PrivateStep
from securetune.privacy.units import DrawnRecord, UserSampler

__all__ = ["PrivateTraining", "Records", "make_private"]

_logger = logging.getLogger(__name__)


class Records(Protocol):
    """The private records: a list, a ``torch`` map-style data set, a ``datasets.Dataset``."""

    def __len__(self) -> int:
        """Number of records; private, except where the sampler says otherwise."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """One record."""
        ...


class _MicroBatch(NamedTuple):
    positions: list[int]
    unit_ids: list[Hashable]


class PrivateTraining:
    """One private run inside a plain training loop; made by :func:`make_private`.

    Guarantees:
        Each step is a new secret sample of the records. Each sampled record is differentiated once, in one
        micro-batch, and no micro-batch can be left out: :meth:`step` refuses until all had their
        :meth:`backward`. A step is in the ledger, on disk, before its noise exists; the loop ends when the
        planned steps are charged. The size of a sample, and the number of records, are used nowhere else.

    Args:
        step: Clips, sums, noises, updates.
        sampler: Draws each step's records.
        records: The private records.
        ledger: Where steps are charged.
        plan: The run's noise and epsilon, known before it starts.

    Attributes:
        plan: As given.
        ledger: As given.
        grads: The engine of the per-sample gradients.
        clipping: What bounds each unit's gradient.
    """

    def __init__(
        self,
        step: PrivateStep,
        sampler: Sampler | UserSampler,
        records: Records,
        ledger: Ledger,
        plan: PrivacyPlan,
    ) -> None:
        self.plan = plan
        self.ledger = ledger
        self.grads = step.grads
        self.clipping = step.clipping
        self._step = step
        self._sampler = sampler
        self._records = records
        self._is_in_step = False
        self._is_broken = False  # a micro-batch failed on its way into the sum
        self._micro_batches: list[_MicroBatch] = []  # of the running step, still to be handed out
        self._in_hand: _MicroBatch | None = None  # handed out, not yet differentiated
        self._saved: SavedTensors | None = None  # before the first forward pass of the step

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the ledger to other writers and the model its ordinary gradients back; charges stay."""
        self.ledger.close()
        self.grads.detach()

    @property
    def epsilon(self) -> float | None:
        """Epsilon of all steps charged so far, at the plan's delta; None where a key is fixed for a test."""
        return self.ledger.epsilon()

    @property
    def remaining_steps(self) -> int:
        """Steps that may still be charged."""
        return self.ledger.remaining_steps

    def steps(
        self, *, micro_batch_size: int, collate_fn: Callable[[list[Any]], Any] | None = None
    ) -> Iterator[Iterator[Any]]:
        """Draw the samples of all remaining steps, one after the other.

        A sample may be empty: there is no micro-batch then, and :meth:`step` still adds noise and counts.
        Torch's random generator is reseeded first, since dropout's masks must not follow from a seed that is
        known; with a key fixed for a test it is not.

        Args:
            micro_batch_size: Most records in one forward pass, >= 1; the result does not depend on it. All
                records of a user come in one pass, however many.
            collate_fn: Makes a batch of a list of records, one row for each in the same order; torch's
                default when None.

        Yields:
            The micro-batches of one step.

        Raises:
            ValueError: If ``micro_batch_size`` is below 1.
            PrivacyError: If the step before was not finished.
        """
        if micro_batch_size < 1:
            raise ValueError(f"micro_batch_size must be >= 1, got {micro_batch_size}.")
        collate = torch.utils.data.default_collate if collate_fn is None else collate_fn
        if self.ledger.state.header.reportable_epsilon:
            torch.seed()
        while self.remaining_steps:
            if self._is_in_step:
                raise PrivacyError(
                    "the step before was not finished, so its sample would be lost, and that it was may "
                    "depend on the data. Call private.step() after the micro-batches of each step. After an "
                    "error, start again with make_private: its ledger goes on."
                )
            self._micro_batches = _split(self._sampler.draw_next(), micro_batch_size)
            self._is_in_step = True
            yield self._hand_out(collate)
        self.close()

    def _hand_out(self, collate: Callable[[list[Any]], Any]) -> Iterator[Any]:
        if self._micro_batches and self._saved is None:
            self._saved = SavedTensors(self.grads.model)
        while self._micro_batches:
            self._refuse_if_broken()
            if self._in_hand is not None:
                raise PrivacyError(
                    "a micro-batch was left out: it got no private.backward(losses). Leaving records out "
                    "depends on the data, and epsilon does not cover that. Give it a loss; a loss that is "
                    "not finite counts as zero by itself."
                )
            self._in_hand = self._micro_batches.pop(0)
            rows = [self._records[index] for index in self._in_hand.positions]
            order = [id(row) for row in rows]
            batch = collate(rows)
            now, has_joint_units = [id(row) for row in rows], len(set(self._in_hand.unit_ids)) < len(order)
            if has_joint_units and now != order and sorted(now) == sorted(order):
                raise PrivacyError(
                    "collate_fn sorted the records, and the losses come in their order: the records of one "
                    "user could not be told from another's. Keep the order (pack_padded_sequence has "
                    "enforce_sorted=False)."
                )
            yield batch

    def backward(self, losses: Tensor) -> None:
        """Differentiate a micro-batch: in the place of ``loss.backward()``.

        Args:
            losses: ``[B]``, one loss per record of the micro-batch, in its order, attached to their graph.

        Raises:
            PrivacyError: If there is not one loss per record, the losses are coupled, or the micro-batch was
                differentiated before.
        """
        if self._in_hand is None:
            raise PrivacyError(
                "there is no micro-batch to differentiate: private.backward(losses) goes with the batches of "
                "private.steps(), once for each, or a record would count twice. For two losses of one "
                "record, add them first; for public records use public_backward."
            )
        expected = len(self._in_hand.positions)
        if not isinstance(losses, Tensor) or losses.shape != (expected,):
            shape = list(losses.shape) if isinstance(losses, Tensor) else None
            got = f"a {type(losses).__name__}" if shape is None else f"shape {shape}"
            raise PrivacyError(
                f"losses must hold one value for each of the {expected} records of the micro-batch, a tensor "
                f"of shape [{expected}], got {got}. Use reduction='none', average within each "
                "record only, and let collate_fn make one row of each record."
            )
        self._refuse_if_broken()
        self._is_broken = True
        self._step.accumulate(losses, self._in_hand.unit_ids)
        self._is_broken = False
        self._in_hand = None

    def public_backward(self, losses: Tensor, *, weight: float = 1.0) -> None:
        """Add the gradient of public records to the running step: neither clipped, noised nor counted.

        Args:
            losses: ``[B]``, one loss per public record, attached to their graph. None of these records may be
                among the private ones.
            weight: Factor of their summed gradient in the update: ``1 / B`` for a mean.
        """
        self._step.accumulate_public(losses, weight=weight)

    def step(self) -> None:
        """Charge the ledger, add noise, update: in the place of ``optimizer.step()`` and ``zero_grad()``.

        Raises:
            PrivacyError: If no sample was drawn for it, a micro-batch of the sample is missing, or the step
                wrote into the model.
        """
        if not self._is_in_step:
            raise PrivacyError(
                "there is no step to finish: private.step() goes once with each step of private.steps()."
            )
        self._refuse_if_broken()
        missing = len(self._micro_batches) + (self._in_hand is not None)
        if missing:
            raise PrivacyError(
                f"{missing} micro-batches of this step got no private.backward(losses). Leaving records out "
                "depends on the data, and epsilon does not cover that: run the loop over micro-batches to "
                "its end."
            )
        if self._saved is not None:
            self._saved.refuse_written()
        self._step.finish()
        self._is_in_step, self._saved = False, None

    def _refuse_if_broken(self) -> None:
        if self._is_broken:
            raise PrivacyError(
                "an error stopped the backward pass of a micro-batch of this step. Going on without it would "
                "leave records out, and whether it failed depends on them. Start again with make_private, "
                "for example with smaller micro-batches: its ledger goes on."
            )

    def check(self, losses_of: Callable[[list[Any]], Tensor], examples: Sequence[Any]) -> float:
        """Compare with ordinary autograd, and each example with itself without its batch-mates.

        What a graph cannot show is found here: a token count over the batch that divides every loss.

        Args:
            losses_of: The loop's own collating and loss: a list of records to losses ``[B]``.
            examples: Public examples of unequal length, two or more; dropout is switched off meanwhile.

        Returns:
            The largest relative difference.

        Raises:
            ValueError: If there is one example only, which has no batch-mate.
            PrivacyError: If gradients differ, samples are coupled, or no gradient reaches the parameters.
        """
        if len(examples) < 2:
            raise ValueError(
                f"check needs two examples or more, of unequal length, got {len(examples)}: one alone has no "
                "batch-mate that it could depend on."
            )
        training = [module for module in self.grads.model.modules() if module.training]
        self.grads.model.eval()
        try:
            return self.grads.check(lambda rows: losses_of([examples[row] for row in rows]), len(examples))
        finally:
            for module in training:
                module.training = True

    def stop_early(self) -> None:
        """End the run before its last step, and charge all steps that are left.

        When to stop was learnt by looking, so the planned epsilon is the one to report, unless the number of
        steps was fixed beforehand.
        """
        while self.remaining_steps:
            self.ledger.charge()
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Return what belongs into a checkpoint, between two steps, beside model and optimizer.

        Returns:
            ``steps_charged``, who charged them, and kind and state of the clipping; public, JSON-able. Keys
            are never in it: a resumed run draws new ones.
        """
        return {
            "steps_charged": self.ledger.steps_charged,
            "writers": sorted(self.ledger.state.writers),
            "clipping": self.clipping.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, with the ledger of the run that wrote it.

        Args:
            state: From :meth:`state_dict`.

        Raises:
            PrivacyError: If the ledger holds fewer steps than the checkpoint had paid for, or is another
                run's.
            CheckpointError: If the state of the clipping does not fit.
        """
        if self.ledger.steps_charged < state["steps_charged"]:
            raise PrivacyError(
                f"{self.ledger.path} holds {self.ledger.steps_charged} steps, but the checkpoint had paid "
                f"for {state['steps_charged']}: the ledger was lost or shortened, so epsilon would be too "
                "low. Restore it, or start a new run with a new ledger (its epsilon adds to this one's)."
            )
        if not self.ledger.state.writers.issuperset(state["writers"]):
            raise PrivacyError(
                f"{self.ledger.path} is the ledger of another run than this checkpoint: steps that the model "
                "was trained with are not in it, so epsilon would be too low. Give the ledger of the "
                "checkpoint's run."
            )
        self.clipping.load_state_dict(state["clipping"])


def make_private(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    records: Records,
    *,
    target_epsilon: float,
    delta: float,
    expected_batch_size: int,
    max_grad_norm: float | Clipping,
    ledger: str | os.PathLike[str],
    sample_rate: float | None = None,
    sampler: Sampler | UserSampler | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    noise: NoiseSource | None = None,
    passes: Literal[1, 2] = 1,
) -> PrivateTraining:
    """Calibrate the noise and make a training loop's model, optimizer and records private.

    Every number here is a public constant: choose them without looking at the private records.

    Args:
        model: The model on its device, frozen where it shall stay.
        optimizer: Any torch optimizer over exactly the trainable parameters; schedulers on it work as before.
        records: The private records; one record is the privacy unit, unless ``sampler`` says otherwise.
        target_epsilon: Largest epsilon of the whole run, > 0.
        delta: Probability allowed for the guarantee to fail; at most one over the number of records.
        expected_batch_size: Divisor of each step's sum, about ``sample_rate`` times the number of records.
        max_grad_norm: Longest gradient of one unit, > 0: the threshold of flat clipping, or another clipping.
        ledger: File that counts the steps across crashes; made if missing, continued if there. Keep it as
            long as the model: without it nobody knows what was spent.
        sample_rate: Probability in (0, 1] of each record at each step: Poisson sampling. In its place:
        sampler: Another way to sample, for users or of a fixed size.
        steps: Number of steps, >= 1. In its place:
        epochs: Expected number of times that a record is taken; ``round(epochs / sample_rate)`` steps.
        noise: The noise; with a fixed key, for tests, no epsilon is reported. By default a new secret key.
        passes: 2 trades time for memory in training in full under gradient checkpointing, see
            :class:`PerSampleGradients`.

    Returns:
        The run; its ``plan`` says what it will cost.

    Raises:
        ValueError: If a number is out of its range, not exactly one of each pair is given, or the records
            can't be sampled.
        PrivacyError: If the model, the optimizer or the numbers allow no guarantee, the ledger is another
            run's, or its steps are all charged.
    """
    if (sample_rate is None) == (sampler is None):
        raise ValueError(f"give either sample_rate or sampler, got {sample_rate} and {sampler!r}.")
    if (steps is None) == (epochs is None):
        raise ValueError(f"give either steps or epochs, got {steps} and {epochs}.")
    refuse_other_records("records", records)
    if sampler is None:
        assert sample_rate is not None
        sampler = PoissonSampler(len(records), sample_rate)
    if sampler.num_records != len(records):
        raise ValueError(
            f"the sampler draws from {sampler.num_records} records, but {len(records)} are given. Make it "
            "with num_records=len(records), or with the user of each record in its order."
        )
    if sampler.participation is not None:
        raise ValueError(
            f"{sampler!r} takes batches in a fixed order, where independent noise would cost far more than "
            "on random samples. Give sample_rate or a random sampler, or build a PrivateStep with "
            "CorrelatedNoise and WholeRunCharge, as a recipe does with privacy.noise = "
            "'matrix_factorization'."
        )
    planned_units = expected_batch_size / sampler.sample_rate
    if delta * planned_units > 1 + 1e-9:
        raise ValueError(
            f"delta must be at most one over the planned number of {sampler.describe().unit}s, "
            f"expected_batch_size / sample_rate = {planned_units:g}, got {delta:g}: a larger one would allow "
            "to publish some of them outright."
        )
    if steps is None:
        assert epochs is not None
        if not 0 < epochs < math.inf:
            raise ValueError(f"epochs must be a finite number > 0, got {epochs}.")
        steps = max(1, round(epochs / sampler.sample_rate))
    noise = noise or NoiseSource()
    grads = PerSampleGradients(model, passes=passes)
    try:
        clipping = max_grad_norm if isinstance(max_grad_norm, Clipping) else FlatClipping(max_grad_norm)
        clipping.assign(grads.parameter_names())
        plan = plan_privacy(
            PrivacySpec(
                target_epsilon=target_epsilon,
                delta=delta,
                sample_rate=sampler.sample_rate,
                steps=steps,
                max_grad_norm=math.hypot(*clipping.thresholds.values()),
                expected_batch_size=expected_batch_size,
                sampler=sampler.sampling.kind,
                num_records=sampler.sampling.num_records,
                max_batch_size=sampler.sampling.max_batch_size,
            )
        )
        header = LedgerHeader.from_plan(
            plan,
            reportable_epsilon=noise.reportable_epsilon and sampler.reportable_epsilon,
            unit=sampler.describe().unit,
            sampler=sampler,
            clipping=clipping,
        )
        opened = Ledger(ledger, header)
        try:
            _say_what_was_charged(opened)
            step = PrivateStep(
                grads,
                optimizer,
                clipping=clipping,
                noise_multiplier=plan.noise_multiplier,
                expected_batch_size=expected_batch_size,
                noise=noise,
                ledger=opened,
            )
        except BaseException:
            opened.close()
            raise
    except BaseException:
        grads.detach()
        raise
    return PrivateTraining(step, sampler, records, opened, plan)


def _say_what_was_charged(ledger: Ledger) -> None:
    if ledger.remaining_steps == 0:
        raise PrivacyError(
            f"all {ledger.steps_charged} planned steps are charged in {ledger.path}: this run has ended, and "
            "training again would spend its epsilon again. Use the model that it trained, or give a new "
            "ledger (the epsilons of both runs add up)."
        )
    if ledger.steps_charged:
        _logger.warning(
            "%s holds %d steps charged before: %d of %d are left. Load the checkpoint of that run, or what "
            "those steps learnt is lost.",
            ledger.path,
            ledger.steps_charged,
            ledger.remaining_steps,
            ledger.steps_charged + ledger.remaining_steps,
        )


def _split(drawn: Sequence[int] | Sequence[DrawnRecord], size: int) -> list[_MicroBatch]:
    """Split a sample into micro-batches; records of one unit, which come side by side, stay together."""
    units: dict[Hashable, list[int]] = {}
    for record in drawn:
        unit_id, position = (record.unit_id, record.position) if isinstance(record, tuple) else (record,) * 2
        units.setdefault(unit_id, []).append(position)
    batches: list[_MicroBatch] = []
    for unit_id, positions in units.items():
        if not batches or len(batches[-1].positions) + len(positions) > size:
            batches.append(_MicroBatch([], []))
        batches[-1].positions.extend(positions)
        batches[-1].unit_ids.extend([unit_id] * len(positions))
    return batches
