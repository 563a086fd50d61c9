"""How a run was launched: the strategy, and every setting that would change privacy refused by name."""

import json

import pytest

from securetune.config.launch import Launch, read_launch
from securetune.errors import ConfigError
from tests.sample_recipe import sample_recipe

TWO = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
FSDP = {**TWO, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO = {**TWO, "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_GRADIENT_CLIPPING": "0.0"}
FILE = {"zero_optimization": {"stage": 2}}


def refusal(environment, recipe=None):
    with pytest.raises(ConfigError) as caught:
        read_launch(environment, recipe)
    return str(caught.value)


def with_file(tmp_path, changes):
    """Return the environment with a DeepSpeed file that has dotted options set."""
    values = json.loads(json.dumps(FILE))
    for dotted, value in changes.items():
        *sections, option = dotted.split(".")
        section = values
        for name in sections:
            section = section.setdefault(name, {})
        section[option] = value
    (tmp_path / "ds.json").write_text(json.dumps(values))
    environment = {**ZERO, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "ds.json")}
    del environment["ACCELERATE_GRADIENT_CLIPPING"]
    return environment


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "1"}])
def test_one_process(environment):
    assert read_launch(environment) == Launch("single")


def test_several_processes_without_a_plugin_are_ddp():
    assert read_launch(TWO) == Launch("ddp", world_size=2, rank=1, local_rank=1, local_world_size=2)


def test_fsdp2_offloads_weights_and_optimizer_state_together():
    assert read_launch(FSDP).strategy == "fsdp2"
    launch = read_launch({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"})
    assert (launch.offload_parameters, launch.offload_optimizer) == (True, True)


@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_zero_stages(stage):
    environment = {**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage, "ACCELERATE_MIXED_PRECISION": "bf16"}
    launch = read_launch(environment)
    assert (launch.strategy, launch.mixed_precision) == (f"zero{stage}", "bf16")
    assert not launch.offload_optimizer


def test_zero_offload():
    offload = {
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu",
    }
    launch = read_launch({**ZERO, **offload})
    assert (launch.offload_optimizer, launch.offload_parameters) == (True, True)
    message = refusal({**ZERO, **offload, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"})
    assert "offload_param_device is cpu at stage 2: only ZeRO-3 can do that. Set it to none" in message


def test_a_sharding_plugin_in_one_process():
    one = {**ZERO, "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert read_launch(one) == Launch("zero2")


def test_the_launcher_of_deepspeed_counts_local_processes_in_a_variable_of_its_own():
    environment = {**TWO, "LOCAL_SIZE": "2"}
    del environment["LOCAL_WORLD_SIZE"]
    assert read_launch(environment).local_world_size == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "2"}, "WORLD_SIZE=2, RANK=2, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2 cannot be"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK=unset"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
        ({"LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE=4"),
    ],
)
def test_places_that_cannot_be(change, message):
    assert message in refusal({**TWO, **change})


@pytest.mark.parametrize(
    "variable", ["PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"]
)
def test_processes_that_do_not_know_of_each_other(variable):
    message = refusal({variable: "4"})
    assert f"4 processes were started ({variable}=4)" in message
    assert "would train and spend the budget for itself. Start the run with 'accelerate launch" in message
    assert read_launch({**TWO, variable: "4"}).world_size == 2


def test_a_plugin_without_processes():
    assert "WORLD_SIZE is not set" in refusal({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"ACCELERATE_MIXED_PRECISION": "fp16"},
            "mixed_precision is fp16 (ACCELERATE_MIXED_PRECISION): fp16",
        ),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed_precision is fp8"),
        ({"ACCELERATE_FP8_BACKEND": "MSAMP"}, "fp8_config.backend is MSAMP"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo_backend is INDUCTOR"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "gradient_accumulation_steps is 4"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "megatron_lm_config is true"),
    ],
)
@pytest.mark.parametrize("base", [{}, TWO, FSDP, ZERO], ids=["single", "ddp", "fsdp2", "zero"])
def test_refused_under_every_strategy(base, change, message):
    assert message in refusal({**base, **change})


@pytest.mark.parametrize("base", [{}, TWO, FSDP], ids=["single", "ddp", "fsdp2"])
def test_bf16_is_the_recipes_choice(base):
    message = refusal({**base, "ACCELERATE_MIXED_PRECISION": "bf16"})
    assert (
        "mixed_precision is bf16 (ACCELERATE_MIXED_PRECISION): model.dtype in the recipe decides" in message
    )
    assert "Set it to 'no', and model.dtype to 'bfloat16' if you want that." in message


@pytest.mark.parametrize("name", ["TP", "CP", "SP", "DP_REPLICATE"])
def test_other_parallelism_is_refused(name):
    environment = {**FSDP, f"PARALLELISM_CONFIG_{name}_SIZE": "2"}
    assert read_launch(environment).strategy == "fsdp2"  # accelerate looks at it only where it is switched on
    environment["ACCELERATE_USE_PARALLELISM_CONFIG"] = "true"
    message = refusal(environment)
    assert f"parallelism_config_{name.lower()}_size is 2 (PARALLELISM_CONFIG_{name}_SIZE)" in message
    assert message.endswith("Set it to 1.")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"FSDP_VERSION": "1"}, "fsdp_config.fsdp_version is 1 (FSDP_VERSION)"),
        ({"FSDP_VERSION": None}, "fsdp_version is not set, and accelerate then takes 1"),
        ({"FSDP_IGNORED_MODULES": ".*head"}, "the weights of ignored modules are not reduced"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "True"}, "leaves the base model empty on all processes but the"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "training.gradient_checkpointing in the recipe does"),
        ({"FSDP_RESHARD_AFTER_FORWARD": "false"}, "fsdp_reshard_after_forward is false"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "FSDP and DeepSpeed are both switched on"),
    ],
)
def test_refused_under_fsdp(change, message):
    environment = {key: value for key, value in {**FSDP, **change}.items() if value is not None}
    assert message in refusal(environment)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, "gradient_clipping is 1.0 (ACCELERATE_GRADIENT_CLIPPING)"),
        (
            {"ACCELERATE_GRADIENT_CLIPPING": None},
            "gradient_clipping is not set, and accelerate then takes 1.0",
        ),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "zero_stage is 0"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"}, "writes unsealed weights or optimizer"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}, "offload_param_device is nvme"),
        ({"ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": "Experts"}, "deepspeed_moe_layer_cls_names is Experts"),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "missing.json"}, "missing.json: No such file"),
    ],
)
def test_refused_under_deepspeed(change, message):
    environment = {key: value for key, value in {**ZERO, **change}.items() if value is not None}
    assert message in refusal(environment)


def test_all_problems_are_told_at_once():
    message = refusal({**TWO, "ACCELERATE_MIXED_PRECISION": "fp16", "ACCELERATE_DYNAMO_BACKEND": "EAGER"})
    assert message.startswith("2 problems in how this run was launched\n  mixed_precision")
    assert message.count("\n") == 2


def test_a_deepspeed_file_says_the_strategy(tmp_path):
    launch = read_launch(
        with_file(
            tmp_path,
            {
                "zero_optimization.stage": 3,
                "zero_optimization.offload_param": {"device": "cpu", "pin_memory": True},
                "zero_optimization.reduce_bucket_size": "auto",
                "bf16.enabled": True,
                "gradient_accumulation_steps": "auto",
                "train_batch_size": "auto",
                "communication_data_type": "fp32",
                "gradient_clipping": 0,
                "zero_optimization.zenflow": None,
            },
        )
    )
    assert launch.strategy == "zero3"
    assert (launch.mixed_precision, launch.offload_parameters) == ("bf16", True)
    assert not launch.offload_optimizer


def test_auto_in_a_deepspeed_file_takes_what_accelerate_says(tmp_path):
    environment = with_file(tmp_path, {"zero_optimization.stage": "auto", "bf16.enabled": "auto"})
    environment |= {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1", "ACCELERATE_MIXED_PRECISION": "bf16"}
    launch = read_launch(environment)
    assert (launch.strategy, launch.mixed_precision) == ("zero1", "bf16")
    off = with_file(tmp_path, {"bf16.enabled": False}) | {"ACCELERATE_MIXED_PRECISION": "bf16"}
    assert read_launch(off).mixed_precision == "no"


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("gradient_clipping", 1.0, "clip the released gradient"),
        ("gradient_clipping", "auto", "accelerate takes 1.0 for 'auto'"),
        ("gradient_accumulation_steps", 4, "adds up its micro-batches itself"),
        ("optimizer", {"type": "AdamW"}, "ends with the recipe's own optimizer"),
        ("scheduler", {"type": "WarmupLR"}, "ends with the recipe's own optimizer"),
        ("communication_data_type", "bf16", 'Remove it, or set it to "fp32"'),
        ("prescale_gradients", True, "divided once"),
        ("gradient_predivide_factor", 2.0, "divided once"),
        ("gradient_allreduce_op", "sum", "divided once"),
        ("data_types.grad_accum_dtype", "bf16", "added up in float32"),
        ("fp16.enabled", True, "loss scaler skips steps"),
        ("bf16.check_grad_overflow", True, "skips steps"),
        ("bf16.immediate_grad_update", True, "before their noise is added"),
        ("bf16.bf16_master_weights_and_grads", True, "float32"),
        ("torch_autocast.enabled", True, "format of autocast"),
        ("wandb", {"enabled": True}, "un-noised numbers"),
        ("zero_optimization.stage", 0, "stage is 0"),
        ("zero_optimization.round_robin_gradients", True, "which process owns"),
        ("zero_optimization.sub_group_size", 1000, "where gradients lie"),
        ("zero_optimization.zero_quantized_gradients", True, "quantised"),
        ("zero_optimization.zero_quantized_weights", True, "quantised"),
        ("zero_optimization.zero_hpz_partition_size", 8, "ZeRO++"),
        ("zero_optimization.zenflow", {"topk_ratio": 0.1}, "older gradients"),
        ("zero_optimization.offload_optimizer.device", "nvme", "unsealed optimizer state"),
        ("zero_optimization.offload_optimizer.ratio", 0.5, "another device"),
        ("zero_optimization.offload_param.device", "nvme", "unsealed weights"),
        ("elasticity", {"enabled": True}, "not known to leave clipping"),
        ("tensor_parallel", {"autotp_size": 2}, "not known to leave clipping"),
        ("expert_parallel", {"size": 2}, "not known to leave clipping"),
        ("pipeline", {"stages": 2}, "not known to leave clipping"),
        ("an_option_of_tomorrow", 1, "not known to leave clipping"),
        ("zero_optimization.an_option_of_tomorrow", 1, "not known to leave clipping"),
    ],
)
def test_refused_in_a_deepspeed_file(tmp_path, option, value, reason):
    message = refusal(with_file(tmp_path, {option: value}))
    assert f"{option} is {json.dumps(value)} in the DeepSpeed file: " in message
    assert reason in message
    assert "emove it" in message


def test_the_other_bf16_optimizer_of_zero1_is_refused(tmp_path):
    changes = {"bf16.enabled": True, "data_types.grad_accum_dtype": "fp32"}
    assert read_launch(with_file(tmp_path, changes)).strategy == "zero2"
    message = refusal(with_file(tmp_path, {**changes, "zero_optimization.stage": 1}))
    assert "makes another optimizer of ZeRO-1 with bf16" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "must have a section zero_optimization"),
        ('{"zero_optimization": {}}', "zero_optimization.stage is missing or 0"),
        (" " * (1 << 20) + "{}", "larger than 1,048,576 bytes"),
    ],
)
def test_a_deepspeed_file_that_cannot_be_used(tmp_path, content, message):
    environment = with_file(tmp_path, {})
    (tmp_path / "ds.json").write_text(content)
    assert message in refusal(environment)


@pytest.mark.parametrize(("base", "name"), [(FSDP, "fsdp2"), (ZERO, "zero2")])
def test_early_stopping_may_be_sharded(base, name):
    changes = {"training.early_stopping": {"method": "noisy_test", "epsilon": 1.0}, "data.min_held_out": 1200}
    assert read_launch(base, sample_recipe(changes)).strategy == name


def test_bf16_against_a_float32_recipe():
    environment = {**ZERO, "ACCELERATE_MIXED_PRECISION": "bf16"}
    message = refusal(environment, sample_recipe({"model.dtype": "float32"}))
    assert "mixed_precision is bf16, but model.dtype in the recipe is float32" in message
    assert read_launch(environment, sample_recipe({"model.dtype": "bfloat16"})).mixed_precision == "bf16"
