"""DeepSpeed's ZeRO-1, 2 and 3 give the private result of one process."""

import json
from types import SimpleNamespace

import pytest
import torch

from securetune.errors import PrivacyError
from securetune.privacy.distributed import Zero
from tests.distributed.launching import load_result, torchrun

pytest.importorskip("deepspeed")

STAGES = (1, 2, 3)
KINDS = ("lora", "full", "tied")
PLAIN = tuple(f"{stage}-{kind}-{n}" for kind in KINDS for stage in STAGES for n in (1, 2))
OTHERS = (
    *(f"{stage}-tied-2-offload" for stage in STAGES),
    *(f"{stage}-tied-1-groups-robin" for stage in STAGES),
    *(f"{stage}-tied-1-attack" for stage in STAGES),
    "3-lora-2-attack",
    *(f"{stage}-tied-2-engine" for stage in STAGES),
    "3-lora-2-engine",
    "3-lora-1-init",
    "3-tied-1-init",
    "3-tied-2-subgroups",
    "3-tied-2-subgroups-offload",
    "2-tied-2-twice",
    "3-tied-2-twice",
    "3-lora-2-checkpointing",
    "3-tied-1-checkpointing-twice",
)
AT_LAST = ("1-tied-1-accelerate", "3-lora-2-accelerate")  # accelerate leaves its settings to transformers
BFLOAT16 = tuple(f"{stage}-{kind}-1-bf16" for stage in STAGES for kind in ("lora", "tied"))
NOISE = tuple(f"{stage}-tied-1-noise" for stage in STAGES)
CHANGES_RESULT = ("attack", "bf16", "groups", "noise")


def alone(case: str) -> str:
    """The case of one process that a case must agree with."""
    _, kind, _, *options = case.split("-")
    return "-".join(["0", kind, "1", *(option for option in options if option in CHANGES_RESULT)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    cases = [*PLAIN, *OTHERS, *BFLOAT16, *NOISE]
    cases = [*sorted({alone(case) for case in cases}), *cases, "refusals", *AT_LAST]
    found = torchrun(2, "-m", "tests.distributed.zero_worker", str(folder), *cases, timeout=900)
    assert found.returncode == 0, found.stderr[-4000:]
    return folder


def pair(folder, case):
    found, expected = (load_result(folder / f"{name}.pt") for name in (case, alone(case)))
    assert list(found) == list(expected)
    return [(name, found[name], expected[name]) for name in expected]


@pytest.mark.parametrize("case", [*PLAIN, *OTHERS, *AT_LAST])
def test_parameters_are_those_of_one_process(folder, case):
    for name, found, expected in pair(folder, case):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("case", BFLOAT16)
def test_float32_copies_of_a_bfloat16_model_are_those_of_one_process(folder, case):
    # in stage 3 autograd adds the gradients of an input of several modules in another order, in bfloat16
    tolerance = 1e-2 if case.startswith("3") else 1e-5
    for name, found, expected in pair(folder, case):
        assert (found - expected).norm() <= tolerance * expected.norm(), name


@pytest.mark.parametrize("case", NOISE)
def test_noise_is_the_same_bit_for_bit(folder, case):
    for name, found, expected in pair(folder, case):
        assert found.equal(expected), name


def test_all_options_of_the_cases_matter(folder):
    models = [load_result(folder / f"0-tied-1{rest}.pt") for rest in ("", "-attack", "-groups", "-noise")]
    for name, value in models[0].items():
        assert all((value - other[name]).abs().max() > 1e-4 for other in models[1:]), name


MESSAGES = {
    "gradient_clipping": "gradient_clipping is 1 (DeepSpeed's default): it would scale",
    "gradient_accumulation_steps": "gradient_accumulation_steps is 2: the engine would divide",
    "scheduler": "learning-rate scheduler, which only engine.step would step",
    "grad_accum_dtype": r"data_types.grad_accum_dtype is fp32 in stage 1 with bf16",
    "stage 0": "zero_optimization.stage is 0: set 1, 2 or 3",
    "base optimizer": "got AdamW, which is not the engine's optimizer. Give it engine.optimizer",
    "flat_params": "flat_params moves the parameters out of DeepSpeed's own",
    "missing parameter": "2 are missing (extra.weight, ...), 0 are unknown",
    "unknown parameter": "0 are missing, 1 are unknown to the per-sample gradients and would train without",
    "loss scale": "the loss scale is 8: it must be 1",
    "other processes": "partitions are over 2 processes, the run has 3",
    **{f"overflow {stage}": "DeepSpeed skipped the update, since the released gradient" for stage in STAGES},
}


@pytest.mark.parametrize("name", MESSAGES)
def test_what_changes_privacy_is_refused_by_name(folder, name):
    for rank in (0, 1):
        found = json.loads((folder / f"refusals-{rank}.json").read_text())
        assert set(found) == set(MESSAGES)
        assert MESSAGES[name] in found[name]


def engine_of(*, fp16: bool = False, **changes):
    """An engine as far as its settings are read, for what needs a GPU or a library to be made."""
    names = {"DeepSpeedZeroOptimizer": (), "ZenFlowZeroOptimizer": (), "DeepSpeedZeroOptimizer_Stage3": ()}
    kinds = {name: type(name, (SimpleNamespace,), {}) for name in names}
    kind = kinds[changes.pop("kind", "DeepSpeedZeroOptimizer")]
    optimizer = kind(**{"loss_scale": 1.0, "clip_grad": 0.0, "optimizer": object()} | changes)
    return SimpleNamespace(
        optimizer=optimizer,
        lr_scheduler=None,
        fp16_enabled=lambda: fp16,
        zero_optimization_stage=lambda: 2,
        gradient_clipping=lambda: 0.0,
        gradient_accumulation_steps=lambda: 1,
    )


Muon = type("MuonWithAuxAdam", (), {"__module__": "deepspeed.runtime.zero.muon.muon_optimizer"})


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (SimpleNamespace(), "needs the engine that deepspeed.initialize returned, got a SimpleNamespace"),
        (engine_of(fp16=True), "fp16.enabled is true: its loss scaler skips steps by data. Set bf16.enabled"),
        (
            engine_of(kind="ZenFlowZeroOptimizer"),
            "is a ZenFlowZeroOptimizer, which has a gradient path of its",
        ),
        (engine_of(optimizer=Muon()), "DeepSpeed's MuonWithAuxAdam changes gradients"),
        (
            engine_of(kind="DeepSpeedZeroOptimizer_Stage3", swap_optimizer=True),
            "offload_optimizer.device is nvme: set cpu or none",
        ),
        (engine_of(clip_grad=0.5), "gradient_clipping is 0.5"),
    ],
)
def test_what_cannot_be_made_here_is_refused_by_name_too(engine, message):
    with pytest.raises(PrivacyError, match=message):
        Zero(None, engine, None)  # pyright: ignore[reportArgumentType]
