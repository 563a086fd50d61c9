"""Fused operations for private and adversarial training, each with a plain PyTorch reference.

The package imports only the standard library and torch; Triton is imported on first use of a Triton kernel.
"""

from ._linear import Segments
from .clip_and_accumulate import clip_and_accumulate
from .clipped_linear_grad import clipped_linear_grad
from .embedding_grad_norms import embedding_grad_norms, tied_cross_products
from .gaussian_noise import gaussian_noise
from .linear_grad_norms import LinearGradNorms, linear_grad_norms
from .lora_per_sample_grads import Adapter, lora_per_sample_grads
from .noisy_step import ParameterTable, noisy_adamw_step, noisy_sgd_step
from .per_sample_sums import Normalized, per_sample_sums
from .pgd_step import pgd_step

__all__ = [
    "Adapter",
    "LinearGradNorms",
    "Normalized",
    "ParameterTable",
    "Segments",
    "clip_and_accumulate",
    "clipped_linear_grad",
    "embedding_grad_norms",
    "gaussian_noise",
    "linear_grad_norms",
    "lora_per_sample_grads",
    "noisy_adamw_step",
    "noisy_sgd_step",
    "per_sample_sums",
    "pgd_step",
    "tied_cross_products",
]
