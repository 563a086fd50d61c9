"""Runs: the plan, the training loop, resuming, and what is made of a trained model."""
