"""Memory that ``securetune plan --processes`` counts, against the peaks of real training on two processes."""

import json
import subprocess
import sys

import pytest

from tests.distributed.launching import ROOT, environment
from tests.sample_run import make_workshop, write_recipe
from tests.tiny import tiny_folder

LARGE = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "vocab_size": 4096,
}
LAUNCHES = {
    "ddp": {},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    **{
        f"zero{stage}": {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
            "ACCELERATE_GRADIENT_CLIPPING": "0",
            "DS_ACCELERATOR": "cpu",
        }
        for stage in (1, 2, 3)
    },
}
FULL = {"method": "full", "learning_rate": 0.001, "micro_batch_tokens": 512}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    folder = make_workshop(tmp_path_factory.mktemp("workshop"))
    tiny_folder(folder / "large", **LARGE)
    return folder


def measure(workshop, name):
    """Train on two processes, and return what each found, in bytes."""
    recipe = write_recipe(
        workshop,
        name,
        model={"name": str(workshop / "large"), "dtype": "float32"},
        training=FULL,
        privacy__steps=2,
        adversarial={"method": "none"},
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.distributed.memory_worker", str(recipe), str(workshop)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        # large blocks go back when they are freed: what is counted is used, not kept by the C library
        env=environment(MALLOC_ARENA_MAX="1", MALLOC_MMAP_THRESHOLD_=str(1 << 20), **LAUNCHES[name]),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((workshop / f"{name}-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHES)
def test_peaks_are_about_those_of_the_plan(workshop, name):
    processes = measure(workshop, name)
    for found in processes:
        counted = found["counted"]
        peak = (found["peak"] - found["before"]) / (counted["total"] - counted["process"])
        assert 0.6 < peak < 1.3, (peak, found)
    # the first one checks gradients before the model is shared out; the others only load it
    first, *others = ((found["peak_at_start"] - found["before"]) / counted["start"] for found in processes)
    assert 0.6 < first < 1.3, processes
    assert max(others) < 1.3, processes
