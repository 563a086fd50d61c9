"""Models: safe loading of a base model, task heads with per-sample losses, LoRA adapters."""
