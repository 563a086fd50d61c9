"""Exact per-sample gradients of every trainable parameter, in one backward pass."""

from securetune.privacy.per_sample.engine import PerSampleGradients
from securetune.privacy.per_sample.gradients import BatchGradients

__all__ = ["BatchGradients", "PerSampleGradients"]
