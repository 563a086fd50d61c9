"""Suites that turn a model into evidence: accuracy, robustness, membership inference and held-out loss."""
