"""A small PrivateTrainer over a few records, and the truth to compare it with."""

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import (
    DataCollatorForSeq2Seq,
    TrainingArguments,
)

from securetune.data.sft import encode_sft
from securetune.privacy.noise import NoiseSource
from securetune.training.trainer import PrivateTrainer
from tests.tiny import tiny_llama, tiny_tokenizer

KEY = bytes(32)
WORDS = ["a", "tiny text", "some longer text of many words", "x y z", "ha", "what is this", "no", "end of it"]
ROWS = encode_sft(
    [{"prompt": f"{word}?", "completion": f" {word}!"} for word in WORDS], tiny_tokenizer(), max_length=80
)


class NoNoise(NoiseSource):
    def __init__(self):
        super().__init__(KEY)

    def normal(self, *, count, **address):
        return torch.zeros(count)


def arguments(tmp_path, **options):
    settings = {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.1,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "seed": 0,
    }
    return TrainingArguments(**settings | options)


def lora(model):
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    return model.train()


def trainer_for(tmp_path, model=None, args=None, **options):
    settings = {
        "train_dataset": ROWS,
        "data_collator": DataCollatorForSeq2Seq(tiny_tokenizer()),
        "target_epsilon": 8.0,
        "delta": 1e-5,
    } | options
    if "sampler" not in settings:
        settings.setdefault("sample_rate", 0.5)
    return PrivateTrainer(model or lora(tiny_llama()), args or arguments(tmp_path), **settings)


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def flat(model):
    return torch.cat([p.detach().flatten() for p in trainable(model)])


def loss_alone(model, row, smoothing=0.0):
    """The truth: one record, no padding, its own mean."""
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
    logits = model(input_ids=ids).logits[0, :-1]
    keep = labels[1:] != -100
    scores = functional.log_softmax(logits, dim=-1)
    nll = -scores[keep, labels[1:][keep]]
    return ((1 - smoothing) * nll - smoothing * scores[keep].mean(dim=-1)).mean()


def clipped_sum(model, rows, clip, smoothing=0.0):
    total = torch.zeros_like(flat(model))
    for row in rows:
        grads = torch.autograd.grad(loss_alone(model, row, smoothing), trainable(model))
        grad = torch.cat([g.flatten() for g in grads])
        total += grad * min(1.0, clip / float(grad.norm()))
    return total
