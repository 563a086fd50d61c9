"""Which options of ``transformers.Trainer`` cannot be used for private training, and why."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from securetune.errors import ConfigError

if TYPE_CHECKING:
    from transformers import TrainingArguments

FP16 = (
    "fp16: its loss scaling skips a step when a private gradient overflows, which epsilon does not cover. "
    "Use bf16, or float32."
)


_TEXT_COLUMNS = {"messages", "prompt", "completion", "text"}
_MASK_COLUMNS = {"completion_mask", "assistant_masks"}
_MODEL_INPUTS = {"input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values"}


def refuse_options(
    args: "TrainingArguments", options: Mapping[str, Any], *, first_row: Any, has_clipping: bool
) -> None:
    """Refuse, all at once, what the guarantee does not survive or what would be ignored.

    Args:
        args: The arguments as the user gave them.
        options: Further arguments of the trainer.
        first_row: One of the rows to train on; only the names of its columns count.
        has_clipping: Whether a clipping was given, so that ``max_grad_norm`` is not used.

    Raises:
        ConfigError: If anything must be refused.
    """
    columns = set(first_row) if isinstance(first_row, Mapping) else set()
    checks = [
        (
            bool(columns & _TEXT_COLUMNS) and not columns & _MODEL_INPUTS and args.remove_unused_columns,
            f"train_dataset with the columns {', '.join(sorted(columns & _TEXT_COLUMNS))}: the model takes "
            "tokens. Give encode_sft(rows, tokenizer, max_length=...) from securetune.data.sft.",
        ),
        (
            bool(columns & _MASK_COLUMNS) and "labels" not in columns and args.remove_unused_columns,
            f"train_dataset with the columns {', '.join(sorted(columns & _MASK_COLUMNS))} and no labels: "
            "they would be dropped, and all tokens trained on. Give labels (encode_sft makes them), or set "
            "remove_unused_columns=False and give a data_collator that uses them.",
        ),
        (args.fp16, FP16),
        (
            not (has_clipping or (args.max_grad_norm or 0) > 0),
            f"max_grad_norm must be > 0, got {args.max_grad_norm}: it bounds each record's gradient. Or give "
            "clipping.",
        ),
        (
            args.auto_find_batch_size,
            "auto_find_batch_size: starts over when a private sample needs too much memory. Set "
            "per_device_train_batch_size lower; the result does not depend on it.",
        ),
        (
            args.train_sampling_strategy != "random",
            f"train_sampling_strategy={args.train_sampling_strategy!r}: the accountant counts secret random "
            "samples only. Leave it at 'random'.",
        ),
        (
            args.dataloader_drop_last,
            "dataloader_drop_last: there is no last batch, each step is a new sample. Set it to False.",
        ),
        (
            args.dataloader_num_workers > 0,
            "dataloader_num_workers: samples are secret, so batches are made in this process. Set it to 0.",
        ),
        (
            args.neftune_noise_alpha is not None,
            "neftune_noise_alpha: its noise depends on the batch's longest record. Set it to None.",
        ),
        (
            args.use_liger_kernel,
            "use_liger_kernel: its fused loss is a mean over the batch. Set it to False.",
        ),
        (
            args.include_num_input_tokens_seen != "no",
            "include_num_input_tokens_seen: it would log the sizes of private samples. Set it to 'no'.",
        ),
        (
            not args.skip_memory_metrics,
            "skip_memory_metrics: the memory that private samples take would be logged. Set it to True.",
        ),
        (
            bool(
                (getattr(args.accelerator_config, "gradient_accumulation_kwargs", None) or {}).get(
                    "num_steps"
                )
            ),
            "accelerator_config with num_steps: several private steps would be paid for and all but the last "
            "one lost. Set gradient_accumulation_steps.",
        ),
        (
            args.enable_jit_checkpoint,
            "enable_jit_checkpoint: a run that a signal ends looks like one that data ended, and is charged "
            "in full. Use save_steps, and let the process be killed: resuming loses no charged step.",
        ),
        (
            any(word in str(args.optim).lower() for word in ("lomo", "layerwise")),
            f"optim={args.optim}: it updates within the backward pass, before there is any noise. Use "
            "another.",
        ),
        (
            options.get("eval_dataset") is not None,
            "eval_dataset: metrics on private records are un-noised, and epsilon does not cover what is "
            "chosen by them. Give public records as public_eval_dataset.",
        ),
    ]
    problems = [message for is_wrong, message in checks if is_wrong]
    if problems:
        raise ConfigError("PrivateTrainer cannot use:\n  " + "\n  ".join(problems))
