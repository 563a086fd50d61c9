"""One optimizer step: ordinary, or differentially private.

The private one is Algorithm 1 of Abadi et al. 2016, https://arxiv.org/abs/1607.00133.

Micro-batches are accumulated in float32, so any micro-batch size gives the same result up to rounding. The
private step then charges the ledger, adds noise once to the clipped sum, divides by a public constant, and
lets any optimizer update.
"""

import torch
from torch import Tensor

from securetune.errors import PrivacyError
from securetune.privacy.ledger import Ledger
from securetune.privacy.noise import NoiseSource
from securetune.privacy.per_sample import PerSampleGradients
from securetune_kernels import clip_and_accumulate

GRADIENT_NOISE_STREAM = 0


class OrdinaryStep:
    """Accumulate gradients over micro-batches, then update: the step without privacy, for the baseline.

    Args:
        grads: Per-sample gradients of the model's adapters.
        optimizer: Any torch optimizer over ``[grads.flat_params]``.
        expected_batch_size: Divisor of the summed gradient, > 0.
    """

    def __init__(
        self, grads: PerSampleGradients, optimizer: torch.optim.Optimizer, *, expected_batch_size: int
    ) -> None:
        if not expected_batch_size > 0:
            raise PrivacyError(f"expected_batch_size must be > 0, got {expected_batch_size}.")
        _refuse_other_parameters(grads, optimizer)
        self.grads = grads
        self.optimizer = optimizer
        self.expected_batch_size = expected_batch_size
        self.summed = torch.zeros(
            grads.num_params, dtype=torch.float32, device=grads.flat_params.device
        )  # [P]

    def accumulate(self, losses: Tensor) -> Tensor:
        """Add a micro-batch's gradients.

        Args:
            losses: ``[B]``, one loss per sample, attached to their graph.

        Returns:
            ``[B]``, float32: gradient norms.
        """
        rows = self.grads.backward(losses)
        self.summed += rows.sum(dim=0)
        return torch.linalg.vector_norm(rows, dim=1)

    def finish(self) -> None:
        """Update the parameters from the accumulated gradient and start the next step."""
        self._update()

    def _update(self) -> None:
        self.grads.flat_params.grad = (self.summed / self.expected_batch_size).to(
            self.grads.flat_params.dtype
        )
        self.optimizer.step()
        self.grads.flat_params.grad = None
        self.summed.zero_()


class PrivateStep(OrdinaryStep):
    """The DP-SGD step: clip each sample, sum, add noise once, divide by a public constant, update.

    Guarantees:
        Adding or removing one sample moves the accumulated sum by at most ``max_grad_norm`` in L2 norm. The
        noise has standard deviation ``noise_multiplier * max_grad_norm``, is drawn once per step in float32,
        and is added even when no sample was drawn. The step is in the ledger, on disk, before its noise
        exists. A sample whose gradient is not finite contributes exactly zero.

    Args:
        grads: Per-sample gradients of the model's adapters.
        optimizer: Any torch optimizer over ``[grads.flat_params]``; weight decay is applied to released
            parameters only.
        max_grad_norm: Clipping threshold ``C`` > 0, in units of the gradient's L2 norm.
        noise_multiplier: Noise standard deviation over ``C``, >= 0.
        expected_batch_size: Public divisor of the noisy sum; never the number of samples drawn.
        noise: Position-addressed noise under a key of its own.
        ledger: Where every step is charged.
    """

    def __init__(
        self,
        grads: PerSampleGradients,
        optimizer: torch.optim.Optimizer,
        *,
        max_grad_norm: float,
        noise_multiplier: float,
        expected_batch_size: int,
        noise: NoiseSource,
        ledger: Ledger,
    ) -> None:
        super().__init__(grads, optimizer, expected_batch_size=expected_batch_size)
        if not max_grad_norm > 0:
            raise PrivacyError(f"max_grad_norm must be > 0, got {max_grad_norm}.")
        if not noise_multiplier >= 0:
            raise PrivacyError(f"noise_multiplier must be >= 0, got {noise_multiplier}.")
        self.max_grad_norm = max_grad_norm
        self.noise_multiplier = noise_multiplier
        self._noise = noise
        self._ledger = ledger
        self._steps_finished = 0

    def accumulate(self, losses: Tensor) -> Tensor:
        """Add a micro-batch's clipped gradients.

        Args:
            losses: ``[B]``, one loss per sample, attached to their graph.

        Returns:
            ``[B]``, float32: gradient norms before clipping. They are un-noised statistics of private data,
                which
            epsilon does not cover.
        """
        rows = self.grads.backward(losses)
        return clip_and_accumulate(rows, self.summed, self.max_grad_norm)

    def finish(self) -> None:
        """Charge the ledger, add noise, update, and start the next step.

        Raises:
            PrivacyError: If the planned budget is spent; nothing is released then.
        """
        self._ledger.charge()
        stddev = self.noise_multiplier * self.max_grad_norm
        noise = self._noise.normal(
            step=self._steps_finished,
            stream=GRADIENT_NOISE_STREAM,
            start=0,
            count=self.summed.numel(),
            stddev=stddev,
        )
        self._steps_finished += 1
        self.summed += noise.to(self.summed.device)
        self._update()


def _refuse_other_parameters(grads: PerSampleGradients, optimizer: torch.optim.Optimizer) -> None:
    """The optimizer must own the flat vector and nothing else: anything else would train without noise."""
    owned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if len(owned) != 1 or owned[0] is not grads.flat_params:
        raise PrivacyError(
            f"the optimizer must own exactly the flat adapter vector (grads.flat_params), got {len(owned)} "
            "parameters. "
            "Create it as torch.optim.AdamW([grads.flat_params], ...)."
        )
