#!/usr/bin/env bash
# Build, test and measure on a machine with an NVIDIA GPU, without a network, in calls of at most nine minutes:
#
#     bash bench/device/check.sh OUT
#
# A call begins the stages that it has time for, and says so where some are left: call it again with the same OUT, on the
# same machine or another, and it goes on. Two calls are enough. Of other sources than those OUT speaks of, it begins anew.
#
# Needs there: nvcc, a Python with torch (CUDA), transformers, pytest, hypothesis, scikit-build-core, pybind11, cmake and
# ninja; captum is measured where it is installed or in a folder of PYTHONPATH. Installs nothing but Spurge itself, into
# build/device-check (SPURGE_CHECK_WORK). Writes to OUT: summary.txt, verdicts.txt (a line for each stage that ended), build.log, tests.log,
# sanitizer.log, bench.log, and the numbers: ops.json, kernels.json, latency.json, locate.json, last-layer.json.
# A stage that fails or runs out of time does not stop the next. Exit status: 0 all passed, 1 one failed (the last line
# names the first), 3 none failed, but stages are left.
#
# SPURGE_CHECK_DRY=1 goes through the same stages on a CPU, without CUDA and with small sizes, in a few minutes; Spurge is
# built only where Python finds none.
set -uo pipefail

if [ $# -ne 1 ]; then
    echo "usage: bash bench/device/check.sh OUT" >&2
    exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/../.." || exit 2

python=${PYTHON:-python3}
work=${SPURGE_CHECK_WORK:-$PWD/build/device-check}
mkdir -p "$work" || exit 2
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
dry=${SPURGE_CHECK_DRY:-0}
most=${SPURGE_CHECK_SECONDS:-535} # of a call
summary=$out/summary.txt verdicts=$out/verdicts.txt

say() { echo "$*" | tee -a "$summary"; }

# ---- what this speaks of -----------------------------------------------------------------------------------------------

sources=$(find CMakeLists.txt bench cmake csrc include pyproject.toml python tests -type f \
    ! -name '*.pyc' ! -name '*.so' ! -path '*/results/*' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -c1-16)
mark="$sources dry=$dry"
if [ "$(head -n 1 "$verdicts" 2>/dev/null)" != "$mark" ]; then
    rm -f "$out"/*.log "$out"/*.json
    : >"$summary"
    echo "$mark" >"$verdicts"
fi
say "spurge $sources on $(uname -m), $(date -u +%Y-%m-%dT%H:%MZ), $("$python" --version 2>&1)"

if [ "$dry" = 1 ]; then
    device=cpu tested=(tests/ops/test_gate.py tests/ops/test_proximity.py -k "cpu or gradient") walked=(-k "FCR or halves")
    dtype=float32 quick=(--quick) measured=(--quick --no-compile --only 'open_rows,multiply_sum,proximity*')
    shapes=llama-tiny-8x1,qwen2-tiny-8x2 jobs=tiny-8x2 peak=(--no-peak) last=(--only medians) ops=(--quick) benched=(node_sum 'proximity*')
else
    device=cuda tested=(tests bench/tests -m cuda --ignore=tests/test_reached_ops.py) walked=()
    dtype=bfloat16 quick=() measured=(--sizes memory)
    shapes=llama-7b-32x1,llama-7b-32x8,qwen2-1.5b-32x1,qwen2-1.5b-32x8 jobs=bert-32x8 peak=() last=() ops=() benched=()
    say "$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>&1 | head -n 1)"
    say "$(nvcc --version 2>&1 | tail -n 2 | head -n 1)"
fi
export PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR="$work/inductor" HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1

# ---- stages ------------------------------------------------------------------------------------------------------------

left=()
# stage NAME SECONDS LOG COMMAND...: runs a command that has not ended yet, for at most so many seconds.
stage() {
    local name=$1 seconds=$2 file=$3 start=$SECONDS status
    local log=$out/$file
    shift 3
    if grep -q "^$name	" "$verdicts"; then return; fi
    if [ "$dry" != 1 ] && [ $((SECONDS + seconds)) -gt "$most" ]; then
        left+=("$name")
        return
    fi
    if [ "$dry" = 1 ]; then seconds=$((seconds * 4)); fi
    echo "=== $name: $*" >>"$log"
    timeout --kill-after=5 "$seconds" "$@" >>"$log" 2>&1
    status=$?
    if [ "$status" -eq 0 ]; then
        say "ok       $name ($((SECONDS - start)) s)"
        echo "$name	ok" >>"$verdicts"
        return
    fi
    if [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then status="out of its $seconds s"; fi
    say "FAILED   $name ($((SECONDS - start)) s, $status), see $file; its end:"
    tail -n 15 "$log" | cut -c1-200 | sed 's/^/         | /' | tee -a "$summary"
    echo "$name	failed	$file" >>"$verdicts"
}

# The compiled package, unless it is there already: another machine may have ended the stage.
build() {
    if [ "$dry" = 1 ] && "$python" -c 'import spurge._core' 2>/dev/null; then return; fi
    export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
    if [ "$(cat "$work/site/sources" 2>/dev/null)" = "$sources" ]; then return; fi
    rm -rf "$work/site"
    sed -i '/^build	/d' "$verdicts"
    local cuda=ON
    if [ "$dry" = 1 ]; then cuda=OFF; fi
    stage build 170 build.log "$python" -m pip install . --target "$work/site" --no-build-isolation --no-deps --no-index \
        --disable-pip-version-check -Cbuild-dir="$work/cmake" -Ccmake.define.SPURGE_CUDA=$cuda \
        -Ccmake.define.CMAKE_CUDA_ARCHITECTURES=native
    if grep -q "^build	ok" "$verdicts"; then mkdir -p "$work/site" && echo "$sources" >"$work/site/sources"; fi
}

# sanitizer TOOL: every op once under a tool of compute-sanitizer; the tool sees only our kernels, but for initcheck, which
# has to see who writes what they read, and is asked only what it found in ours.
sanitizer() {
    local tool=$1 watched=() log=$scratch/$1.log
    if [ "$dry" = 1 ]; then
        "$python" bench/device/every_op.py --device cpu --quick
        return
    fi
    if ! command -v compute-sanitizer >/dev/null; then
        echo "no compute-sanitizer on the PATH"
        return 1
    fi
    if [ "$tool" != initcheck ]; then watched=(--kernel-name kernel_substring=spurge --error-exitcode 9); fi
    # without torch's caching allocator every tensor is an allocation of its own, so that a step beyond it is seen
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" "${watched[@]}" --print-limit 20 \
        "$python" bench/device/every_op.py --device cuda --quick >"$log" 2>&1
    local status=$?
    cat "$log"
    if [ "$status" -ne 0 ]; then return "$status"; fi
    if [ "$tool" = initcheck ] && grep -q "at .*spurge::" "$log"; then return 9; fi
}
export -f sanitizer
export dry python scratch

build
stage doctor 20 build.log "$python" -m spurge doctor
stage ops 40 tests.log "$python" bench/device/every_op.py --device $device "${ops[@]}"
# every op against its float64 twin, in CUDA graphs, on two streams
stage tests 120 tests.log "$python" -m pytest "${tested[@]}" -q -p no:cacheprovider
# locating, edits by swarm and by gradient, FCR, NeuronTune and mediation, each beside the CPU
stage workflows 60 tests.log "$python" -m pytest tests/test_reached_ops.py "${walked[@]}" -q -p no:cacheprovider
stage bench 60 bench.log "$python" -m spurge bench "${benched[@]}" --device $device --json "$out/ops.json"
for tool in memcheck racecheck initcheck synccheck; do
    stage "sanitizer $tool" 45 sanitizer.log bash -c "sanitizer $tool"
done
# the peers on two layers, scaled to all; no errors, which random weights would say little about
stage latency 100 bench.log "$python" bench/run.py latency --device $device --threads 1 --dtype $dtype \
    --shapes "$shapes" --prompts 20 --exact 0 --budget 3 "${quick[@]}" "${peak[@]}" --json "$out/latency.json"
stage kernels 110 bench.log "$python" bench/run.py kernels --device $device --threads 1 "${measured[@]}" \
    --json "$out/kernels.json"
stage locate 50 bench.log "$python" bench/run.py locate --device $device --threads 1 --shapes "$jobs" --full \
    --no-peak --repeats 5 --budget 3 "${quick[@]}" --json "$out/locate.json"
stage last-layer 30 bench.log "$python" bench/run.py last-layer --device $device "${quick[@]}" "${last[@]}" \
    --json "$out/last-layer.json"

# ---- what came of it ---------------------------------------------------------------------------------------------------

grep -h "passed\|failed" "$out/tests.log" 2>/dev/null | tail -n 4 | tee -a "$summary"
grep -v "^===" "$out/bench.log" 2>/dev/null | tail -n 120
first=$(grep -m 1 "	failed" "$verdicts")
if [ -n "$first" ]; then
    say "first failure: $(cut -f 1 <<<"$first"), see $(cut -f 3 <<<"$first"); all: $(grep "	failed" "$verdicts" | cut -f 1 | paste -sd,)"
fi
if [ ${#left[@]} -gt 0 ]; then say "left for the next call with the same OUT: $(IFS=,; echo "${left[*]}")"; fi
if [ -n "$first" ]; then exit 1; fi
if [ ${#left[@]} -gt 0 ]; then exit 3; fi
say "all stages passed"
