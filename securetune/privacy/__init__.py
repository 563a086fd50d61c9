"""Differentially private training: per-sample gradients, clipping, noise, sampling, accounting and the ledger."""
