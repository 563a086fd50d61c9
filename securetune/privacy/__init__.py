"""Differentially private training: per-sample gradients, clipping, noise, sampling, accounting, ledger."""
