#!/usr/bin/env bash
# Installs nvcc and libclang where they are missing, and prints the environment that uses them:
#
#     eval "$(scripts/cuda-toolchain.sh)"
#
# nvcc comes from NVIDIA's PyPI wheels into ${XDG_CACHE_HOME:-~/.cache}/pointwise, libclang from apt.
# Only `export` lines go to stdout; everything else goes to stderr. A second run takes milliseconds.
set -euo pipefail

readonly WHEELS=(
    nvidia-cuda-nvcc==13.0.88
    nvidia-cuda-runtime==13.0.96
    nvidia-nvvm==13.0.88
    nvidia-cuda-crt==13.0.88
    nvidia-cuda-cccl==13.0.85
)
readonly CACHE="${XDG_CACHE_HOME:-$HOME/.cache}/pointwise"
readonly ROOT="$CACHE/cuda-13.0"
readonly TREE="$ROOT/nvidia/cu13"
# Written last, so that an interrupted installation is not mistaken for a finished one.
readonly STAMP="$ROOT/.complete"

case "${1:-}" in
    "") ;;
    -h | --help)
        sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
        exit 0
        ;;
    *)
        echo "cuda-toolchain: unknown argument '$1' (see --help)" >&2
        exit 2
        ;;
esac

say() { echo "cuda-toolchain: $*" >&2; }
die() {
    say "$@"
    exit 1
}

install_nvcc() {
    [[ $(uname -sm) == "Linux x86_64" || $(uname -sm) == "Linux aarch64" ]] ||
        die "NVIDIA publishes these wheels for Linux x86_64 and aarch64 only; this is $(uname -sm)"
    command -v python3 >/dev/null || die "python3 is needed to install nvcc from PyPI"
    mkdir -p "$CACHE"
    local fresh
    fresh=$(mktemp -d "$CACHE/cuda-13.0.XXXXXX")
    # shellcheck disable=SC2064  # the folder's name is fixed now
    trap "rm -rf '$fresh'" EXIT
    say "installing ${WHEELS[*]} into $ROOT (once, about 270 MB)"
    local pip=(python3 -m pip)
    if ! "${pip[@]}" --version >/dev/null 2>&1; then
        python3 -m venv "$fresh/venv" >&2 ||
            die "python3 has neither pip nor venv; install python3-pip or python3-venv"
        pip=("$fresh/venv/bin/python" -m pip)
    fi
    "${pip[@]}" install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps --target "$fresh/tree" \
        "${WHEELS[@]}" >&2 || die "pip could not install the wheels (is PyPI reachable?)"
    local tree="$fresh/tree/nvidia/cu13"
    [[ -x $tree/bin/nvcc && -x $tree/nvvm/bin/cicc ]] ||
        die "the wheels have no bin/nvcc and nvvm/bin/cicc where they are expected"
    # The toolkit's installer calls it lib64, and so do build scripts that look for libraries.
    ln -s lib "$tree/lib64"
    touch "$fresh/tree/.complete"
    # Another run may have finished first; the two trees are equal, so either may win.
    if [[ ! -e $STAMP ]]; then
        rm -rf "$ROOT"
        mv -T "$fresh/tree" "$ROOT" || [[ -e $STAMP ]] || die "cannot move the tree to $ROOT"
    fi
}

as_root() {
    if [[ $(id -u) == 0 ]]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        die "need root (or sudo) for: $*"
    fi
}

# The folder of the newest libclang under any of the names that bindgen looks for.
find_libclang() {
    local candidate
    for candidate in "${LIBCLANG_PATH:-}" /usr/lib/llvm-*/lib /usr/lib64 /usr/lib/*-linux-gnu /usr/lib; do
        if compgen -G "$candidate/libclang.so*" >/dev/null ||
            compgen -G "$candidate/libclang-[0-9]*.so*" >/dev/null; then
            echo "$candidate"
        fi
    done | sort --version-sort | tail -n 1
}

install_libclang() {
    command -v apt-get >/dev/null ||
        die "no libclang found and no apt-get here: install libclang and set LIBCLANG_PATH"
    local package
    package=$(apt-cache search --names-only '^libclang1-[0-9]+$' | awk '{print $1}' | sort -V | tail -n 1)
    if [[ -z $package ]]; then
        as_root apt-get update -qq >&2
        package=$(apt-cache search --names-only '^libclang1-[0-9]+$' | awk '{print $1}' | sort -V | tail -n 1)
    fi
    [[ -n $package ]] || die "apt knows no libclang1-N package"
    say "installing $package"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$package" >&2 ||
        { as_root apt-get update -qq >&2 &&
            as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$package" >&2; } ||
        die "apt-get could not install $package"
}

[[ -e $STAMP ]] || install_nvcc
"$TREE/bin/nvcc" --version >/dev/null || die "$TREE/bin/nvcc does not run; remove $ROOT and try again"
command -v c++ >/dev/null || command -v g++ >/dev/null ||
    say "warning: no C++ compiler on PATH; nvcc needs one (apt-get install g++)"

libclang=$(find_libclang)
if [[ -z $libclang ]]; then
    install_libclang
    libclang=$(find_libclang)
fi
[[ -n $libclang ]] || die "libclang was installed but is not where it is expected"

printf 'export CUDA_HOME=%q\n' "$TREE"
printf 'export NVCC=%q\n' "$TREE/bin/nvcc"
printf 'export PATH=%q:"$PATH"\n' "$TREE/bin"
printf 'export LIBCLANG_PATH=%q\n' "$libclang"
# The libclang1 package has no compiler headers (stddef.h, stdint.h), so bindgen takes the C compiler's.
if ! compgen -G "$libclang/clang/*/include/stddef.h" >/dev/null && command -v cc >/dev/null; then
    headers=$(cc -print-file-name=include)
    if [[ -d $headers ]]; then
        printf 'export BINDGEN_EXTRA_CLANG_ARGS=%q\n' "-isystem $headers"
    fi
fi
