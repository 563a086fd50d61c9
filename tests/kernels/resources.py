"""Compile every kernel for chips that are not here, and report registers, spills and shared memory.

    python tests/kernels/resources.py [--markdown]

prints JSON, or the table of ``kernels/README.md``. It must run without ``TRITON_INTERPRET``: a kernel
decorated while that is set is an interpreter object and cannot be compiled. Hence a script of its own,
which the tests start.
"""

import argparse
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
ALIGNED = [["tt.divisibility", 16]]
CLIP = "securetune_kernels.clip_and_accumulate.triton_kernels"
NOISE = "securetune_kernels.gaussian_noise.triton_kernels"
STEP = "securetune_kernels.noisy_step.triton_kernels"
PGD = "securetune_kernels.pgd_step.triton_kernels"
LINEAR = "securetune_kernels._linear.triton_kernels"
LINEAR_NORMS = "securetune_kernels.linear_grad_norms.triton_kernels"
LINEAR_SUM = "securetune_kernels.clipped_linear_grad.triton_kernels"
LORA = "securetune_kernels.lora_per_sample_grads.triton_kernels"
EMBEDDING = "securetune_kernels.embedding_grad_norms.triton_kernels"
SUMS = "securetune_kernels.per_sample_sums.triton_kernels"
# How products on tensor cores are spelled in each chip's assembly, the best first: tiles of fewer than 64
# rows run on the instructions of older chips.
TENSOR_CORE_WORDS = {
    "sm_80": ("HMMA",),
    "sm_90": ("HGMMA", "HMMA"),
    "sm_100": ("UTCHMMA", "HMMA"),
    "gfx942": ("v_mfma",),
}
# kernels whose products are used at once, see `why_products_cannot_compile`
USED_AT_ONCE = ("_gram_kernel", "_direct_kernel", "_adapter_kernel", "_cross_kernel")
AMD_STAGES = 2  # as the ops choose there


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kernel with the constants and types of a real launch."""

    module: str
    kernel: str
    label: str
    tensors: dict[str, str]  # pointer arguments, all 16-byte aligned
    numbers: dict[str, str]  # other arguments
    constants: dict[str, Any]
    num_warps: int
    num_stages: int | None = None  # None: the compiler's default
    aligned_numbers: tuple[str, ...] = ()  # multiples of 16, so that rows are read in whole vectors


@dataclasses.dataclass(frozen=True)
class Resources:
    """What the compiler made of a variant on one target."""

    kernel: str
    label: str
    target: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_core_instructions: int
    tensor_core_word: str


def variants(target: str) -> Iterator[Variant]:
    """Yield the launches that the ops make for models of today on a target."""
    clip = importlib.import_module(CLIP)
    for dtype in ("fp32", "bf16"):
        yield Variant(
            CLIP, "_partial_squares_kernel", dtype,
            {"grads_ptr": f"*{dtype}", "valid_ptr": "*u8", "partials_ptr": "*fp32"},
            {"num_params": "i32", "row_stride": "i32", "valid_stride": "i32", "columns_per_split": "i32"},
            {"col_stride": 1, "HAS_VALID": True, "BLOCK": clip.BLOCK_SQUARES}, clip.SQUARES_WARPS,
        )  # fmt: skip
        for tile in (clip.WIDE_TILE, clip.NARROW_TILE):
            yield Variant(
                CLIP, "_clipped_sum_kernel", f"{dtype}, {tile[0]} x {tile[1]}",
                {"grads_ptr": f"*{dtype}", "factors_ptr": "*fp32", "accumulator_ptr": "*fp32"},
                {"num_samples": "i32", "num_params": "i32", "row_stride": "i32"},
                {"col_stride": 1, "accumulator_stride": 1, "BLOCK_COLS": tile[0], "BLOCK_ROWS": tile[1]},
                clip.SUM_WARPS,
            )  # fmt: skip
    yield Variant(
        CLIP, "_clip_factors_kernel", f"{clip.MAX_SPLITS} splits",
        {"partials_ptr": "*fp32", "valid_ptr": "*u8", "norms_ptr": "*fp32", "factors_ptr": "*fp32"},
        {"num_splits": "i32", "valid_stride": "i32", "max_grad_norm": "fp32"},
        {"HAS_VALID": True, "BLOCK_SPLITS": clip.MAX_SPLITS}, 4,
    )  # fmt: skip
    yield from _noise_variants()
    yield from _step_variants()
    yield from _pgd_variants()
    yield from _linear_variants(target)
    yield from _lora_variants(target)
    yield from _embedding_variants(target)
    yield from _sums_variants()


def _noise_variants() -> Iterator[Variant]:
    noise = importlib.import_module(NOISE)
    for is_chacha, has_coefficients, summands in (
        (True, False, 1),
        (True, True, 1),
        (True, False, 4),
        (False, False, 1),
    ):
        name = "ChaCha20" if is_chacha else "Philox"
        bands = ", coefficients" if has_coefficients else ""
        yield Variant(
            NOISE, "_gaussian_noise_kernel", f"{name}{bands}, {summands} summand(s)",
            {"out_ptr": "*fp32", "key_ptr": "*i32", "step_ptr": "*i64", "coefficients_ptr": "*fp32"},
            {"start": "i64", "count": "i32", "stream": "i32", "stddev": "fp32", "num_coefficients": "i32"},
            {"IS_CHACHA": is_chacha, "HAS_COEFFICIENTS": has_coefficients, "SUMMANDS": summands,
             "BLOCK": noise.BLOCK}, noise.NUM_WARPS,
        )  # fmt: skip


def _step_variants() -> Iterator[Variant]:
    import triton.language as tl

    step = importlib.import_module(STEP)
    vectors = ("summed_ptr", "public_ptr", "masters_ptr")
    tensors = {"chunks_ptr": "*i64", **dict.fromkeys(vectors, "*fp32"), "key_ptr": "*i32", "step_ptr": "*i64"}
    numbers = {
        "num_chunks": "i32", "stream": "i32", "rounding_stream": "i32",
        **dict.fromkeys(("stddev", "divisor", "learning_rate", "decay"), "fp32"),
    }  # fmt: skip
    for param, kind in (
        (tl.float32, "fp32"), (tl.bfloat16, "bf16, masters"), (tl.bfloat16, "bf16, rounded at random"),
    ):  # fmt: skip
        constants = {
            "PARAM": param, "IS_CHACHA": True, "SUMMANDS": 1, "HAS_PUBLIC": True,
            "HAS_MASTERS": "masters" in kind, "IS_RANDOM": "random" in kind, "BLOCK": step.CHUNK // 8,
        }  # fmt: skip
        yield Variant(
            STEP, "_noisy_adamw_kernel", kind,
            {**tensors, "exp_avg_ptr": "*fp32", "exp_avg_sq_ptr": "*fp32", "corrections_ptr": "*fp32"},
            {**numbers, **dict.fromkeys(("rest1", "beta2", "rest2", "eps", "noise_variance"), "fp32")},
            {**constants, "IS_DP_CORRECTED": True}, step.NUM_WARPS,
        )  # fmt: skip
        yield Variant(
            STEP, "_noisy_sgd_kernel", kind, {**tensors, "momentum_ptr": "*fp32"},
            {**numbers, "momentum": "fp32"}, {**constants, "HAS_MOMENTUM": True, "IS_NESTEROV": True},
            step.NUM_WARPS,
        )  # fmt: skip


def _pgd_variants() -> Iterator[Variant]:
    pgd = importlib.import_module(PGD)
    inputs = ("num_tokens", "num_embed", "delta_sample_stride", "delta_token_stride", "grad_sample_stride",
              "grad_token_stride", "mask_sample_stride")  # fmt: skip
    sizes = dict.fromkeys(inputs, "i32")
    last_strides = {"delta_embed_stride": 1, "grad_embed_stride": 1, "mask_token_stride": 1}
    limits = dict.fromkeys(("limit", "relative_rounding", "absolute_rounding"), "fp32")
    for dtype, embed in (("fp32", 1024), ("bf16", 4096), ("fp16", 4096), ("bf16", 16_384)):
        warps = pgd.warps_for(embed)
        tensors = {"delta_ptr": f"*{dtype}", "grad_ptr": f"*{dtype}", "mask_ptr": "*u8"}
        cases = [(False, False), (False, True), (True, False), (True, True)]
        if dtype == "fp16":
            cases = cases[:1]  # differs from bf16 in the last cast only
        for is_linf, is_sign in cases:
            label = (
                f"{dtype}, D={embed}, {'linf' if is_linf else 'l2'}, {'sign' if is_sign else 'normalised'}"
            )
            constants = {**last_strides, "IS_LINF": is_linf, "IS_SIGN": is_sign, "BLOCK_EMBED": embed}
            yield Variant(
                PGD, "_token_kernel", label, {**tensors, "out_ptr": f"*{dtype}"},
                {**sizes, "step_size": "fp32", **limits}, constants, warps,
            )  # fmt: skip
        constants = {**last_strides, "IS_SIGN": False, "BLOCK_EMBED": embed}
        yield Variant(
            PGD, "_token_sums_kernel", f"{dtype}, D={embed}", {**tensors, "sums_ptr": "*fp32"},
            {**sizes, "step_size": "fp32", "unit": "fp32"}, constants, warps,
        )  # fmt: skip
        yield Variant(
            PGD, "_apply_sample_factors_kernel", f"{dtype}, D={embed}",
            {**tensors, "factors_ptr": "*fp32", "out_ptr": f"*{dtype}"}, sizes, constants, warps,
        )  # fmt: skip
    yield Variant(
        PGD, "_sample_factors_kernel", "", {"sums_ptr": "*fp32", "factors_ptr": "*fp32"},
        {"num_tokens": "i32", "step_size": "fp32", "unit": "fp32", **limits},
        {"IS_SIGN": False, "BLOCK_TOKENS": pgd.BLOCK_TOKENS}, 4,
    )  # fmt: skip


def _linear_variants(target: str) -> Iterator[Variant]:
    linear, norms, total = (importlib.import_module(name) for name in (LINEAR, LINEAR_NORMS, LINEAR_SUM))
    sizes = dict.fromkeys(("num_tokens", "num_inputs", "num_outputs"), "i32")
    token_strides = tuple(f"{x}_{kind}_stride" for x in ("a", "g") for kind in ("unit", "token"))
    aligned = ("num_inputs", "num_outputs", *token_strides)
    strides = dict.fromkeys(token_strides, "i32")
    fixed = {"a_stride": 1, "g_stride": 1, "HAS_SEGMENTS": True}
    for dtype in ("bf16", "fp32"):
        torch_dtype = _torch_dtype(dtype)
        factors = {"a_ptr": f"*{dtype}", "g_ptr": f"*{dtype}", "cu_seqlens_ptr": "*i32"}
        for tokens in (32, 64, 128) if dtype != "fp32" else (32, 64):
            tile = norms.gram_tile(tokens, torch_dtype, target)
            yield Variant(
                LINEAR_NORMS, "_gram_kernel", f"{dtype}, {tile.rows} x {tile.cols} x {tile.depth}",
                {**factors, "squares_ptr": "*fp32", "lengths_ptr": "*fp32"},
                {**sizes, "num_tiles": "i32", "num_blocks": "i32", **strides},
                {**fixed, "BLOCK_T": tile.rows, "BLOCK_K": tile.depth, "WIDEN": False},
                tile.num_warps, tile.num_stages, aligned,
            )  # fmt: skip
        tile = norms.product_tile("direct", torch_dtype, target)
        blocks = {"BLOCK_P": tile.rows, "BLOCK_D": tile.cols, "WIDEN": False}
        yield Variant(
            LINEAR_NORMS, "_direct_kernel", f"{dtype}, {tile.rows} x {tile.cols} x {tile.depth}",
            {**factors, "squares_ptr": "*fp32"}, {**sizes, "num_tiles": "i32", **strides},
            {**fixed, **blocks, "BLOCK_T": tile.depth}, tile.num_warps, tile.num_stages, aligned,
        )  # fmt: skip
        yield Variant(
            LINEAR_NORMS, "_lengths_kernel", dtype, {**factors, "lengths_ptr": "*fp32"},
            {**sizes, "num_blocks": "i32", **strides},
            {**fixed, "BLOCK_T": norms.NORM_TOKENS, "BLOCK_K": norms.NORM_FEATURES}, norms.NORM_WARPS,
            aligned_numbers=aligned,
        )  # fmt: skip
        for tokens in (16, 512):
            tile = total.sum_tile(tokens, torch_dtype, target)
            yield Variant(
                LINEAR_SUM, "_clipped_product_kernel", f"{dtype}, {tile.rows} x {tile.cols} x {tile.depth}",
                {**factors, "factors_ptr": "*fp32", "out_ptr": "*fp32"},
                {**sizes, "num_units": "i32", **strides, "out_row_stride": "i32"},
                {**fixed, **blocks, "factor_stride": 1, "out_col_stride": 1, "BLOCK_T": tile.depth,
                 "GROUP": total.GROUP_ROWS},
                tile.num_warps, tile.num_stages, (*aligned, "out_row_stride"),
            )  # fmt: skip
    yield Variant(
        LINEAR, "_add_up_kernel", f"{linear.BLOCK_PARTIALS} partial sums",
        {"partials_ptr": "*fp32", "cu_seqlens_ptr": "*i32", "out_ptr": "*fp32"}, {"num_partials": "i32"},
        {"HAS_SEGMENTS": True, "BLOCK": linear.BLOCK_PARTIALS}, 4,
    )  # fmt: skip


def _lora_variants(target: str) -> Iterator[Variant]:
    lora = importlib.import_module(LORA)
    strides = ("wide_unit_stride", "wide_token_stride", "narrow_unit_stride", "narrow_token_stride",
               "out_unit_stride", "out_wide_stride")  # fmt: skip
    sizes = ("num_units", "num_tokens", "num_tiles", "wide_size", "narrow_size")
    cases = (("bf16", 16, False), ("bf16", 16, True), ("bf16", 64, True), ("fp32", 16, True))
    for dtype, rank, has_table in cases:
        tile = lora.adapter_tile(rank, _torch_dtype(dtype), target)
        label = f"{dtype}, {tile.rows} x {tile.cols} x {tile.depth}, {'several' if has_table else 'one'}"
        yield Variant(
            LORA, "_adapter_kernel", label,
            {"table_ptr": "*i64", "wide_ptr": f"*{dtype}", "narrow_ptr": f"*{dtype}",
             "cu_seqlens_ptr": "*i32",
             "out_ptr": "*fp32", "partials_ptr": "*fp32"},
            {**dict.fromkeys((*sizes, *strides), "i32"), "scale": "fp32"},
            {"wide_stride": 1, "narrow_stride": 1, "out_narrow_stride": 1, "HAS_TABLE": has_table,
             "IS_OUT_ALIGNED": True, "HAS_SEGMENTS": False, "HAS_NORMS": True, "ACCUMULATE": False,
             "BLOCK_WIDE": tile.rows, "BLOCK_NARROW": tile.cols, "BLOCK_T": tile.depth, "WIDEN": False},
            tile.num_warps, tile.num_stages, ("wide_size", "narrow_size", *strides),
        )  # fmt: skip


def _embedding_variants(target: str) -> Iterator[Variant]:
    op = importlib.import_module(EMBEDDING)
    strides = tuple(f"{x}_{kind}_stride" for x in ("a", "g", "lookup") for kind in ("unit", "token"))
    sizes = ("num_positions", "num_lookups", "num_rows", "num_features", "ids_unit_stride")
    for dtype in ("bf16", "fp32"):
        yield Variant(
            EMBEDDING, "_equal_tokens_kernel", f"{dtype}, {op.BLOCK_FEATURES}",
            {"g_ptr": f"*{dtype}", "order_ptr": "*i64", "run_ends_ptr": "*i64", "partials_ptr": "*fp32"},
            dict.fromkeys(("num_blocks", "num_per_unit", "num_features", *strides[2:4]), "i32"),
            {"g_stride": 1, "BLOCK": op.BLOCK_FEATURES}, op.FEATURE_WARPS,
            aligned_numbers=("num_features", *strides[2:4]),
        )  # fmt: skip
        tile = op.cross_tile(_torch_dtype(dtype), target)
        yield Variant(
            EMBEDDING, "_cross_kernel", f"{dtype}, {tile.rows} x {tile.cols} x {tile.depth}",
            {"a_ptr": f"*{dtype}", "g_ptr": f"*{dtype}", "ids_ptr": "*i64", "lookup_ptr": f"*{dtype}",
             "partials_ptr": "*fp32"},
            dict.fromkeys((*sizes, *strides), "i32"),
            {"a_stride": 1, "g_stride": 1, "lookup_stride": 1, "ids_stride": 1, "BLOCK_S": tile.rows,
             "BLOCK_T": tile.cols, "BLOCK_K": tile.depth, "WIDEN": False},
            tile.num_warps, tile.num_stages, ("num_features", *strides),
        )  # fmt: skip


def _sums_variants() -> Iterator[Variant]:
    op = importlib.import_module(SUMS)
    strides = ("g_unit_stride", "g_token_stride", "x_unit_stride", "x_token_stride", "out_unit_stride")
    sizes = ("num_blocks", "num_tokens", "num_features", "inverse_unit_stride", "mean_unit_stride")
    for dtype, is_norm in (("bf16", False), ("bf16", True), ("fp32", True)):
        yield Variant(
            SUMS, "_token_sums_of_units_kernel", f"{dtype}, {'norm' if is_norm else 'bias'}",
            {"g_ptr": f"*{dtype}", "x_ptr": f"*{dtype}", "inverse_ptr": "*fp32", "mean_ptr": "*fp32",
             "cu_seqlens_ptr": "*i32", "out_ptr": "*fp32"},
            dict.fromkeys((*sizes, *strides), "i32"),
            {"g_stride": 1, "x_stride": 1, "inverse_stride": 1, "mean_stride": 1, "out_stride": 1,
             "IS_NORM": is_norm, "HAS_MEAN": is_norm, "HAS_SEGMENTS": True, "ACCUMULATE": False,
             "BLOCK_T": op.BLOCK_T, "BLOCK_F": op.BLOCK_FEATURES},
            op.NUM_WARPS, aligned_numbers=("num_features", *strides),
        )  # fmt: skip


def _torch_dtype(name: str) -> torch.dtype:
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def compile_variant(variant: Variant, target: str) -> Resources:
    """Compile one variant for one target and read what it needs."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(variant.module), variant.kernel)
    names: list[str] = function.arg_names
    types = {**variant.tensors, **variant.numbers, **dict.fromkeys(variant.constants, "constexpr")}
    if set(types) != set(names):
        raise ValueError(
            f"{variant.kernel}: arguments {sorted(set(types) ^ set(names))} do not match the kernel's."
        )
    source = ASTSource(
        function,
        {name: types[name] for name in names},
        {(names.index(name),): value for name, value in variant.constants.items()},
        {(names.index(name),): ALIGNED for name in (*variant.tensors, *variant.aligned_numbers)},
    )
    is_amd = target.startswith("gfx")
    chip = GPUTarget("hip", target, 64) if is_amd else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    options = {"num_warps": variant.num_warps}
    if variant.num_stages is not None:
        options["num_stages"] = min(variant.num_stages, AMD_STAGES) if is_amd else variant.num_stages
    compiled = triton.compile(source, target=chip, options=options)
    read = _read_amd if is_amd else _read_nvidia
    registers, spilled, assembly = read(compiled.asm)
    words = {word: len(re.findall(rf"\b{word}", assembly)) for word in TENSOR_CORE_WORDS[target]}
    word = next((word for word, count in words.items() if count), "")
    return Resources(
        variant.kernel, variant.label, target, registers, spilled, compiled.metadata.shared,
        words.get(word, 0), word,
    )  # fmt: skip


def _read_nvidia(asm) -> tuple[int, int, str]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        text, assembly = (
            subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout
            for what in ("--dump-resource-usage", "--dump-sass")
        )
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"], assembly


def _read_amd(asm) -> tuple[int, int, str]:
    text = asm["amdgcn"]
    usage = {
        name: int(value)
        for name, value in re.findall(r"\.(\w+_count|private_segment_fixed_size):\s+(\d+)", text)
    }
    spilled = (
        4 * (usage["vgpr_spill_count"] + usage["sgpr_spill_count"]) + usage["private_segment_fixed_size"]
    )
    return usage["vgpr_count"], spilled, text


def is_refused(variant: Variant, target: str) -> bool:
    """Tell whether the ops refuse the kernel there, since this triton cannot compile it."""
    version = tuple(int(part) for part in metadata.version("triton").split(".")[:2])
    is_half = "bf16" in variant.label
    return version < (3, 8) and target == "sm_100" and is_half and variant.kernel in USED_AT_ONCE


def markdown(rows: list[Resources]) -> str:
    """Return one line per variant, one column per target: registers, shared memory, tensor cores."""
    lines = ["| kernel | variant | " + " | ".join(TARGETS) + " |", "|---|---|" + "---|" * len(TARGETS)]
    by_variant: dict[tuple[str, str], dict[str, Resources]] = {}
    for row in rows:
        by_variant.setdefault((row.kernel, row.label), {})[row.target] = row
    for (kernel, label), targets in by_variant.items():
        cells = []
        for target in TARGETS:
            found = targets.get(target)
            if found is None:  # another tile was swept there
                cells.append("")
                continue
            spilled = f" **{found.spilled_bytes} B spilled**" if found.spilled_bytes else ""
            products = found.tensor_core_instructions
            tensor_cores = f" / {products} {found.tensor_core_word}" if products else ""
            cells.append(f"{found.registers} / {found.shared_bytes} B{tensor_cores}{spilled}")
        lines.append(f"| `{kernel}` | {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Compile all variants and print what they need."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("resources.py: unset TRITON_INTERPRET, interpreted kernels cannot be compiled.")
    # triton 3.10 changes the default; registers must not depend on the version's choice
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))
    rows = [
        compile_variant(variant, target)
        for target in TARGETS
        for variant in variants(target)
        if not is_refused(variant, target)
    ]
    print(markdown(rows) if options.markdown else json.dumps([dataclasses.asdict(row) for row in rows]))


if __name__ == "__main__":
    main()
