"""Ahead-of-time compilation of every kernel for four chips: nothing spills, and shared memory suffices."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.kernels import resources as module

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("resources.py")
KERNELS = SCRIPT.parents[2] / "kernels"
# shared memory of one block, in bytes
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
# Three blocks of 128 threads still fit a multiprocessor (65,536 registers), each with 16 KiB of loads in
# flight.
REGISTER_LIMIT = 160
# A tile of a product keeps its sums in registers: one block of 256 threads at 255 registers fits.
PRODUCT_KERNELS = {
    "_gram_kernel",
    "_direct_kernel",
    "_clipped_product_kernel",
    "_adapter_kernel",
    "_cross_kernel",
}


@pytest.fixture(scope="module")
def resources():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False, env=environment
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return json.loads(process.stdout)


def offenders(resources, is_bad):
    return [f"{row['kernel']} ({row['label']}) on {row['target']}: {row}" for row in resources if is_bad(row)]


def test_nothing_spills(resources):
    assert offenders(resources, lambda row: row["spilled_bytes"] > 0) == []


def test_shared_memory_is_within_the_chips_limit(resources):
    assert offenders(resources, lambda row: row["shared_bytes"] > SHARED_LIMIT[row["target"]]) == []


def test_registers_leave_room_for_many_warps(resources):
    others = [row for row in resources if row["kernel"] not in PRODUCT_KERNELS]
    assert offenders(others, lambda row: row["registers"] > REGISTER_LIMIT) == []


def test_half_precision_products_run_on_tensor_cores(resources):
    products = [row for row in resources if row["kernel"] in PRODUCT_KERNELS and "fp32" not in row["label"]]
    assert {row["kernel"] for row in products} == PRODUCT_KERNELS
    assert offenders(products, lambda row: row["tensor_core_instructions"] == 0) == []


def test_large_tiles_use_the_chips_own_tensor_core_instructions(resources):
    best = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
    large = [row for row in resources if row["kernel"] in PRODUCT_KERNELS and "128 x 128" in row["label"]]
    assert large
    assert offenders(large, lambda row: row["tensor_core_word"] != best[row["target"]]) == []


def test_every_kernel_is_compiled_for_every_target(resources):
    from_source = set()
    for path in KERNELS.glob("securetune_kernels/*/triton_kernels.py"):
        lines = path.read_text().splitlines()
        names = [line.split("(")[0].removeprefix("def ") for line in lines if line.startswith("def _")]
        from_source |= {name for name in names if name.endswith("_kernel")}
    compiled = {(row["kernel"], row["target"]) for row in resources}
    assert compiled == {(kernel, target) for kernel in from_source for target in SHARED_LIMIT}


def test_table_in_the_readme_is_of_these_kernels(resources):
    text = (KERNELS / "README.md").read_text()
    version = metadata.version("triton")
    if f"--markdown` with triton {version}:" not in text:
        pytest.skip(f"the table is of another triton than {version}")
    table = module.markdown([module.Resources(**row) for row in resources])
    assert table in text, (
        "run tests/kernels/resources.py --markdown and paste its output into kernels/README.md"
    )


def test_banned_block_pointers_are_not_used():
    # triton's main branch has removed them
    sources = {path: path.read_text() for path in KERNELS.rglob("*.py")}
    assert [
        str(path) for path, text in sources.items() if "make_block_ptr" in text or "tl.advance" in text
    ] == []


def test_kernels_import_only_torch_and_triton():
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    foreign = set()
    for path in KERNELS.rglob("*.py"):
        for line in path.read_text().splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]) and not words[1].startswith("."):
                foreign |= {words[1].split(".")[0]} - allowed
    assert foreign == set()
