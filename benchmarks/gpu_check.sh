#!/usr/bin/env bash
# Check the kernels on one GPU in under nine minutes: bash benchmarks/gpu_check.sh OUT
#
# GPU tests first, then the benchmarks by importance, then one short table. Needs torch, triton, numpy, scipy, pytest,
# hypothesis and pytest-xdist (one process alone would compile for longer than the tests' limit), but no installation
# of this project. With transformers, peft, cryptography, pydantic and rfc8785 the private engine is tested and
# measured too, with opacus compared, with matplotlib plotted. A step that fails or runs out of time is reported and
# the next one starts; the exit status is the number of such steps. OUT gets results.jsonl and one log per step.
set -u

if [ $# -ne 1 ]; then
    echo "usage: bash benchmarks/gpu_check.sh OUT" >&2
    exit 64
fi
mkdir -p "$1" || exit 64
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 64
python=${PYTHON:-python3}
export PYTHONPATH=".:kernels${PYTHONPATH:+:$PYTHONPATH}"
# triton 3.10 changes the default
export TRITON_DEFAULT_FP_FUSION=1
unset TRITON_INTERPRET
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_check.sh: $python finds no CUDA device through torch, so nothing can be checked." >&2
    exit 69
fi
failures=0
summary=()

# step NAME SECONDS COMMAND...
step() {
    local name=$1 limit=$2 started=$SECONDS
    shift 2
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
    local status=$?
    local verdict="passed"
    if [ $status -eq 124 ] || [ $status -eq 137 ]; then
        verdict="FAILED: over its limit of $limit s"
    elif [ $status -eq 3 ] && [[ $name == bench_* ]]; then
        verdict="skipped: $(grep -m1 'does not fit' "$out/$name.log")"
    elif [ $status -ne 0 ]; then
        verdict="FAILED with exit status $status"
    fi
    if [[ $verdict == FAILED* ]]; then
        failures=$((failures + 1))
        tail -n 15 "$out/$name.log"
    fi
    summary+=("$(printf '%-28s %4d s  %s' "$name" $((SECONDS - started)) "$verdict")")
    echo "${summary[-1]}"
}

has() {
    "$python" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))' "$@"
}

# only files with GPU tests: others may import packages that are not here; the limits add up to 515 seconds
folders=(tests)
if ! has transformers peft cryptography pydantic rfc8785; then
    folders=(tests/kernels)
    summary+=("tests of the private engine         skipped: they need transformers, peft, cryptography, pydantic, rfc8785")
fi
mapfile -t gpu_tests < <(grep -rlE 'mark\.gpu|kernel_device' "${folders[@]}" --include='test_*.py' | sort)
workers=()
if has xdist; then # compilation of some 700 variants takes most of the time
    workers=(-n 12 --dist loadgroup)
fi
step pytest_gpu 120 "$python" -m pytest -m gpu -q --durations=5 -o addopts="" --import-mode=importlib \
    -p no:cacheprovider "${workers[@]}" "${gpu_tests[@]}"
for item in dp_lora_step:80 dp_full_step:55 noisy_step:20 gaussian_noise:20 lora_per_sample_grads:45 \
    linear_grad_norms:40 clipped_linear_grad:30 clip_and_accumulate:35 embedding_grad_norms:20 pgd_step:30 \
    per_sample_sums:20; do
    name=${item%%:*}
    if [ -f "benchmarks/bench_$name.py" ]; then
        step "bench_$name" "${item##*:}" "$python" -m benchmarks "$name" --device cuda --json "$out/results.jsonl"
    fi
done

echo
printf '%s\n' "${summary[@]}"
tail -n 1 "$out/pytest_gpu.log"
echo
if [ -f "$out/results.jsonl" ]; then
    plots=()
    if has matplotlib; then
        plots=(--plots "$out")
    fi
    "$python" -m benchmarks --show "$out/results.jsonl" "${plots[@]}"
else
    echo "no results"
fi
exit "$failures"
