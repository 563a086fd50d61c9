"""One optimizer step: ordinary, or differentially private.

The private one is Algorithm 1 of Abadi et al. 2016, https://arxiv.org/abs/1607.00133.

Micro-batches are accumulated in float32, so any micro-batch size gives the same result up to rounding. The
private step then charges the ledger, adds noise once to the clipped sum, divides by a public constant, adds
the public gradient if there is one, and lets any optimizer update.

Dimensions: ``B`` samples, ``U`` privacy units, ``P`` trainable parameters.
"""

import inspect
from collections.abc import Hashable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from securetune.errors import PrivacyError
from securetune.privacy.clipping import Clipping, FlatClipping
from securetune.privacy.fused_update import FusedUpdate, why_not_fused
from securetune.privacy.ledger import LedgerState
from securetune.privacy.matrix_factorization import CorrelatedNoise, MatrixMechanism, WholeRunCharge
from securetune.privacy.noise import Noise
from securetune.privacy.per_sample import PerSampleGradients
from securetune.privacy.per_sample.layout import refuse_joined
from securetune.privacy.reduction import Accumulator, Reduction, SingleProcess, add_noise
from securetune_kernels import clip_and_accumulate

GRADIENT_NOISE_STREAM = 0


class Charges(Protocol):
    """Where a run is charged before its noise exists; see :class:`securetune.privacy.ledger.Ledger`."""

    @property
    def state(self) -> LedgerState:
        """What was charged so far, and the run's public constants."""
        ...

    def charge(self) -> int:
        """Charge one step durably, or raise if the budget is spent."""
        ...


class OrdinaryStep:
    """Accumulate gradients over micro-batches, then update: the step without privacy, for the baseline.

    Args:
        grads: Per-sample gradients of the model's trainable parameters.
        optimizer: Any torch optimizer over all of the trainable parameters and nothing else, or over
            ``[grads.flat_params]``.
        expected_batch_size: Divisor of the summed gradient, > 0.
        reduction: How several processes add up and share the work; one process when None.
    """

    def __init__(
        self,
        grads: PerSampleGradients,
        optimizer: torch.optim.Optimizer,
        *,
        expected_batch_size: int,
        reduction: Reduction | None = None,
    ) -> None:
        if not expected_batch_size > 0:
            raise PrivacyError(f"expected_batch_size must be > 0, got {expected_batch_size}.")
        self.grads = grads
        self.optimizer = optimizer
        self.expected_batch_size = expected_batch_size
        refuse_kind(optimizer)
        self._reduction = reduction or SingleProcess()
        self._reduction.refuse_other_parameters(grads, optimizer)
        self._sum = Accumulator(grads, self._reduction)

    @property
    def summed(self) -> Tensor:
        """``[P]``, float32: this process' sum of the running step, before any reduction.

        Raises:
            PrivacyError: If the strategy reduces each micro-batch, so that no process holds it.
        """
        if self._sum.summed is None:
            raise PrivacyError("with sharded accumulators no process holds the whole sum.")
        return self._sum.summed

    def accumulate(self, losses: Tensor, *, num_padding: int = 0) -> Tensor:
        """Add a micro-batch's gradients.

        Args:
            losses: ``[B]``, one loss per sample, attached to their graph.
            num_padding: So many of the last rows stand for no sample and add nothing: they keep a process in
                step with others.

        Returns:
            ``[B - num_padding]``, float32: gradient norms.
        """
        batch = self.grads.backward(losses)
        norms = batch.squared_norms().sqrt().squeeze(1)
        factors = torch.ones_like(norms)[:, None]
        factors[len(losses) - num_padding :] = 0.0
        self._sum.add(batch, factors)
        return norms[: len(losses) - num_padding]

    def finish(self, *totals: Tensor) -> None:
        """Update the parameters from the accumulated gradient and start the next step.

        Args:
            *totals: Small tensors of the caller's, added up over all processes in place.
        """
        self._reduction.refuse_other_parameters(self.grads, self.optimizer)
        for layer, shard in self._sum.reduced():
            shard.div_(self.expected_batch_size)
            self._reduction.assign(self.grads, self.optimizer, layer, shard)
        self._update()
        if totals:
            self._reduction.add_counts(*totals)

    def _update(self) -> None:
        self._reduction.update(self.grads, self.optimizer)
        self._sum.clear()


class PrivateStep(OrdinaryStep):
    """The DP-SGD step: clip each unit, sum, add noise once, divide by a public constant, update.

    Guarantees:
        Adding or removing one privacy unit moves the accumulated sum by at most ``clipping.sensitivity`` in
        L2 norm. The noise follows from that same object, is drawn once per step in float32, and is added even
        when no sample was drawn. The step is in the ledger, on disk, before its noise exists. A unit whose
        gradient is not finite contributes exactly zero. The public gradient is neither clipped nor noised.

    Args:
        grads: Per-sample gradients of the model's trainable parameters.
        optimizer: Any torch optimizer over all of the trainable parameters and nothing else, or over
            ``[grads.flat_params]``; weight decay is applied to released parameters only.
        clipping: Bounds each unit's gradient, and owns the sensitivity.
        noise_multiplier: Noise standard deviation over the sensitivity, >= 0.
        expected_batch_size: Public divisor of the noisy sum; never the number of samples drawn.
        noise: Position-addressed noise under a key of its own.
        ledger: Where every step is charged.
        reduction: How several processes add up and share the work; one process when None.
        fused: Noise and update in one sweep over memory. None does so on a GPU where the optimizer allows it:
            AdamW or SGD over ``[grads.flat_params]``. The result is the same up to rounding.

    Raises:
        PrivacyError: If a value is out of its range, the ledger was opened for another noise multiplier or
            charges for noise of another kind, the noise belongs to another run, or the optimizer owns other
            parameters than the trainable ones or cannot step on given gradients.
    """

    def __init__(
        self,
        grads: PerSampleGradients,
        optimizer: torch.optim.Optimizer,
        *,
        clipping: Clipping,
        noise_multiplier: float,
        expected_batch_size: int,
        noise: Noise,
        ledger: Charges,
        reduction: Reduction | None = None,
        fused: bool | None = None,
    ) -> None:
        super().__init__(grads, optimizer, expected_batch_size=expected_batch_size, reduction=reduction)
        if not noise_multiplier >= 0:
            raise PrivacyError(f"noise_multiplier must be >= 0, got {noise_multiplier}.")
        charged = ledger.state.header.noise_multiplier
        if charged != noise_multiplier:
            raise PrivacyError(
                f"the ledger charges steps of noise_multiplier {charged}, the step would add noise of "
                f"{noise_multiplier}. Give both the plan's."
            )
        _refuse_other_noise(noise, ledger)
        self.clipping = clipping
        self.noise_multiplier = noise_multiplier
        self._group_of = clipping.assign(grads.parameter_names())
        clipping.noise_stddev(noise_multiplier)  # refuses before anything is charged
        self._noise = noise
        self._ledger = ledger
        if fused and reduction is not None:
            raise PrivacyError("fused=True is for one process. Leave it out, or leave out reduction.")
        may_fuse = reduction is None and (self.summed.is_cuda if fused is None else fused)
        is_possible = fused or why_not_fused(grads, optimizer, noise) is None
        self._fused = FusedUpdate(grads, optimizer, noise) if may_fuse and is_possible else None
        # last of what may refuse: a step that is not made leaves its noise to another
        if isinstance(ledger, WholeRunCharge):
            ledger.begin_run()
        noise.begin_run()
        self._steps_finished = 0
        self._is_releasing = False  # between the charge of a step and its end
        self._public: Accumulator | None = None  # the weighted public gradient of this step
        self._private_ids: set[Hashable] = set()
        self._public_ids: set[Hashable] = set()

    def accumulate(
        self, losses: Tensor, unit_ids: Sequence[Hashable] | None = None, *, num_padding: int = 0
    ) -> Tensor:
        """Add a micro-batch's clipped gradients.

        Args:
            losses: ``[B]``, one loss per sample, attached to their graph.
            unit_ids: Privacy unit of each sample (a user, say); all samples and all adversarial views of a
                unit must come in one micro-batch, and are clipped as one. Every sample is a unit of its own
                when None.
            num_padding: So many of the last rows stand for no sample and add nothing, whatever their losses:
                they keep a process in step with others. ``unit_ids`` names the other rows only.

        Returns:
            ``[U]``, float32: gradient norms before clipping, units in order of appearance. They are un-noised
                statistics of private data, which epsilon does not cover.

        Raises:
            PrivacyError: If a unit was in an earlier micro-batch of this step, or among the public records.
        """
        if unit_ids is not None:
            self._remember(self._private_ids, unit_ids, self._public_ids)
            unit_ids = [*unit_ids, *(_Padding(row) for row in range(num_padding))]
        batch = self.grads.backward(losses, unit_ids)
        rows = batch.flat_rows
        clipping, summed = self.clipping, self._sum.summed
        if (
            type(clipping) is FlatClipping
            and summed is not None
            and rows is not None
            and rows.dtype == torch.float32
            and not num_padding
        ):
            norms = clip_and_accumulate(rows, summed, clipping.max_grad_norm)
            clipping.factors(norms.double().square()[:, None])  # it counts the clipped ones
            return norms
        squared = batch.squared_norms(self._group_of, self.clipping.num_groups)
        num_units = len(squared) - num_padding
        squared[num_units:] = torch.nan  # which the clipping neither lets through nor counts
        self._sum.add(batch, self.clipping.factors(squared), self._group_of)
        return squared[:num_units].sum(dim=1).sqrt()

    def accumulate_public(
        self, losses: Tensor, *, weight: float = 1.0, record_ids: Sequence[Hashable] | None = None
    ) -> None:
        """Add the gradient of public records, which is neither clipped, noised nor counted.

        Args:
            losses: ``[B]``, one loss per public record, attached to their graph.
            weight: Factor of this micro-batch's summed gradient in the update, next to the private one, which
                is divided by ``expected_batch_size``: ``1 / B`` for a mean.
            record_ids: Ids of the records, in the same naming as the private ``unit_ids``.

        Raises:
            PrivacyError: If a record is among the private ones of this step.
        """
        if record_ids is not None:
            self._remember(self._public_ids, record_ids, self._private_ids)
        batch = self.grads.backward(losses)
        if self._public is None:
            self._public = Accumulator(self.grads, self._reduction)
        self._public.add(batch, losses.detach().new_full((batch.num_units, 1), weight, dtype=torch.float32))

    def finish(self, *totals: Tensor) -> None:
        """Charge the ledger, add noise, update, and start the next step.

        Args:
            *totals: Small tensors of the caller's, added up over all processes in place.

        Raises:
            PrivacyError: If the planned budget is spent; nothing is released then. Or if an error stopped the
                step before after it was charged.
        """
        if self._is_releasing:
            raise PrivacyError(
                "an error stopped a step after it was charged, so its noised sum may be out. Releasing the "
                "same sample once more costs more than a step on a new one, which is what would be charged. "
                "Start again from the last checkpoint with this ledger, which goes on."
            )
        self._reduction.refuse_other_parameters(self.grads, self.optimizer)
        refuse_joined(self.grads.model, self.grads.parameters)
        step = self._steps_finished
        self._ledger.charge()
        self._is_releasing = True
        self._steps_finished += 1
        stddev = self.clipping.noise_stddev(self.noise_multiplier)
        is_fused = why_not_fused(self.grads, self.optimizer, self._noise) is None
        if self._fused is not None and is_fused:  # hooks or options may have come since
            self._fused(
                self.summed,
                step=step,
                stream=GRADIENT_NOISE_STREAM,
                stddev=stddev,
                divisor=self.expected_batch_size,
                public=None if self._public is None else self._public.summed,
            )
        else:
            self._release(step, stddev)
            self._update()
        self._reduction.add_counts(self.clipping.counts, *totals)
        self.clipping.finish(self._noise, step=step, noise_multiplier=self.noise_multiplier)
        self._public = None
        self._private_ids.clear()
        self._public_ids.clear()
        self._is_releasing = False

    def _release(self, step: int, stddev: float) -> None:
        reduction = self._reduction
        public = None if self._public is None else self._public.reduced()
        for layer, shard in self._sum.reduced():
            for part, address in reduction.places(layer, shard):
                add_noise(part, address, self._noise, step=step, stream=GRADIENT_NOISE_STREAM, stddev=stddev)
            shard.div_(self.expected_batch_size)
            if public is not None:
                _, public_shard = next(public)
                shard += public_shard
            reduction.assign(self.grads, self.optimizer, layer, shard)

    @staticmethod
    def _remember(own: set[Hashable], ids: Sequence[Hashable], others: set[Hashable]) -> None:
        shared = others.intersection(ids)
        if shared:
            raise PrivacyError(
                f"{len(shared)} records are private and public in one step, first {next(iter(shared))!r}. A "
                "public gradient has no noise, so such a record would not be protected: remove it from the "
                "public set."
            )
        again = own.intersection(ids)
        if again:
            raise PrivacyError(
                f"{len(again)} units are in two micro-batches of one step, first {next(iter(again))!r}. Each "
                "part would be clipped for itself, and the unit would count twice: put all of its samples "
                "into one."
            )
        own.update(ids)


def refuse_kind(optimizer: torch.optim.Optimizer) -> None:
    """Refuse, before anything is charged, an optimizer whose ``step()`` would fail after it.

    Args:
        optimizer: Any.

    Raises:
        PrivacyError: If it needs a closure or sparse gradients.
    """
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    needs_closure = closure is not None and closure.default is inspect.Parameter.empty
    if needs_closure or isinstance(optimizer, torch.optim.SparseAdam):
        why = (
            "computes the loss several times in one step, and each time would be a release of its own"
            if needs_closure
            else "takes sparse gradients, and noise makes all of them dense"
        )
        raise PrivacyError(f"{type(optimizer).__name__} {why}. Use another, such as torch.optim.AdamW.")


def _refuse_other_noise(noise: Noise, ledger: Charges) -> None:
    """What is charged must be what is drawn: noise of its own for each step, or one mechanism for all."""
    if ledger.state.header.reportable_epsilon and not noise.reportable_epsilon:
        raise PrivacyError(
            "the noise has a fixed key, for tests, so everybody can subtract it, but the ledger reports an "
            "epsilon. Make the noise without a key, or open the ledger with reportable_epsilon=False."
        )
    drawn = noise.mechanism if isinstance(noise, CorrelatedNoise) else None
    charged = ledger.mechanism if isinstance(ledger, WholeRunCharge) else None
    if drawn != charged:
        raise PrivacyError(
            f"the noise is {_kind(drawn)}, but the ledger charges for {_kind(charged)}, so epsilon would be "
            "wrong. CorrelatedNoise goes with the WholeRunCharge of its own mechanism; a NoiseSource goes "
            "with the Ledger itself, which charges each step."
        )


def _kind(mechanism: MatrixMechanism | None) -> str:
    return "independent at each step" if mechanism is None else f"that of {mechanism}"


class _Padding(NamedTuple):
    """The unit of a row that stands for no sample: equal to no record's."""

    row: int


__all__ = ["GRADIENT_NOISE_STREAM", "OrdinaryStep", "PrivateStep", "refuse_kind"]
