"""One optimizer step: ordinary, or differentially private.

The private one is Algorithm 1 of Abadi et al. 2016, https://arxiv.org/abs/1607.00133.

Micro-batches are accumulated in float32, so any micro-batch size gives the same result up to rounding. The
private step then charges the ledger, adds noise once to the clipped sum, divides by a public constant, adds
the public gradient if there is one, and lets any optimizer update.

Dimensions: ``B`` samples, ``U`` privacy units, ``P`` trainable parameters.
"""

from collections.abc import Hashable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from securetune.errors import PrivacyError
from securetune.privacy.clipping import Clipping, FlatClipping
from securetune.privacy.fused_update import FusedUpdate, why_not_fused
from securetune.privacy.ledger import LedgerState
from securetune.privacy.matrix_factorization import CorrelatedNoise, MatrixMechanism, WholeRunCharge
from securetune.privacy.noise import Noise
from securetune.privacy.per_sample import PerSampleGradients
from securetune.privacy.reduction import Reduction, SingleProcess, add_noise
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
    """

    def __init__(
        self, grads: PerSampleGradients, optimizer: torch.optim.Optimizer, *, expected_batch_size: int
    ) -> None:
        if not expected_batch_size > 0:
            raise PrivacyError(f"expected_batch_size must be > 0, got {expected_batch_size}.")
        self.grads = grads
        self.optimizer = optimizer
        self.expected_batch_size = expected_batch_size
        self.summed = torch.zeros(grads.num_params, dtype=grads.compute_dtype, device=grads.device)  # [P]
        _refuse_other_parameters(grads, optimizer)

    def accumulate(self, losses: Tensor) -> Tensor:
        """Add a micro-batch's gradients.

        Args:
            losses: ``[B]``, one loss per sample, attached to their graph.

        Returns:
            ``[B]``, float32: gradient norms.
        """
        batch = self.grads.backward(losses)
        norms = batch.squared_norms().sqrt().squeeze(1)
        batch.accumulate(torch.ones_like(norms)[:, None], self.summed)
        return norms

    def finish(self) -> None:
        """Update the parameters from the accumulated gradient and start the next step."""
        _refuse_other_parameters(self.grads, self.optimizer)
        whole = slice(0, self.grads.num_params)
        gradient = self.summed.div_(self.expected_batch_size)
        SingleProcess().assign(self.grads, self.optimizer, whole, gradient)
        self._update()

    def _update(self) -> None:
        """Let the optimizer use the gradients that it was given, and forget them."""
        parameters, flat = self.grads.owned_by_optimizer
        self.optimizer.step()
        for parameter in [*parameters, *([] if flat is None else [flat])]:
            parameter.grad = None
        self.summed.zero_()


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
            parameters than the trainable ones.
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
        super().__init__(grads, optimizer, expected_batch_size=expected_batch_size)
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
        self._reduction = reduction or SingleProcess()
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
        self._public: Tensor | None = None  # [P], the weighted public gradient of this step
        self._private_ids: set[Hashable] = set()
        self._public_ids: set[Hashable] = set()

    def accumulate(self, losses: Tensor, unit_ids: Sequence[Hashable] | None = None) -> Tensor:
        """Add a micro-batch's clipped gradients.

        Args:
            losses: ``[B]``, one loss per sample, attached to their graph.
            unit_ids: Privacy unit of each sample (a user, say); all samples and all adversarial views of a
                unit must come in one micro-batch, and are clipped as one. Every sample is a unit of its own
                when None.

        Returns:
            ``[U]``, float32: gradient norms before clipping, units in order of appearance. They are un-noised
                statistics of private data, which epsilon does not cover.

        Raises:
            PrivacyError: If a unit was in an earlier micro-batch of this step, or among the public records.
        """
        if unit_ids is not None:
            self._remember(self._private_ids, unit_ids, self._public_ids)
        batch = self.grads.backward(losses, unit_ids)
        rows = batch.flat_rows
        if type(self.clipping) is FlatClipping and rows is not None and rows.dtype == torch.float32:
            norms = clip_and_accumulate(rows, self.summed, self.clipping.max_grad_norm)
            self.clipping.factors(norms.double().square()[:, None])  # it counts the clipped ones
            return norms
        squared = batch.squared_norms(self._group_of, self.clipping.num_groups)
        batch.accumulate(self.clipping.factors(squared), self.summed, self._group_of)
        return squared.sum(dim=1).sqrt()

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
            self._public = torch.zeros_like(self.summed)
        batch.accumulate(self.summed.new_full((batch.num_units, 1), weight), self._public)

    def finish(self) -> None:
        """Charge the ledger, add noise, update, and start the next step.

        Raises:
            PrivacyError: If the planned budget is spent; nothing is released then.
        """
        _refuse_other_parameters(self.grads, self.optimizer)
        step = self._steps_finished
        self._ledger.charge()
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
                public=self._public,
            )
        else:
            self._release(step, stddev)
            self._update()
        self.clipping.finish(self._noise, step=step, noise_multiplier=self.noise_multiplier)
        self._public = None
        self._private_ids.clear()
        self._public_ids.clear()

    def _release(self, step: int, stddev: float) -> None:
        reduction = self._reduction
        for layer in reduction.layers(self.grads.parameters):
            shard = reduction.reduce_sum(layer, self.summed[layer])
            address = reduction.address(layer, shard)
            add_noise(shard, address, self._noise, step=step, stream=GRADIENT_NOISE_STREAM, stddev=stddev)
            shard.div_(self.expected_batch_size)
            if self._public is not None:
                shard += reduction.reduce_sum(layer, self._public[layer])
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


def _refuse_other_parameters(grads: PerSampleGradients, optimizer: torch.optim.Optimizer) -> None:
    """The optimizer must own the trainable parameters and nothing else, which would train without noise."""
    owned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parameters, flat = grads.owned_by_optimizer
    if len(owned) == 1 and owned[0] is flat:
        return
    expected = {id(parameter) for parameter in parameters}
    found = {id(parameter) for parameter in owned if parameter.requires_grad}
    missing = [place.name for place in grads.parameters if id(place.parameter) not in found]
    unknown = len(found - expected)
    if missing or unknown:
        raise PrivacyError(
            f"the optimizer must own exactly the trainable parameters: {len(missing)} are missing"
            f"{f' ({missing[0]}, ...)' if missing else ''}, {unknown} are unknown to the per-sample "
            "gradients and would train without noise. Create it over [p for p in model.parameters() if "
            "p.requires_grad], or over [grads.flat_params]."
        )


__all__ = ["GRADIENT_NOISE_STREAM", "OrdinaryStep", "PrivateStep"]
