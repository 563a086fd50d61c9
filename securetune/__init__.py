"""Private, adversarially hardened fine-tuning of language models, with evidence and sealed checkpoints."""

__version__ = "0.1.0"
