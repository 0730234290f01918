#!/usr/bin/env bash
# Checks and measures the CUDA path on a machine with a GPU, which needs neither cargo nor network:
#
#     scripts/gpu-check.sh prepare FOLDER      # here: builds tests, bench and examples into FOLDER,
#                                              # and packs them into FOLDER.tar.xz
#     scripts/gpu-check.sh run FOLDER RESULTS  # there, from a copy of this repository
#
# run goes through: facts of the GPU; what instructions return (golden.safetensors); beside one another every
# test with POINTWISE_REQUIRE=cuda and EfficientNet-Lite0; likewise compute-sanitizer on some tests; then one after another, for each dtype and at batch 32, 128 and 1, the layer bench and PyTorch
# (benches/peers/gpu.py), the first bench again, which shows how far figures drift; then ncu. RESULTS
# gets log, bench.csv, again.csv, golden.safetensors and ncu.txt. A step that fails or outlasts its
# limit is reported at the end and does not stop the others; one whose tool is missing is skipped and
# says so.
#
# POINTWISE_CUDA_ARCHS (prepare) chooses chips, as for any build. GPU_CHECK_STEPS (run) is a regular
# expression of the steps to do, GPU_CHECK_COMPILE the seconds in which torch.compile may start on
# layers (100; 0 for none).
set -euo pipefail
cd "$(dirname "$0")/.."

# The tests that use a device if there is one.
readonly TESTS=(cuda pointwise classify apply blocks errors)
# What the sanitizers, which are slow, see of tests/cuda: every kind of kernel.
readonly SANITIZED=(kernels_round_exact_sums every_kernel_on_tile_edges tf32_kernels_run int8_kernels_give
    sources_that_are_quantised fp8_kernels_are_exact training_on_several)

usage() {
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' scripts/gpu-check.sh
    exit "$1"
}

prepare() {
    local folder=$1 messages paths path name kind tests=()
    for name in "${TESTS[@]}"; do
        [[ $name == pointwise ]] || tests+=(--test "$name")
    done
    mkdir -p "$folder/deps" "$folder/examples"
    messages=$(
        cargo test --release --features cuda,nccl --lib --examples "${tests[@]}" --no-run \
            --message-format=json &&
            cargo bench --features cuda,nccl --bench gpu --no-run --message-format=json
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
    # Each holds the kernels: most of a file is in the one before.
    tar -C "$(dirname "$folder")" -c "$(basename "$folder")" |
        xz --lzma2=preset=1,dict=512MiB >"$folder.tar.xz"
    du -sh "$folder" "$folder.tar.xz"
}

# step NAME SECONDS COMMAND…: output goes to the log, the verdict to stdout and the summary.
step() {
    local name=$1 limit=$2 begin=$SECONDS code=0
    shift 2
    [[ $name =~ ${GPU_CHECK_STEPS:-.} ]] || return 0
    if ! command -v "$1" >/dev/null; then
        echo "-- $name: skipped, there is no $1"
        return 0
    fi
    echo "== $name: $*" >"$parts/$name"
    timeout -k 5 "$limit" "$@" >>"$parts/$name" 2>&1 || code=$?
    cat "$parts/$name" >>"$log"
    echo "-- $name: exit $code after $((SECONDS - begin)) s"
    [[ $code == 0 ]] || echo "$name ($code)" >>"$parts/.failed"
}

# into FILE COMMAND…: adds the CSV that it prints, under one header, and keeps apart what it says on stderr.
into() {
    local file=$1
    shift
    "$@" | awk -v "header=$([[ -s $file ]] || echo 1)" 'NR > 1 || header { print; fflush() }' >>"$file"
    return "${PIPESTATUS[0]}"
}

run() {
    local folder results root test tool filter dtype n layer section more
    folder=$(realpath "$1")
    mkdir -p "$2"
    results=$(realpath "$2")
    parts=$(mktemp -d)
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
    # PyTorch brings an NCCL.
    local nccl="import nvidia.nccl as n; print(list(n.__path__)[0] + '/lib')"
    nccl=$(python3 -c "$nccl" 2>/dev/null) && export LD_LIBRARY_PATH=$nccl${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    local bench=$folder/deps/gpu trials=$folder/deps/cuda peers="python3 benches/peers/gpu.py"
    local csv=$results/bench.csv compile=${GPU_CHECK_COMPILE:-100}

    step facts 30 "${facts[@]}" "--query-gpu=$state,clocks.max.sm,clocks.max.mem,memory.total,ecc.mode.current"
    step golden 30 env "POINTWISE_GOLDEN_TO=$results/golden.safetensors" "$trials" instructions_return
    for test in "${TESTS[@]}"; do
        step "test-$test" 120 "$folder/deps/$test" &
    done
    # What a chip gets that is newer than all the machine code in the image.
    step test-cuda-ptx 300 env CUDA_FORCE_PTX_JIT=1 "$trials" &
    for dtype in f32 bf16 f16 int8; do
        step "classify-$dtype" 60 "$folder/examples/classify" --device cuda --runs 40 --dtype $dtype &
    done
    wait
    for filter in "${SANITIZED[@]}"; do
        for tool in memcheck racecheck synccheck initcheck; do
            # racecheck loses launches of several threads at a time, and then hangs.
            step "$tool-$filter" 100 compute-sanitizer --tool $tool --error-exitcode 9 \
                --print-limit 20 "$trials" --test-threads=1 "$filter" &
        done
    done
    wait

    step bench-f32-32 90 bash -c "into $csv $bench"
    step facts-after-bench 30 "${facts[@]}" "--query-gpu=$state"
    step peers-f32-32 $((compile + 70)) bash -c "into $csv $peers --compile $compile"
    step bench-again 60 bash -c "into $results/again.csv $bench --chosen"
    step facts-after-bench-again 30 "${facts[@]}" "--query-gpu=$state"
    step bench-tf32-32 90 bash -c "into $csv $bench --tf32"
    for dtype in bf16 f16 int8; do
        step "bench-$dtype-32" 90 bash -c "into $csv $bench --dtype $dtype"
        more=$([[ $dtype == int8 ]] || echo "--compile $compile")
        step "peers-$dtype-32" $((compile + 70)) bash -c "into $csv $peers --dtype $dtype $more"
    done
    for n in 128 1; do
        step "bench-f32-$n" 60 bash -c "into $csv $bench --chosen --batch $n"
        step "bench-tf32-$n" 60 bash -c "into $csv $bench --chosen --tf32 --batch $n"
        for dtype in bf16 f16 int8; do
            step "bench-$dtype-$n" 60 bash -c "into $csv $bench --chosen --dtype $dtype --batch $n"
        done
        for dtype in f32 bf16; do
            step "peers-$dtype-$n" 120 bash -c "into $csv $peers --dtype $dtype --batch $n"
        done
    done

    # The clocks stay as they are: the machine may not be ours to set.
    local profile=(ncu --clock-control none --kernel-id ::regex:fprop:1)
    for section in SpeedOfLight LaunchStats Occupancy WarpStateStats MemoryWorkloadAnalysis \
        ComputeWorkloadAnalysis; do
        profile+=(--section "$section")
    done
    for layer in square s3.c1a s1.c3 b1.exp; do
        for dtype in f32 bf16; do
            step "ncu-$layer-$dtype" 40 "${profile[@]}" --log-file "$results/ncu-$layer-$dtype" \
                "$bench" --chosen --only $layer --dtype $dtype
        done
    done
    cat "$results"/ncu-* >"$results/ncu.txt" 2>/dev/null && rm "$results"/ncu-*

    if [[ -s $parts/.failed ]]; then
        sed 's/^/failed: /' "$parts/.failed"
        return 1
    fi
    echo "all steps passed"
}

case "${1:-}" in
    prepare) [[ $# == 2 ]] || usage 2 && prepare "$2" ;;
    run) [[ $# == 3 ]] || usage 2 && run "${@:2}" ;;
    -h | --help) usage 0 ;;
    *) usage 2 ;;
esac
