#!/usr/bin/env bash
# Checks and measures the CUDA path on a machine with a GPU, which needs neither cargo nor network:
#
#     scripts/gpu-check.sh prepare FOLDER      # here: builds tests, bench and examples into FOLDER
#     scripts/gpu-check.sh run FOLDER RESULTS [--dtype f16|bf16]  # there, from a copy of this repository
#
# run goes through: facts of the GPU; every test with POINTWISE_REQUIRE=cuda; EfficientNet-Lite0;
# the layer bench at batch 32, PyTorch beside it (benches/peers/gpu.py), the bench again, which shows
# how far figures drift, and both at batch 1; the bench on f16 and bf16, or on the one that --dtype
# names; compute-sanitizer; ncu. RESULTS gets log, ncu.txt and
# CSV. A step that fails or outlasts its limit is reported at the end and does not stop the others;
# one whose tool is missing is skipped and says so. About 4 minutes on an H100.
#
# POINTWISE_CUDA_ARCHS (prepare) chooses chips, as for any build. GPU_CHECK_STEPS (run) is a regular
# expression of the steps to do.
set -euo pipefail
cd "$(dirname "$0")/.."

# The tests that use a device if there is one.
readonly TESTS=(cuda pointwise classify apply blocks errors)

usage() {
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' scripts/gpu-check.sh
    exit "$1"
}

prepare() {
    local folder=$1 messages paths path name kind
    mkdir -p "$folder/deps" "$folder/examples"
    messages=$(
        cargo test --release --features cuda --no-run --message-format=json &&
            cargo bench --features cuda --bench gpu --no-run --message-format=json
    )
    mapfile -t paths < <(grep -o '"executable":"[^"]*"' <<<"$messages" | cut -d'"' -f4 | sort -u)
    for path in "${paths[@]}"; do
        name=$(basename "$path")
        kind=$(basename "$(dirname "$path")")
        if [[ $kind == deps ]]; then
            name=${name%-*}
            [[ " gpu ${TESTS[*]} " == *" $name "* ]] || continue
        fi
        # Without the debug information of the host's code: it is most of the size.
        strip -o "$folder/$kind/$name" "$path"
    done
    # Tests look for fixtures where they were built.
    pwd >"$folder/root"
    du -sh "$folder"
}

# step NAME SECONDS COMMAND…: output goes to the log, the verdict to stdout and the summary.
failed=()
step() {
    local name=$1 limit=$2 begin=$SECONDS code=0
    shift 2
    [[ $name =~ ${GPU_CHECK_STEPS:-.} ]] || return 0
    if ! command -v "$1" >/dev/null; then
        echo "-- $name: skipped, there is no $1"
        return 0
    fi
    echo "== $name: $*" >>"$log"
    timeout -k 5 "$limit" "$@" >>"$log" 2>&1 || code=$?
    echo "-- $name: exit $code after $((SECONDS - begin)) s"
    [[ $code == 0 ]] || failed+=("$name ($code)")
}

# into FILE COMMAND…: keeps stdout apart from what is said on stderr.
into() {
    local file=$1
    shift
    "$@" >"$file"
}

run() {
    local folder results root test tool layer layout section dtype
    folder=$(realpath "$1")
    mkdir -p "$2"
    results=$(realpath "$2")
    log=$results/log
    root=$(cat "$folder/root")
    if [[ ! -e $root ]]; then
        mkdir -p "$(dirname "$root")"
        ln -s "$PWD" "$root"
    fi
    mkdir -p "$root/target/tmp"
    export PYTHONUNBUFFERED=1 POINTWISE_REQUIRE=cuda
    export -f into
    local state=name,driver_version,pstate,clocks.sm,clocks.mem,power.draw,temperature.gpu
    local facts=(nvidia-smi --format=csv)
    PATH=$PATH:/usr/local/cuda/bin
    local bench=$folder/deps/gpu dtypes=(f16 bf16)
    [[ $# -lt 4 ]] || dtypes=("$4")

    step facts 30 "${facts[@]}" "--query-gpu=$state,clocks.max.sm,clocks.max.mem,memory.total,ecc.mode.current"
    for test in "${TESTS[@]}"; do
        step "test-$test" 90 "$folder/deps/$test"
    done
    # What a chip gets that is newer than all the machine code in the image.
    step test-cuda-ptx 90 env CUDA_FORCE_PTX_JIT=1 "$folder/deps/cuda"
    for layout in nchw nhwc; do
        step "classify-$layout" 30 \
            "$folder/examples/classify" --device cuda --runs 40 --layout $layout
    done

    local peers="python3 benches/peers/gpu.py"
    step bench 90 bash -c "into $results/ours.csv $bench"
    step facts-after-bench 30 "${facts[@]}" "--query-gpu=$state"
    step peers 120 bash -c "into $results/peers.csv $peers"
    step bench-again 60 bash -c "into $results/ours-again.csv $bench --chosen"
    step facts-after-bench-again 30 "${facts[@]}" "--query-gpu=$state"
    step bench-tf32 90 bash -c "into $results/ours-tf32.csv $bench --tf32"
    step bench-n1 60 bash -c "into $results/ours-n1.csv $bench --batch 1"
    step bench-tf32-n1 60 bash -c "into $results/ours-tf32-n1.csv $bench --tf32 --batch 1"
    for dtype in "${dtypes[@]}"; do
        step "bench-$dtype" 90 bash -c "into $results/ours-$dtype.csv $bench --dtype $dtype"
        step "bench-$dtype-n1" 60 \
            bash -c "into $results/ours-$dtype-n1.csv $bench --dtype $dtype --batch 1"
    done
    step peers-n1 90 bash -c "into $results/peers-n1.csv $peers --batch 1"

    local trials=$folder/deps/cuda
    # racecheck loses launches of several threads at a time, and then hangs.
    for tool in memcheck racecheck synccheck initcheck; do
        step $tool 90 compute-sanitizer --tool $tool --error-exitcode 9 --print-limit 20 \
            "$trials" --test-threads=1
    done

    # The clocks stay as they are: the machine may not be ours to set.
    local profile=(ncu --clock-control none --kernel-id ::regex:fprop:1)
    for section in SpeedOfLight LaunchStats Occupancy WarpStateStats MemoryWorkloadAnalysis \
        ComputeWorkloadAnalysis; do
        profile+=(--section "$section")
    done
    for layer in square s3.c1a s1.c3 b1.exp; do
        step "ncu-$layer" 40 "${profile[@]}" --log-file "$results/ncu-$layer.txt" \
            "$bench" --chosen --only $layer
    done
    cat "$results"/ncu-*.txt >"$results/ncu.txt" 2>/dev/null && rm "$results"/ncu-*.txt

    if ((${#failed[@]})); then
        printf 'failed: %s\n' "${failed[@]}"
        return 1
    fi
    echo "all steps passed"
}

case "${1:-}" in
    prepare) [[ $# == 2 ]] || usage 2 && prepare "$2" ;;
    run) [[ $# == 3 || $# == 5 && $4 == --dtype ]] || usage 2 && run "${@:2}" ;;
    -h | --help) usage 0 ;;
    *) usage 2 ;;
esac
