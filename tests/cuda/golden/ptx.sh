#!/usr/bin/env bash
# Compiles wrappers.cu to the PTX beside it; with --check, says whether that is what is there.
# nvcc is NVCC's, or the PATH's (scripts/cuda-toolchain.sh).
set -euo pipefail
cd "$(dirname "$0")"
new=$(mktemp -d)
trap 'rm -r "$new"' EXIT
for arch in 75 80; do
    "${NVCC:-nvcc}" -ptx -O3 -std=c++17 -arch="compute_$arch" -o "$new/wrappers_$arch.ptx" wrappers.cu
    if [[ ${1:-} == --check ]]; then
        diff "wrappers_$arch.ptx" "$new/wrappers_$arch.ptx"
    else
        cp "$new/wrappers_$arch.ptx" .
    fi
done
