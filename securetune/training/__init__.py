"""Runs: the plan, the training loop, the state a killed run resumes from, and what is made of a trained model."""
