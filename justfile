# The usual commands; `just` lists them.

_default:
    @just --list

# What CI does, from the start to the end.
ci:
    bash .ci/run

# Formats, lints and tests without CUDA.
check:
    cargo fmt --all
    cargo clippy --all-targets -- -D warnings
    cargo test

# Tests under each instruction set of this CPU.
test-isas:
    POINTWISE_CPU_ISA=portable cargo test --lib --tests
    POINTWISE_CPU_ISA=avx2 cargo test --lib --tests
    POINTWISE_CPU_ISA=avx512 cargo test --lib --tests

# Runs the GPU path on the stand-in driver: `just emulate sm_80 cargo test --features cuda`.
emulate arch *command:
    eval "$(scripts/cuda-toolchain.sh)" && tests/emulator/run --arch {{arch}} {{command}}

# Classifies the bundled cat.
classify *args:
    cargo run --release --example classify -- {{args}}

# Trains PointNet on handwritten digits.
train *args:
    cargo run --release --example train -- {{args}}

# Times layers against the machine's roof: `just bench --threads 2 --plot roofline.svg`.
bench *args:
    cargo run --release --example bench -- {{args}}

# The API documentation, with private items.
doc:
    cargo doc --no-deps --features serde --document-private-items --open
