"""The fused end of a private step: noise, division, optimizer update and zeroing in one sweep over memory.

It stands in for ``torch.optim.AdamW`` and ``torch.optim.SGD`` over the flat parameter, with their settings,
their state and, up to rounding, their result; the optimizer stays the one to save, load and schedule.
"""

from typing import Any

import torch
from torch import Tensor

from securetune.errors import PrivacyError
from securetune.privacy.noise import Noise, NoiseSource
from securetune.privacy.per_sample import PerSampleGradients
from securetune_kernels import ParameterTable, noisy_adamw_step, noisy_sgd_step


class FusedUpdate:
    """Updates the flat parameter of a :class:`PerSampleGradients` in the place of its optimizer.

    Args:
        grads: Owner of the flat parameter.
        optimizer: The optimizer whose settings and state are used.
        noise: Independent noise.

    Raises:
        PrivacyError: If the optimizer or the noise has no fused update; the message says why.
    """

    def __init__(self, grads: PerSampleGradients, optimizer: torch.optim.Optimizer, noise: Noise) -> None:
        obstacle = why_not_fused(grads, optimizer, noise)
        if obstacle is not None:
            raise PrivacyError(f"no fused update: {obstacle}. Leave fused=True out.")
        assert isinstance(noise, NoiseSource)
        self._flat = grads.flat_params
        self._optimizer: Any = optimizer
        self._noise = noise
        self._table = ParameterTable([self._flat.data])

    def __call__(
        self,
        summed: Tensor,
        *,
        step: int,
        stream: int,
        stddev: float,
        divisor: float,
        public: Tensor | None,
    ) -> None:
        """Release the step's update.

        Args:
            summed: ``[P]``, float32: the clipped sum; zero afterwards.
            step: Logical step of the run.
            stream: Stream of the noise.
            stddev: Standard deviation of the noise, in gradient units.
            divisor: Public constant.
            public: ``[P]``, float32, or None: added after the division.
        """
        if self._table.params[0].data_ptr() != self._flat.data_ptr():
            self._table = ParameterTable([self._flat.data])
        group = self._optimizer.param_groups[0]
        key, now = self._noise.on_device(step=step, stream=stream, device=summed.device)
        common: dict[str, Any] = {
            "key": key,
            "step": now,
            "stream": stream,
            "stddev": stddev,
            "divisor": divisor,
            "public": public,
            "learning_rate": float(group["lr"]),
            "weight_decay": float(group["weight_decay"]),
        }
        state = self._optimizer.state[self._flat]
        if isinstance(self._optimizer, torch.optim.AdamW):
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(self._flat)
                state["exp_avg_sq"] = torch.zeros_like(self._flat)
            state["step"] += 1
            noisy_adamw_step(
                self._table,
                summed,
                state["exp_avg"],
                state["exp_avg_sq"],
                count=state["step"].to(summed.device),
                betas=group["betas"],
                eps=group["eps"],
                **common,
            )
        else:
            buffer = None
            if group["momentum"]:
                buffer = state.get("momentum_buffer")
                if buffer is None:
                    buffer = state["momentum_buffer"] = torch.zeros_like(self._flat)
            noisy_sgd_step(
                self._table, summed, buffer, momentum=group["momentum"], nesterov=group["nesterov"], **common
            )
        # schedulers ask whether the optimizer has stepped
        setattr(self._optimizer, "_opt_called", True)  # noqa: B010


def why_not_fused(grads: PerSampleGradients, optimizer: torch.optim.Optimizer, noise: Noise) -> str | None:
    """Say what stands in the way of a fused update.

    Args:
        grads: Owner of the parameters.
        optimizer: The optimizer.
        noise: The noise.

    Returns:
        The reason, None where nothing does.
    """
    _, flat = grads.owned_by_optimizer
    groups: list[dict[str, Any]] = optimizer.param_groups
    if (
        flat is None
        or len(groups) != 1
        or len(groups[0]["params"]) != 1
        or groups[0]["params"][0] is not flat
    ):
        return "the optimizer does not own [grads.flat_params] alone"
    if flat.dtype != torch.float32:
        return f"the trainable parameters are {flat.dtype}, not float32"
    if type(noise) is not NoiseSource:
        return f"{type(noise).__name__} is not independent noise"
    if type(optimizer) not in (torch.optim.AdamW, torch.optim.SGD):
        return f"{type(optimizer).__name__} is neither torch.optim.AdamW nor torch.optim.SGD"
    for option in ("amsgrad", "maximize", "differentiable", "dampening"):
        if groups[0].get(option):
            return f"the optimizer has {option}={groups[0][option]}"
    internals: Any = optimizer
    if internals._optimizer_step_pre_hooks or internals._optimizer_step_post_hooks:
        return "the optimizer has hooks on its step"
    return None
