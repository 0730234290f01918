"""Times training steps of 1x1 convolution + batch norm + ReLU here and in PyTorch eager, in one run.

    cargo build --release --example bench
    ~/.cache/pointwise/peers/bin/python benches/peers/train.py [--threads T] [--batch N] [--dtype bf16]

A step is forward with batch statistics and backward for src, weight, gamma and beta. Layer by layer,
our bench (`--pass train`, which verifies its results) and PyTorch in channels_last and contiguous
take turns; each contender's figure is the least median of its turns. GFLOP/s count three products.
In f16 and bf16 all that PyTorch has is of that type; our parameters and their gradients are f32.
"""

import argparse
import csv
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import torch

from layer import Layer, read

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def ours(binary: Path, layer: Layer, threads: int, dtype: str) -> dict[str, float]:
    """Seconds of a step by layout."""
    header = "model,layer,n,cin,cout,h,w,stride,groups,act"
    row = f"{layer.model},{layer.name},{layer.n},{layer.c_in},{layer.c_out},{layer.h},{layer.w}"
    row += f",{layer.stride},{layer.groups},{layer.act}"
    with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
        file.write(f"{header}\n{row}\n")
        file.flush()
        command = [binary, "--pass", "train", "--dtype", dtype, "--layers", file.name]
        command += ["--threads", str(threads)]
        run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        sys.exit(run.stderr)
    rows = csv.DictReader(run.stdout.splitlines())
    return {row["layout"]: float(row["median_us"]) * 1e-6 for row in rows}


def pytorch(layer: Layer, layout: str, seconds: float, dtype: torch.dtype) -> float:
    """Seconds of a step in eager mode."""
    memory = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    conv = torch.nn.Conv2d(
        layer.c_in, layer.c_out, 1, layer.stride, groups=layer.groups, bias=False
    )
    norm = torch.nn.BatchNorm2d(layer.c_out)
    model = torch.nn.Sequential(conv, norm)
    if layer.act == "relu":
        model.append(torch.nn.ReLU(inplace=True))
    model = model.to(dtype=dtype, memory_format=memory)
    src = torch.randn(layer.n, layer.c_in, layer.h, layer.w)
    src = src.to(dtype=dtype, memory_format=memory)
    src.requires_grad_()
    d_dst = torch.randn(layer.n, layer.c_out, *layer.out)
    d_dst = d_dst.to(dtype=dtype, memory_format=memory)
    parameters = [src, *model.parameters()]

    def step():
        torch.autograd.grad(model(src), parameters, d_dst)

    for _ in range(3):
        step()
    times = []
    end = perf_counter() + seconds
    while perf_counter() < end or len(times) < 5:
        start = perf_counter()
        step()
        times.append(perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=DTYPES, default="f32")
    parser.add_argument("--only", default="resnet50", help="layers whose line contains this")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.3, help="of PyTorch, per turn")
    parser.add_argument("--bench", type=Path, default=ROOT / "target/release/examples/bench")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    layers = read(ROOT / "benches/layers.csv", arguments.only, arguments.batch)
    print("layer,threads,ours_nchw,ours_nhwc,eager_nchw,eager_nhwc,ratio_nchw,ratio_nhwc")
    logs = {"nchw": [], "nhwc": []}
    for layer in layers:
        best = {}
        for _ in range(arguments.turns):
            steps = ours(arguments.bench, layer, arguments.threads, arguments.dtype)
            turn = {("ours", layout): time for layout, time in steps.items()}
            for layout in logs:
                dtype = DTYPES[arguments.dtype]
                turn["eager", layout] = pytorch(layer, layout, arguments.seconds, dtype)
            for key, time in turn.items():
                best[key] = min(best.get(key, math.inf), time)
        speed = {key: 3 * layer.flops / time / 1e9 for key, time in best.items()}
        eager = max(speed["eager", layout] for layout in logs)
        ratios = {layout: speed["ours", layout] / eager for layout in logs}
        for layout, ratio in ratios.items():
            logs[layout].append(math.log(ratio))
        figures = [speed[who, layout] for who in ("ours", "eager") for layout in logs]
        print(
            f"{layer.name},{arguments.threads},"
            + ",".join(f"{x:.1f}" for x in figures)
            + "".join(f",{ratios[layout]:.2f}" for layout in logs),
            flush=True,
        )
    for layout, values in logs.items():
        mean = math.exp(sum(values) / len(values))
        print(f"# {layout}: {mean:.2f} times the better eager layout, geometric mean")


if __name__ == "__main__":
    main()
