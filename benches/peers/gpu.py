#!/usr/bin/env python3
"""Times the layers of layers.csv in PyTorch on a GPU; prints the CSV of `cargo bench --bench gpu`.

Contenders are named torch_NAME, with _tf32, _f16, _bf16 or _int8 after it; f32 goes with TF32 too:

conv2d   convolution with bias, then an in-place ReLU: eager, cuDNN picks the fastest algorithm.
gemm     the bare product through cuBLAS, neither bias nor ReLU: less work than the layer.
addmm    channels last only: the product with bias and ReLU in cuBLAS's epilogue.
compile  (--compile) convolution, bias and ReLU through torch.compile, max-autotune.
int_mm   (--dtype int8) the bare product of int8 to int32, channels last only.
train    (--pass train) convolution, batch norm with batch statistics and ReLU, then the gradients
         of src, weight, gamma and beta: eager. train_compile is the same through torch.compile.

Each result is compared with f64 before it is timed. Times are the GPU's own, between events, with
L2 flushed before each call. Rows of model roof are what the device can do: `product` is 8192^3 in
cuBLAS, `copy` reads and writes 1 GiB (its last column is GB/s).
"""

import argparse
import copy
import csv
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

START = time.monotonic()
DEVICE = "cuda"
# Compiled first: each kind of layer once.
FIRST = ["s1.c1a", "s1.c3", "s2.c1b", "s3.c1a", "s4.c3", "4096", "b1.exp", "s2.down"]
RUNS = 30
FLUSH = 8

Call = Callable[[], Tensor]


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

    @property
    def is_product(self) -> bool:
        return self.stride == 1 and self.groups == 1


SQUARE = Layer("square", "4096", 1, 4096, 4096, 64, 64, 1, 1, "none")
PRODUCT = Layer("roof", "product", 1, 8192, 8192, 64, 128, 1, 1, "none")
COPY = Layer("roof", "copy", 1, 1, 1, 1 << 14, 1 << 14, 1, 1, "none")


class Precision(NamedTuple):
    suffix: str
    dtype: torch.dtype
    tf32: bool
    tolerance: float
    """Of the largest error, relative to the largest value of f64's result."""

    def use(self) -> None:
        torch.backends.cudnn.allow_tf32 = self.tf32
        torch.backends.cuda.matmul.allow_tf32 = self.tf32
        # What Inductor reads for convolutions.
        torch.backends.cudnn.fp32_precision = "tf32" if self.tf32 else "ieee"


# With 16 bits, sums are f32, but eager PyTorch rounds twice: the convolution, then what bias or
# batch norm make of it. The former may exceed the largest result, hence three units of rounding.
PRECISIONS = {
    "f32": [
        Precision("", torch.float32, False, 5e-5),
        Precision("_tf32", torch.float32, True, 2e-3),
    ],
    "f16": [Precision("_f16", torch.float16, False, 3 * 2**-11)],
    "bf16": [Precision("_bf16", torch.bfloat16, False, 3 * 2**-8)],
}


def read_layers(batch: int) -> list[Layer]:
    with open(Path(__file__).parents[1] / "layers.csv", newline="") as file:
        rows = list(csv.reader(file))[1:]
    layers = [Layer(*row[:2], batch, *map(int, row[3:9]), row[9]) for row in rows]
    return [*layers, SQUARE]


class Timer:
    def __init__(self) -> None:
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        self.flush = torch.empty(FLUSH * l2, dtype=torch.uint8, device=DEVICE)

    def __call__(self, call: Callable[[], object], flushes: int = 1) -> tuple[float, float]:
        """Median and minimum in microseconds. The GPU must not wait for the host to queue the call:
        it is kept busy by as many flushes."""
        for _ in range(3):
            call()
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in "be"] for _ in range(RUNS)]
        for begin, end in pairs:
            for _ in range(flushes):
                self.flush.zero_()
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        times = [begin.elapsed_time(end) * 1e3 for begin, end in pairs]
        return statistics.median(times), min(times)


def write(layer: Layer, layout: str, contender: str, times: tuple[float, float], work: int) -> None:
    median, least = times
    figures = [f"{median:.2f}", f"{least:.2f}", f"{work / median / 1e3:.1f}"]
    print(*layer, layout, contender, "", *figures, sep=",", flush=True)


def complain(layer: Layer, layout: str, contender: str, what: object) -> bool:
    print(f"{layer.model},{layer.name} {layout}: {contender} {what}", file=sys.stderr, flush=True)
    return False


def build(layer: Layer, dtype: torch.dtype, train: bool) -> nn.Sequential:
    """The layer as PyTorch initialises it. Batch norm has parameters of f32."""
    conv = nn.Conv2d(
        layer.cin,
        layer.cout,
        1,
        layer.stride,
        groups=layer.groups,
        bias=not train,
        device=DEVICE,
        dtype=dtype,
    )
    steps: list[nn.Module] = [conv]
    if train:
        steps.append(nn.BatchNorm2d(layer.cout, device=DEVICE))
    if layer.act == "relu":
        steps.append(nn.ReLU(inplace=True))
    return nn.Sequential(*steps)


@torch.no_grad()
def reference(layer: Layer, model: nn.Sequential, src: Tensor, whole: bool) -> Tensor:
    """The layer in f64, or the product alone."""
    conv, *steps = model
    src = src[:, :, :: layer.stride, :: layer.stride].double()
    groups = src.flatten(2).view(layer.n, layer.groups, layer.cin // layer.groups, -1)
    weight = conv.weight.double().view(layer.groups, layer.cout // layer.groups, -1)
    dst = torch.matmul(weight, groups).view(layer.n, layer.cout, *src.shape[2:])
    if whole:
        if conv.bias is not None:
            dst += conv.bias.double()[:, None, None]
        for step in steps:
            dst = copy.deepcopy(step).double()(dst)
    return dst


def eager(
    layer: Layer, model: nn.Sequential, src: Tensor, last: bool
) -> dict[str, tuple[Call, bool]]:
    """By name: the call, and whether its result is the whole layer's."""
    calls: dict[str, tuple[Call, bool]] = {"conv2d": (partial(model, src), True)}
    if not layer.is_product:
        return calls
    n, _, h, w = src.shape
    weight, bias = model[0].weight.view(layer.cout, layer.cin), model[0].bias
    if last:
        rows = src.permute(0, 2, 3, 1).reshape(-1, layer.cin)

        def image(dst: Tensor) -> Tensor:
            return dst.view(n, h, w, -1).permute(0, 3, 1, 2)

        fused = torch._addmm_activation if layer.act == "relu" else torch.addmm
        calls["gemm"] = (lambda: image(rows @ weight.T), False)
        calls["addmm"] = (lambda: image(fused(bias, rows, weight.T)), True)
    else:
        planes = src.view(n, layer.cin, h * w)
        weights = weight.expand(n, -1, -1)
        calls["gemm"] = (lambda: torch.bmm(weights, planes).view(n, -1, h, w), False)
    return calls


def compiled(model: nn.Sequential, src: Tensor) -> Call:
    torch._dynamo.reset()
    return partial(torch.compile(model, mode="max-autotune-no-cudagraphs", dynamic=False), src)


def step(call: Call, asked: list[Tensor], d_dst: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(call(), asked, d_dst)


class Case(NamedTuple):
    layer: Layer
    precision: Precision
    last: bool
    train: bool
    compile: bool

    @property
    def layout(self) -> str:
        return "nhwc" if self.last else "nchw"


def contenders(case: Case, timer: Timer) -> bool:
    """Whether every contender was right."""
    layer, precision, last, train, compile = case
    memory = torch.channels_last if last else torch.contiguous_format
    shape = (layer.n, layer.cin, layer.h, layer.w)
    precision.use()
    src = torch.empty(shape, dtype=precision.dtype, device=DEVICE, memory_format=memory)
    src.uniform_(-1, 1).requires_grad_(train)
    model = build(layer, precision.dtype, train).to(memory_format=memory)
    if compile:
        calls = {"train_compile" if train else "compile": (compiled(model, src), True)}
    else:
        calls = {"train": (partial(model, src), True)} if train else eager(layer, model, src, last)
    right = True
    for name, (call, whole) in calls.items():
        contender = f"torch_{name}{precision.suffix}"
        got, want = call().detach(), reference(layer, model, src, whole)
        off = ((got.double() - want).abs().max() / want.abs().max()).item()
        if not off <= precision.tolerance:
            right = complain(layer, case.layout, contender, f"is off by {off:.1e}")
        timed: Callable[[], object] = call
        if train:
            asked = [src, *model.parameters()]
            d_dst = torch.empty_like(got).uniform_(-1, 1)
            timed = partial(step, call, asked, d_dst)
            if not all(d.isfinite().all() for d in timed()):
                right = complain(layer, case.layout, contender, "has a gradient that is not finite")
        times = timer(timed, flushes=6 if train or compile else 1)
        write(layer, case.layout, contender, times, layer.flops * (3 if train else 1))
    return right


def run(case: Case, timer: Timer) -> bool:
    """Whether every contender ran, and was right. One that fails does not stop those to come."""
    try:
        return contenders(case, timer)
    except Exception as error:  # noqa: BLE001 (torch.compile raises what it likes)
        who = f"torch_{'compile' if case.compile else 'eager'}{case.precision.suffix}"
        why = str(error).strip().partition("\n")[0]
        return complain(case.layer, case.layout, who, f"failed: {type(error).__name__}: {why}")


def run_int8(layer: Layer, timer: Timer) -> bool:
    """The bare product: PyTorch has no quantised layers on a GPU."""
    positions = layer.n * layer.h * layer.w
    if not layer.is_product or positions <= 16 or layer.cin % 8 or layer.cout % 8:
        return complain(layer, "nhwc", "torch_int_mm_int8", "has no such product") or True
    rows, weight = (
        torch.randint(-128, 128, (count, layer.cin), dtype=torch.int8, device=DEVICE)
        for count in (positions, layer.cout)
    )
    call = partial(torch._int_mm, rows, weight.T)
    try:
        right = torch.equal(call().double(), rows.double() @ weight.double().T)
    except RuntimeError as error:
        return complain(layer, "nhwc", "torch_int_mm_int8", f"failed: {error}")
    if not right:
        complain(layer, "nhwc", "torch_int_mm_int8", "is off")
    write(layer, "nhwc", "torch_int_mm_int8", timer(call), layer.flops)
    return right


def roofs(dtype: str, timer: Timer) -> str:
    image = torch.empty(COPY.h, COPY.w, device=DEVICE)
    moved = 2 * image.nbytes
    times = timer(partial(torch.empty_like(image).copy_, image))
    write(COPY, "nhwc", "roof_copy", times, moved)
    said = f"a copy of 1 GiB reads and writes {moved / times[0] / 1e3:.0f} GB/s"
    side = PRODUCT.cin
    for precision in PRECISIONS.get(dtype, [None]):
        if precision is None:
            shape = (2, side, side)
            a, b = torch.randint(-128, 128, shape, dtype=torch.int8, device=DEVICE)
            call, suffix = partial(torch._int_mm, a, b.T), "_int8"
        else:
            precision.use()
            a, b = torch.empty(2, side, side, dtype=precision.dtype, device=DEVICE).uniform_(-1, 1)
            call, suffix = partial(torch.matmul, a, b.T), precision.suffix or "_f32"
        times = timer(call)
        write(PRODUCT, "nhwc", f"roof{suffix}", times, PRODUCT.flops)
        rate = PRODUCT.flops / times[0] / 1e6
        said += f", a product of {side}^3 in {suffix[1:]} does {rate:.0f} T op/s"
    return said


def compile_in_turn(layers: list[Layer], timer: Timer, args: argparse.Namespace) -> bool:
    """Layers of FIRST in both layouts, then the others, while time allows."""
    first = [layer for name in FIRST for layer in layers if layer.name == name]
    rest = [layer for layer in layers if layer not in first]
    cases = [
        Case(layer, precision, last, args.train, True)
        for group in (first, rest)
        for last in (True, False)
        for layer in group
        for precision in PRECISIONS[args.dtype]
    ]
    right = True
    for done, case in enumerate(cases):
        if time.monotonic() - START > args.compile:
            print(f"compiled {done} of {len(cases)} in time", file=sys.stderr)
            break
        right &= run(case, timer)
    return right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--only", default="", help="layers whose name has this text")
    parser.add_argument("--dtype", choices=[*PRECISIONS, "int8"], default="f32")
    parser.add_argument("--pass", choices=["forward", "train"], default="forward", dest="kind")
    parser.add_argument(
        "--compile",
        type=float,
        metavar="SECONDS",
        help="torch.compile too, after the others; starts none after SECONDS of this script",
    )
    args = parser.parse_args()
    args.train = args.kind == "train"
    if args.dtype == "int8" and (args.train or args.compile is not None):
        parser.error("int8 has neither --pass train nor --compile")

    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    # Sums are f32.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    timer = Timer()
    head = ["model,layer,n,cin,cout,h,w,stride,groups,act,layout,contender,kernel", "median_us"]
    print(",".join([*head, "min_us", "gflops"]))
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, "
        f"cuDNN {torch.backends.cudnn.version()}, an empty call takes "
        f"{timer(lambda: None)[0]:.2f} us, {roofs(args.dtype, timer)}",
        file=sys.stderr,
    )
    layers = [
        layer for layer in read_layers(args.batch) if args.only in f"{layer.model},{layer.name}"
    ]
    right = True
    with torch.set_grad_enabled(args.train):
        for layer in layers:
            if args.dtype == "int8":
                right &= run_int8(layer, timer)
                continue
            for last in (False, True):
                for precision in PRECISIONS[args.dtype]:
                    right &= run(Case(layer, precision, last, args.train, False), timer)
        if args.compile is not None:
            right &= compile_in_turn(layers, timer, args)
    return 0 if right else 1


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Python would wait for Inductor's compile workers, which end by themselves.
    os._exit(code)
