"""Fused operations for private and adversarial training, each with a plain PyTorch reference.

The package imports only the standard library and torch; Triton is imported on first use of a Triton kernel.
"""

from .clip_and_accumulate import clip_and_accumulate
from .gaussian_noise import gaussian_noise
from .noisy_step import ParameterTable, noisy_adamw_step, noisy_sgd_step
from .pgd_step import pgd_step

__all__ = [
    "ParameterTable",
    "clip_and_accumulate",
    "gaussian_noise",
    "noisy_adamw_step",
    "noisy_sgd_step",
    "pgd_step",
]
