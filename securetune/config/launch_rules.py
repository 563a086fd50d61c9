"""What may start a run: settings of accelerate that would change privacy, or what is computed, are refused.

The table of the environment follows accelerate 1.10 to 1.15 (``utils/launch.py``, ``utils/dataclasses.py``):
what ``accelerate launch`` makes of a configuration file, and what its plugins read where a variable is unset.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

_TRUE, _FALSE = ("y", "yes", "t", "true", "on", "1"), ("n", "no", "f", "false", "off", "0")


class Setting(NamedTuple):
    """A variable of the environment with the values it may have."""

    variable: str
    """Name of the variable."""
    option: str
    """Name of the option in a configuration file of accelerate."""
    unset: str
    """What accelerate takes where the variable is not set."""
    allowed: tuple[str, ...]
    """Values that are fine; ``""`` stands for none."""
    reason: str
    """What every other value would do."""
    remedy: str = ""
    """What to do; by default to set one of the allowed values."""


ALWAYS = (
    Setting(
        "ACCELERATE_MIXED_PRECISION",
        "mixed_precision",
        "no",
        ("no", "bf16"),
        "fp16 skips steps when its loss scaler meets an overflow, which depends on the records, and fp8 "
        "scales the records of a batch together",
    ),
    Setting(
        "ACCELERATE_FP8_BACKEND",
        "fp8_config.backend",
        "",
        ("",),
        "8-bit formats scale the records of a batch together",
    ),
    Setting(
        "ACCELERATE_DYNAMO_BACKEND",
        "dynamo_config.dynamo_backend",
        "no",
        ("no",),
        "recipes compile nothing, and accelerate would let matrix products round to TF32",
    ),
    Setting(
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
        "gradient_accumulation_steps",
        "1",
        ("1",),
        "a private step adds up its micro-batches itself, and accelerate would divide and update in between",
        "Set it to 1; training.micro_batch_tokens decides how many micro-batches there are.",
    ),
    Setting(
        "ACCELERATE_USE_MEGATRON_LM",
        "megatron_lm_config",
        "false",
        ("false",),
        "pipeline and tensor parallelism cut a record's gradient into pieces whose norm no process knows",
        "Remove it; there are ddp, fsdp2, zero1, zero2 and zero3.",
    ),
)
BFLOAT16 = Setting(
    "ACCELERATE_MIXED_PRECISION",
    "mixed_precision",
    "no",
    ("no",),
    "model.dtype in the recipe decides what layers compute in, and with FSDP accelerate would reduce "
    "clipped sums in that format",
    "Set it to 'no', and model.dtype to 'bfloat16' if you want that.",
)
PARALLELISM = tuple(
    Setting(f"PARALLELISM_CONFIG_{name}_SIZE", f"parallelism_config_{name.lower()}_size", "1", ("1",), reason)
    for name, reason in (
        ("TP", "tensor parallelism cuts a record's gradient into pieces whose norm no process knows"),
        ("CP", "context parallelism cuts records into pieces whose norm no process knows"),
        ("SP", "sequence parallelism cuts records into pieces whose norm no process knows"),
        ("DP_REPLICATE", "replicas of shards are not supported"),
    )
)
FSDP = (
    Setting(
        "FSDP_VERSION",
        "fsdp_config.fsdp_version",
        "1",
        ("2",),
        "FSDP 1 flattens parameters, so that layers have no weights of their own to read gradients of",
    ),
    Setting(
        "FSDP_IGNORED_MODULES",
        "fsdp_config.fsdp_ignored_modules",
        "",
        ("", "none"),
        "the weights of ignored modules are not reduced, so that processes would train different ones",
    ),
    Setting(
        "FSDP_CPU_RAM_EFFICIENT_LOADING",
        "fsdp_config.fsdp_cpu_ram_efficient_loading",
        "false",
        ("false",),
        "it leaves the base model empty on all processes but the first",
    ),
    Setting(
        "FSDP_ACTIVATION_CHECKPOINTING",
        "fsdp_config.fsdp_activation_checkpointing",
        "false",
        ("false",),
        "accelerate's wrapping of layers is not used here",
        "Set it to false; training.gradient_checkpointing in the recipe does the same.",
    ),
    Setting(
        "FSDP_RESHARD_AFTER_FORWARD",
        "fsdp_config.fsdp_reshard_after_forward",
        "true",
        _TRUE,
        "each layer is freed after its forward pass, and gathered again for the backward pass",
        "Set it to true.",
    ),
)
_DEVICES = ("none", "cpu")
_NVME = "it writes unsealed weights or optimizer state to a disk"
EXPERTS = Setting(
    "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES",
    "deepspeed_config.deepspeed_moe_layer_cls_names",
    "",
    ("",),
    "DeepSpeed's handling of experts is not supported",
)
DEEPSPEED = (
    Setting(
        "ACCELERATE_DEEPSPEED_ZERO_STAGE",
        "deepspeed_config.zero_stage",
        "2",
        ("1", "2", "3"),
        "only ZeRO-1, 2 and 3 are supported",
        "Set it to 1, 2 or 3, or use recipes/accelerate/ddp.yaml.",
    ),
    Setting(
        "ACCELERATE_GRADIENT_CLIPPING",
        "deepspeed_config.gradient_clipping",
        "1.0",
        ("0",),
        "DeepSpeed would clip the released gradient of the whole batch a second time",
        "Set it to 0.0; each record is clipped to privacy.max_grad_norm.",
    ),
    Setting(
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
        "deepspeed_config.offload_optimizer_device",
        "none",
        _DEVICES,
        _NVME,
    ),
    Setting(
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
        "deepspeed_config.offload_param_device",
        "none",
        _DEVICES,
        _NVME,
    ),
)


def flag(environment: Mapping[str, str], variable: str) -> bool:
    """Say whether a variable is set to a true value, as accelerate reads it."""
    return environment.get(variable, "").strip().lower() in _TRUE


def broken_settings(environment: Mapping[str, str], settings: Sequence[Setting]) -> Iterator[str]:
    """Yield a line for each setting that is refused.

    Args:
        environment: The environment variables.
        settings: What is looked at.

    Yields:
        The option, its value, why it is refused and what to do.
    """
    for setting in settings:
        value = environment.get(setting.variable)
        if value is not None and _normal(value, setting) in setting.allowed:
            continue
        if value is None and _normal(setting.unset, setting) in setting.allowed:
            continue
        remedy = setting.remedy or _remedy(setting)
        if value is None:
            found = f"{setting.option} is not set, and accelerate then takes {setting.unset}"
        else:
            found = f"{setting.option} is {value} ({setting.variable})"
        yield f"{found}: {setting.reason}. {remedy}"


def _normal(value: str, setting: Setting) -> str:
    text = value.strip().lower()
    if setting.allowed == ("false",):
        return "false" if text in _FALSE else text
    try:
        return f"{float(text):g}"
    except ValueError:
        return text


def _remedy(setting: Setting) -> str:
    if "" in setting.allowed:
        return "Remove it."
    return f"Set it to {' or '.join(setting.allowed)}."
