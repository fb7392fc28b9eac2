#!/usr/bin/env bash
# Build, test and measure on a machine with an NVIDIA GPU, in one call and under ten minutes, without a network:
#
#     bash bench/device/check.sh OUT
#
# Needs there: nvcc, a Python with torch (CUDA), transformers, pytest, pytest-benchmark, hypothesis, scikit-build-core,
# pybind11, cmake and ninja; captum is measured where it is installed or in a folder of PYTHONPATH. Installs nothing but
# Spurge itself, into a folder of its own. Writes to OUT eight files: summary.txt, build.log, tests.log (the sanitizer's
# report too), bench.log, latency.json, kernels.json, locate.json, last-layer.json.
# A stage that fails or runs out of time does not stop the next; the exit status is 1 if any did.
#
# SPURGE_CHECK_DRY=1 goes through the same stages on a CPU, without CUDA and with small sizes.
set -uo pipefail

if [ $# -ne 1 ]; then
    echo "usage: bash bench/device/check.sh OUT" >&2
    exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/../.." || exit 2

python=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH="$scratch/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR="$scratch/inductor"
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1

device=cuda cuda=ON chosen=(tests bench/tests/test_kernels.py bench/tests/test_last_layer.py -m cuda) quick=() prompts=() last=()
slower=1 # every stage has so many times its seconds
shapes=llama-7b-32x1,llama-7b-32x8,qwen2-1.5b-32x1,qwen2-1.5b-32x8,bert-32x1,bert-32x8 jobs=bert-32x8
kernels=(--sizes memory --only 'open_rows*,gate_columns_*,node_sum*,multiply_sum,first_order,proximity,associate_,segment_medians')
if [ "${SPURGE_CHECK_DRY:-0}" = 1 ]; then
    device=cpu cuda=OFF chosen=(tests/ops/test_gate.py) quick=(--quick)
    shapes=llama-tiny-8x1,qwen2-tiny-8x2,tiny-8x2 jobs=tiny-8x2
    kernels=(--quick --no-compile --only 'open_rows,multiply_sum,proximity') prompts=(--no-peak) last=(--only medians)
    slower=4
fi

summary=$out/summary.txt
failed=()
: >"$summary"

say() { echo "$*" | tee -a "$summary"; }

# stage NAME SECONDS LOG COMMAND...: run a command; it may take its own seconds and what earlier stages left of theirs.
# The seconds of all stages together are 570.
planned=0
stage() {
    local name=$1 limit file=$3 start=$SECONDS status
    local log=$out/$file
    planned=$((planned + $2 * slower))
    limit=$((planned - SECONDS))
    shift 3
    if [ "$limit" -lt 5 ]; then
        say "SKIPPED  $name: no time left"
        failed+=("$name")
        return
    fi
    echo "=== $name: $*" >>"$log"
    timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1
    status=$?
    if [ "$status" -eq 0 ]; then
        say "ok       $name ($((SECONDS - start)) s)"
    else
        if [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then status="out of time"; fi
        say "FAILED   $name ($((SECONDS - start)) s, $status), see $file; its end:"
        tail -n 15 "$log" | cut -c1-200 | sed 's/^/         | /' | tee -a "$summary"
        failed+=("$name")
    fi
}

say "spurge on $(uname -m), $(date -u +%Y-%m-%dT%H:%MZ), $("$python" --version 2>&1)"
if [ "$device" = cuda ]; then
    say "$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>&1 | head -n 1)"
    say "$(nvcc --version 2>&1 | tail -n 2 | head -n 1)"
fi

stage build 130 build.log "$python" -m pip install . --target "$scratch/site" --no-build-isolation --no-deps \
    --no-index --disable-pip-version-check -Cbuild-dir="$scratch/build" \
    -Ccmake.define.SPURGE_CUDA=$cuda -Ccmake.define.CMAKE_CUDA_ARCHITECTURES=native
stage doctor 15 build.log "$python" -m spurge doctor
stage tests 80 tests.log "$python" -m pytest "${chosen[@]}" -q -p no:cacheprovider --benchmark-disable
# the peers on two layers, scaled to all; no errors, which random weights would say little about
stage latency 90 bench.log "$python" bench/run.py latency --device $device --threads 1 --dtype bfloat16 \
    --shapes "$shapes" --prompts 20 --exact 0 --budget 3 "${quick[@]}" "${prompts[@]}" \
    --json "$out/latency.json"
stage kernels 110 bench.log "$python" bench/run.py kernels --device $device --threads 1 "${kernels[@]}" \
    --json "$out/kernels.json"
if [ "$device" = cuda ] && command -v compute-sanitizer >/dev/null; then
    ours=() # torch's own kernels are not what is checked here
    if compute-sanitizer --help | grep -q -e --kernel-name; then ours=(--kernel-name kernel_substring=spurge); fi
    for tool in memcheck racecheck; do
        # without torch's caching allocator every tensor is an allocation of its own, so that a step beyond it is seen
        stage "sanitizer $tool" 40 tests.log env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            compute-sanitizer --tool "$tool" "${ours[@]}" --error-exitcode 9 --print-limit 20 \
            "$python" -m pytest bench/tests/test_kernels.py -m cuda -k computes_the_same -q -p no:cacheprovider
    done
else
    planned=$((planned + 80 * slower))
    if [ "$device" = cuda ]; then say "SKIPPED  sanitizer: no compute-sanitizer on the PATH"; fi
fi
stage locate 45 bench.log "$python" bench/run.py locate --device $device --threads 1 --shapes "$jobs" --full \
    --no-peak --repeats 5 --budget 3 "${quick[@]}" --json "$out/locate.json"
stage last-layer 20 bench.log "$python" bench/run.py last-layer --device $device "${quick[@]}" "${last[@]}" \
    --json "$out/last-layer.json"

grep -h "passed\|failed" "$out/tests.log" 2>/dev/null | tee -a "$summary"
grep -v "^===" "$out/bench.log" 2>/dev/null | tail -n 120
if [ ${#failed[@]} -eq 0 ]; then
    say "all stages passed in $SECONDS s"
    exit 0
fi
say "failed or skipped: ${failed[*]}"
exit 1
