"""What a DeepSpeed JSON file (``deepspeed_config_file``) may hold: options known to change no private step.

Everything else is refused by name, so that an option that a later DeepSpeed adds is refused too. The tables
follow DeepSpeed 0.19 (``runtime/config.py``, ``runtime/zero/config.py``, ``runtime/precision_config.py``).
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_MAX_BYTES = 1 << 20
_UNKNOWN = "it is not known to leave clipping, noise and update as they are"
_QUANTISED = "ZeRO++ sends quantised numbers, which are not the clipped float32 sums"
_OWN_UPDATE = "the private step ends with the recipe's own optimizer"
_SUM = "the sum over processes is made in float32 and divided once, by privacy.expected_batch_size"
_LOGS = "it sends un-noised numbers of the training elsewhere"

_ANY = object()
_ALLOWED: dict[str, tuple[tuple[Any, ...], str]] = {
    "train_batch_size": ((_ANY,), ""),
    "train_micro_batch_size_per_gpu": ((_ANY,), ""),
    "steps_per_print": ((_ANY,), ""),
    "wall_clock_breakdown": ((_ANY,), ""),
    "comms_logger": ((_ANY,), ""),
    "zero_allow_untested_optimizer": ((_ANY,), ""),
    "zero_force_ds_cpu_optimizer": ((_ANY,), ""),
    "gradient_accumulation_steps": ((1, "auto"), "a private step adds up its micro-batches itself"),
    "gradient_clipping": (
        (0,),
        "DeepSpeed would clip the released gradient of the whole batch a second time, and accelerate takes "
        "1.0 for 'auto'",
    ),
    "optimizer": ((), _OWN_UPDATE),
    "scheduler": ((), _OWN_UPDATE),
    "communication_data_type": (("fp32",), _SUM),
    "prescale_gradients": ((False,), _SUM),
    "gradient_predivide_factor": ((1,), _SUM),
    "gradient_allreduce_op": (("mean",), _SUM),
    "data_types.grad_accum_dtype": (("fp32",), "clipped gradients are added up in float32"),
    "fp16.enabled": ((False, "auto"), "its loss scaler skips steps by what the records' gradients are"),
    "fp16.*": ((_ANY,), ""),
    "bf16.enabled": ((True, False, "auto"), ""),
    "bf16.check_grad_overflow": ((False,), "it skips steps by what the gradient is"),
    "bf16.immediate_grad_update": ((False,), "it passes gradients on before their noise is added"),
    "bf16.bf16_master_weights_and_grads": ((False,), "gradients and masters are float32"),
    "bf16.bf16_optimizer_states": ((False,), "gradients and masters are float32"),
    "torch_autocast.enabled": ((False,), "it reduces gradients in the format of autocast"),
    "torch_autocast.*": ((_ANY,), ""),
    "tensorboard": ((), _LOGS),
    "wandb": ((), _LOGS),
    "csv_monitor": ((), _LOGS),
    "comet": ((), _LOGS),
    "zero_optimization.stage": ((1, 2, 3, "auto"), "only ZeRO-1, 2 and 3 are supported"),
    "zero_optimization.round_robin_gradients": ((False,), "it changes which process owns which gradients"),
    "zero_optimization.parameter_alignment": ((False,), "it changes where gradients lie in a shard"),
    "zero_optimization.sub_group_size": ((10**9, "auto"), "it changes where gradients lie in a shard"),
    "zero_optimization.legacy_stage1": ((False,), "it changes which process owns which gradients"),
    "zero_optimization.elastic_checkpoint": ((False,), "checkpoints are sealed by securetune"),
    "zero_optimization.zero_quantized_gradients": ((False,), _QUANTISED),
    "zero_optimization.zero_quantized_weights": ((False,), _QUANTISED),
    "zero_optimization.zero_quantized_nontrainable_weights": ((False,), _QUANTISED),
    "zero_optimization.zero_hpz_partition_size": (
        (1,),
        "ZeRO++ keeps second shards, which are not supported",
    ),
    "zero_optimization.zenflow": ((), "it updates some weights before others, from older gradients"),
    "zero_optimization.offload_optimizer.device": (
        ("none", "cpu", "auto"),
        "it writes unsealed optimizer state to a disk",
    ),
    "zero_optimization.offload_optimizer.ratio": ((1,), "it updates one part of a shard on another device"),
    "zero_optimization.offload_optimizer.super_offload": (
        (False,),
        "it updates while gradients still arrive",
    ),
    "zero_optimization.offload_optimizer.pin_memory": ((_ANY,), ""),
    "zero_optimization.offload_param.device": (
        ("none", "cpu", "auto"),
        "it writes unsealed weights to a disk",
    ),
    "zero_optimization.offload_param.pin_memory": ((_ANY,), ""),
    **{
        f"zero_optimization.{name}": ((_ANY,), "")
        for name in (
            "allgather_bucket_size",
            "allgather_partitions",
            "compute_grad_norm",
            "contiguous_gradients",
            "ignore_unused_parameters",
            "memory_efficient_linear",
            "overlap_comm",
            "reduce_bucket_size",
            "reduce_scatter",
            "stage3_gather_16bit_weights_on_model_save",
            "stage3_max_live_parameters",
            "stage3_max_reuse_distance",
            "stage3_model_persistence_threshold",
            "stage3_param_persistence_threshold",
            "stage3_prefetch_bucket_size",
            "use_multi_rank_bucket_allreduce",
        )
    },
}


def read_deepspeed_file(path: str) -> dict[str, Any] | str:
    """Read a DeepSpeed JSON file.

    Args:
        path: What ``deepspeed_config_file`` says.

    Returns:
        Its content, or what is wrong with it.
    """
    option = f"deepspeed_config.deepspeed_config_file is {path}"
    try:
        content = Path(path).read_bytes()[: _MAX_BYTES + 1]
    except OSError as error:
        return f"{option}: {error.strerror or error}. Give the path of a JSON file."
    if len(content) > _MAX_BYTES:
        return f"{option}: larger than {_MAX_BYTES:,} bytes. Give a DeepSpeed configuration."
    try:
        values = json.loads(content)
    except ValueError as error:
        return f"{option}: not JSON: {error}. Repair the file."
    if not isinstance(values, dict) or not isinstance(values.get("zero_optimization"), dict):
        return f"{option}: it must have a section zero_optimization with a stage."
    return values


def broken_options(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each option of a DeepSpeed configuration that is refused.

    Args:
        values: The parsed configuration.

    Yields:
        The dotted option, its value, why it is refused and what to do.
    """
    yield from _broken(values, "")


def _broken(values: Mapping[str, Any], section: str) -> Iterator[str]:
    for key, value in values.items():
        path = f"{section}{key}"
        if value is None:
            continue
        known = _ALLOWED.get(path) or _ALLOWED.get(f"{section}*")
        if (
            known is None
            and isinstance(value, dict)
            and any(name.startswith(f"{path}.") for name in _ALLOWED)
        ):
            yield from _broken(value, f"{path}.")
            continue
        allowed, reason = known or ((), _UNKNOWN)
        plain = value.lower() if isinstance(value, str) else value
        if any(choice is _ANY or choice == plain for choice in allowed):
            continue
        choices = [json.dumps(choice) for choice in allowed]
        remedy = f"Remove it, or set it to {' or '.join(choices)}." if choices else "Remove it."
        yield f"{path} is {_show(value)} in the DeepSpeed file: {reason}. {remedy}"


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
