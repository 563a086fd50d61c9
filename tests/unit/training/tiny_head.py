"""A tiny classifier with adapters that are not zero, and random examples for it."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from securetune.data.encode import Example
from securetune.models.task import ClassifyHead
from tests.tiny import LABEL_WORDS, tiny_llama, tiny_tokenizer

PROMPT = "{text}\nLabel:"


def make_head(
    *, dtype: torch.dtype = torch.float64, dropout: float = 0.0, model: nn.Module | None = None
) -> ClassifyHead:
    """Build the head, around ``model`` if one is given."""
    if model is None:
        base = tiny_llama(dtype=dtype).requires_grad_(False)
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=dropout)
        model = get_peft_model(base, config, autocast_adapter_dtype=False)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
    return ClassifyHead(model.eval(), tiny_tokenizer(), LABEL_WORDS, prompt=PROMPT)


def make_examples(count: int) -> list[Example]:
    """Draw examples of unequal length, with labels and supervised tokens."""
    generator = torch.Generator().manual_seed(3)
    examples = []
    for index in range(count):
        length = int(torch.randint(5, 12, (), generator=generator))
        ids = tuple(torch.randint(2, 250, (length,), generator=generator).tolist())
        mask = tuple(2 <= position < length - 1 for position in range(length))
        supervised = tuple(position >= 3 for position in range(length))
        examples.append(Example(f"unit{index}", ids, mask, index % 2, supervised))
    return examples
