"""A tiny random model with a byte-level tokenizer: built at once, no download, no network."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

LABEL_WORDS = (" negative", " positive")
WORDS = (*LABEL_WORDS, " ham", " spam", " yes", " no")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer(words: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    """Build a byte-level BPE tokenizer: every byte is a token, each of ``words`` is one token.

    Any UTF-8 text survives encoding and decoding. Special tokens: ``<|im_start|>`` (0), ``<|im_end|>`` (1,
    ends a sequence, pads). It has a ChatML template and adds no token of its own.
    """
    pieces = ["<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges: list[tuple[str, str]] = []
    for word in words:
        letters = word.replace(" ", "\u0120")
        for end in range(2, len(letters) + 1):
            merge = (letters[: end - 1], letters[end - 1])
            if merge not in merges:
                merges.append(merge)
                pieces.append("".join(merge))
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_llama(*, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """Build a random two-layer Llama for :func:`tiny_tokenizer`; ``options`` change its config."""
    settings: dict[str, Any] = {
        "vocab_size": len(tiny_tokenizer()),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    return tiny_model(LlamaConfig(**settings | options), seed=seed, dtype=dtype)


def tiny_model(config: Any, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Build a random model of any family, with weights large enough that attention matters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    nn.init.normal_(parameter, std=0.2)
    return model.eval()


def tiny_folder(folder: Path, *, seed: int = 0, **options: Any) -> Path:
    """Write a :func:`tiny_llama` with its tokenizer, loadable by name as any local model folder."""
    tiny_llama(seed=seed, **options).save_pretrained(folder)
    tokenizer: PreTrainedTokenizerBase = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    return folder
