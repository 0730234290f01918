#!/usr/bin/env python3
"""Times the layers of layers.csv in PyTorch on a GPU; prints the CSV of `cargo bench --bench gpu`.

Contenders, each with and without TF32:

conv2d  F.conv2d with bias, then an in-place ReLU: eager PyTorch, cuDNN picks the fastest algorithm.
gemm    the bare product through cuBLAS, neither bias nor ReLU: less work than the layer.
addmm   channels last only: the product with bias and ReLU in cuBLAS's epilogue.

Each result is compared with f64 before it is timed. Times are the GPU's own, between events, with
L2 flushed before each call.
"""

import argparse
import csv
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SQUARE = "square,4096,1,4096,4096,64,64,1,1,none".split(",")
RUNS = 30
FLUSH = 8


class Layer(NamedTuple):
    model: str
    name: str
    n: int
    cin: int
    cout: int
    h: int
    w: int
    stride: int
    groups: int
    act: str

    @property
    def flops(self) -> int:
        positions = self.n * -(-self.h // self.stride) * -(-self.w // self.stride)
        return 2 * positions * self.cout * self.cin // self.groups


def read_layers(batch: int) -> list[Layer]:
    with open(Path(__file__).parents[1] / "layers.csv", newline="") as file:
        rows = list(csv.reader(file))[1:]
    layers = [Layer(*row[:2], batch, *map(int, row[3:9]), row[9]) for row in rows]
    return [*layers, Layer(*SQUARE[:2], *map(int, SQUARE[2:9]), SQUARE[9])]


class Timer:
    def __init__(self) -> None:
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        self.flush = torch.empty(FLUSH * l2, dtype=torch.uint8, device="cuda")

    def __call__(self, call: Callable[[], object]) -> tuple[float, float]:
        """Median and minimum in microseconds."""
        for _ in range(3):
            call()
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in "be"] for _ in range(RUNS)]
        for begin, end in pairs:
            self.flush.zero_()
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        times = [begin.elapsed_time(end) * 1e3 for begin, end in pairs]
        return statistics.median(times), min(times)


def contenders(
    layer: Layer, src: Tensor, weight: Tensor, bias: Tensor, last: bool
) -> dict[str, tuple[Callable[[], Tensor], bool]]:
    """By name: the call, and whether its result is the whole layer's."""
    relu = layer.act == "relu"
    taps = weight[:, :, None, None]
    if last:
        taps = taps.contiguous(memory_format=torch.channels_last)

    def conv2d() -> Tensor:
        dst = F.conv2d(src, taps, bias, layer.stride, groups=layer.groups)
        return dst.relu_() if relu else dst

    calls: dict[str, tuple[Callable[[], Tensor], bool]] = {"conv2d": (conv2d, True)}
    if layer.stride > 1 or layer.groups > 1:
        return calls
    n, _, h, w = src.shape
    if last:
        rows = src.permute(0, 2, 3, 1).reshape(-1, layer.cin)

        def image(dst: Tensor) -> Tensor:
            return dst.view(n, h, w, -1).permute(0, 3, 1, 2)

        fused = torch._addmm_activation if relu else torch.addmm
        calls["gemm"] = (lambda: image(rows @ weight.T), False)
        calls["addmm"] = (lambda: image(fused(bias, rows, weight.T)), True)
    else:
        planes = src.view(n, layer.cin, h * w)
        weights = weight.expand(n, -1, -1)
        calls["gemm"] = (lambda: torch.bmm(weights, planes).view(n, -1, h, w), False)
    return calls


def error(got: Tensor, layer: Layer, src: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    """The largest error, relative to the largest value of f64's result."""
    s = layer.stride
    src = src[:, :, ::s, ::s].double().flatten(2)
    src = src.view(layer.n, layer.groups, layer.cin // layer.groups, -1)
    weight = weight.double().view(layer.groups, layer.cout // layer.groups, -1)
    want = torch.matmul(weight, src).reshape(got.shape)
    if bias is not None:
        want += bias.double()[:, None, None]
        if layer.act == "relu":
            want.relu_()
    return ((got.double() - want).abs().max() / want.abs().max()).item()


def run(layer: Layer, timer: Timer, writer: "csv._writer") -> bool:
    """Whether every contender was right."""
    right = True
    bound = (layer.cin // layer.groups) ** -0.5
    src = torch.empty(layer.n, layer.cin, layer.h, layer.w, device="cuda").uniform_(-1, 1)
    weight = torch.empty(layer.cout, layer.cin // layer.groups, device="cuda")
    weight.uniform_(-bound, bound)
    bias = torch.empty(layer.cout, device="cuda").uniform_(-bound, bound)
    for last in (False, True):
        if last:
            src = src.contiguous(memory_format=torch.channels_last)
        for tf32 in (False, True):
            torch.backends.cudnn.allow_tf32 = tf32
            torch.backends.cuda.matmul.allow_tf32 = tf32
            for name, (call, whole) in contenders(layer, src, weight, bias, last).items():
                off = error(call(), layer, src, weight, bias if whole else None)
                contender = f"torch_{name}" + ("_tf32" if tf32 else "")
                if not off <= (2e-3 if tf32 else 5e-5):
                    print(f"{layer}: {contender} is off by {off:.1e}", file=sys.stderr)
                    right = False
                median, least = timer(call)
                times = [f"{median:.2f}", f"{least:.2f}", f"{layer.flops / median / 1e3:.1f}"]
                writer.writerow([*layer, "nhwc" if last else "nchw", contender, "", *times])
    return right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--only", default="", help="layers whose name has this text")
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    timer = Timer()
    empty = timer(lambda: None)[0]
    gigabyte = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(gigabyte)
    copy = (2 << 30) / timer(lambda: other.copy_(gigabyte))[0] / 1e3
    del gigabyte, other
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, "
        f"cuDNN {torch.backends.cudnn.version()}, an empty call takes {empty:.2f} us, "
        f"a copy of 1 GiB reads and writes {copy:.0f} GB/s",
        file=sys.stderr,
    )
    writer = csv.writer(sys.stdout, lineterminator="\n")
    head = ["model,layer,n,cin,cout,h,w,stride,groups,act,layout,contender,kernel", "median_us"]
    print(",".join([*head, "min_us", "gflops"]))
    right = True
    with torch.inference_mode():
        for layer in read_layers(args.batch):
            if args.only in f"{layer.model},{layer.name}":
                right &= run(layer, timer, writer)
                sys.stdout.flush()
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
