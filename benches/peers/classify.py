"""Times the `classify` example beside ONNX Runtime on the same network and picture.

Started by `classify`, which makes the environment and builds the example. The network is rebuilt
as ONNX from our safetensors, batch norms and all (ONNX Runtime folds them), and both answers are
checked against the logits that PyTorch computed in float64 (tests/fixtures).
"""

import argparse
import json
import math
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors import safe_open
from safetensors.numpy import load_file

from process import Failure, Worker, busy, is_disturbed, numbers
from report import count

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = ROOT / "examples/data/efficientnet_lite0.safetensors"
FIXTURE = ROOT / "tests/fixtures/efficientnet_lite0_chelsea.safetensors"
LABELS = ROOT / "examples/data/imagenet_classes.txt"

# Asks this program to be the ONNX Runtime worker.
SERVE = "serve"

# Of ONNX Runtime's logits, relative to the largest one of the fixture.
TOLERANCE = 1e-4
# Of the example's probabilities, which it prints with four digits; its own resize of the picture
# is not bit by bit the one of which the fixture was made.
PROBABILITY = 0.02


class Graph:
    """Builds the ONNX graph; a node's output is named after its weights."""

    def __init__(self, tensors: dict[str, np.ndarray], eps: float) -> None:
        self._tensors, self._eps = tensors, eps
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}

    def node(self, op: str, inputs: list[str], output: str, **attributes: object) -> str:
        self._nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def constant(self, name: str, values: np.ndarray | None = None) -> str:
        values = self._tensors[name] if values is None else values
        self._constants[name] = numpy_helper.from_array(values.astype(np.float32), name)
        return name

    def conv(self, src: str, name: str, norm: str, stride: int, relu6: bool) -> str:
        """Convolution padded as TensorFlow's "same", its batch norm, ReLU6 if that follows."""
        weight = self._tensors[f"{name}.weight"]
        # Depthwise weights have one input channel; no other convolution here has.
        groups = weight.shape[0] if weight.shape[1] == 1 else 1
        x = self.node(
            "Conv",
            [src, self.constant(f"{name}.weight")],
            name,
            kernel_shape=list(weight.shape[2:]),
            strides=[stride, stride],
            group=groups,
            auto_pad="SAME_UPPER",
        )
        parts = ("weight", "bias", "running_mean", "running_var")
        constants = [self.constant(f"{norm}.{part}") for part in parts]
        x = self.node("BatchNormalization", [x, *constants], norm, epsilon=self._eps)
        if relu6:
            lo = self.constant("zero", np.zeros(()))
            hi = self.constant("six", np.full((), 6.0))
            x = self.node("Clip", [x, lo, hi], f"{norm}.relu6")
        return x

    def unused(self) -> list[str]:
        return sorted(set(self._tensors) - set(self._constants))

    def model(self, src: tuple[str, list[int]], dst: tuple[str, list[int]]) -> onnx.ModelProto:
        ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (src, dst)]
        constants = list(self._constants.values())
        graph = helper.make_graph(self._nodes, "network", [ends[0]], [ends[1]], constants)
        opset = helper.make_opsetid("", 17)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=9)
        onnx.checker.check_model(model)
        return model


def network() -> onnx.ModelProto:
    """EfficientNet-Lite0 with the weights of the example, `src [1, 3, 224, 224]`."""
    with safe_open(WEIGHTS, "numpy") as file:
        info = json.loads(file.metadata()["network"])
    tensors = load_file(WEIGHTS)
    graph = Graph(tensors, info["batch_norm_eps"])
    x = graph.conv("src", "_conv_stem", "_bn0", 2, True)
    index = 0
    for stage in info["stages"]:
        letters = {part[0]: int(part[1:]) for part in stage.split("_")}
        for repeat in range(letters["r"]):
            name = f"_blocks.{index}."
            stride = letters["s"] if repeat == 0 else 1
            block = x
            if letters["e"] != 1:
                x = graph.conv(x, f"{name}_expand_conv", f"{name}_bn0", 1, True)
            x = graph.conv(x, f"{name}_depthwise_conv", f"{name}_bn1", stride, True)
            x = graph.conv(x, f"{name}_project_conv", f"{name}_bn2", 1, False)
            if stride == 1 and (repeat > 0 or letters["i"] == letters["o"]):
                x = graph.node("Add", [x, block], f"{name}residual")
            index += 1
    x = graph.conv(x, "_conv_head", "_bn1", 1, True)
    x = graph.node("GlobalAveragePool", [x], "mean")
    x = graph.node("Flatten", [x], "flat")
    weight, bias = graph.constant("_fc.weight"), graph.constant("_fc.bias")
    graph.node("Gemm", [x, weight, bias], "dst", transB=1)
    if unused := graph.unused():
        raise SystemExit(f"{WEIGHTS} has tensors that the network does not use: {unused}")
    size = info["image_size"]
    classes = tensors["_fc.bias"].shape[0]
    return graph.model(("src", [1, 3, size, size]), ("dst", [1, classes]))


def picture() -> tuple[np.ndarray, np.ndarray]:
    """The bundled picture as the network reads it, and PyTorch's logits of it."""
    fixture = load_file(FIXTURE)
    pixels = fixture["pixels"].astype(np.float32)
    src = np.ascontiguousarray(((pixels - 127) / 128).transpose(2, 0, 1)[None])
    return src, fixture["logits"]


def serve_onnxruntime(threads: int) -> None:
    """The ONNX Runtime side, a process of its own, as the contenders of `run` are."""
    import onnxruntime

    from contenders import Loaded
    from contenders.onnxruntime import bound, session
    from worker import serve

    def load(_: str) -> Loaded:
        src, logits = picture()
        dst = np.full_like(logits, np.nan)
        return Loaded(bound(session(network(), threads), src, dst), lambda: dst, keep=src)

    serve(f"hello nchw onnxruntime {onnxruntime.__version__}", load)


@dataclass
class Answer:
    """What `classify` printed: labels with probabilities, and times in milliseconds."""

    top: list[tuple[str, float]]
    median: float
    pointwise: float
    rest: float


def example(binary: Path, layout: str, threads: int, runs: int, cpus: list[int]) -> Answer:
    command = [binary, "--device", "cpu", "--layout", layout, "--threads", str(threads)]
    out = subprocess.run(
        [*command, "--runs", str(runs)],
        check=True,
        text=True,
        stdout=subprocess.PIPE,
        preexec_fn=lambda: os.sched_setaffinity(0, cpus),
    ).stdout

    def number(pattern: str) -> float:
        found = re.search(pattern, out, re.MULTILINE)
        if not found:
            raise SystemExit(f"no {pattern!r} in what {binary} printed:\n{out}")
        return float(found[1])

    top = [(m[2], float(m[1])) for m in re.finditer(r"^\d (\d\.\d{4}) (.+)$", out, re.MULTILINE)]
    return Answer(
        top,
        number(r"^([\d.]+) ms per picture"),
        number(r"^\d+ pointwise layers +([\d.]+) ") / 1e3,
        number(r"^stem, depthwise and mean +([\d.]+) ") / 1e3,
    )


def check_logits(got: np.ndarray, want: np.ndarray) -> None:
    error = float(np.abs(got - want).max() / np.abs(want).max())
    if not error <= TOLERANCE:
        raise SystemExit(f"ONNX Runtime's logits are off by {error:.1e} of the largest one")
    print(f"ONNX Runtime's logits: off by {error:.1e} of the largest one", file=sys.stderr)


def check_top(answer: Answer, logits: np.ndarray, labels: list[str]) -> None:
    """The example's five likeliest classes and their probabilities."""
    exps = np.exp(logits - logits.max())
    probabilities = exps / exps.sum()
    best = labels[int(probabilities.argmax())]
    if len(answer.top) != 5 or answer.top[0][0] != best:
        raise SystemExit(f"classify printed {answer.top}, the likeliest class is {best}")
    for label, probability in answer.top:
        want = float(probabilities[labels.index(label)])
        if not math.isclose(probability, want, abs_tol=PROBABILITY):
            raise SystemExit(f"classify gives {label} {probability}, PyTorch {want:.4f}")


def children() -> float:
    """Seconds that ended child processes ran."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def compare(threads: int, args: argparse.Namespace) -> None:
    _, want = picture()
    labels = LABELS.read_text().splitlines()
    worker = Worker([sys.executable, __file__, SERVE], "onnxruntime", threads)
    times: list[float] = []
    turns, disturbed = 0, 0

    def watched(usage: Callable[[], float], turn: Callable[[], Any]) -> Any:
        """Takes a turn; `usage` is the time that its process ran on CPUs."""
        nonlocal turns, disturbed
        ran, ran_all, begin = usage(), busy(worker.cpus), time.monotonic()
        result = turn()
        foreign = busy(worker.cpus) - ran_all - (usage() - ran)
        turns += 1
        disturbed += is_disturbed(foreign, time.monotonic() - begin)
        return result

    answers: dict[str, list[Answer]] = {"nhwc": [], "nchw": []}
    try:
        worker.ask("load ", "ready")
        with tempfile.NamedTemporaryFile() as dst:
            worker.ask(f"result {dst.name}", "done")
            check_logits(np.fromfile(dst.name, np.float32), want[0])
        for _ in range(args.rounds):
            worker.settle()
            for layout, done in answers.items():
                turn = partial(example, args.binary, layout, threads, args.runs, worker.cpus)
                done.append(watched(children, turn))
                check_top(done[-1], want[0], labels)
            result = watched(worker.usage, partial(worker.time, args.seconds))
            times.append(result.median * 1e3)
    finally:
        worker.close()
    if disturbed:
        print(f"other processes disturbed {disturbed} of {turns} turns", file=sys.stderr)
    theirs = statistics.median(times)
    print(f"\n{count(threads)}, ms per picture")
    print(f"{'':24}{'median':>8}{'spread':>8}{'speed':>8}{'pointwise':>11}{'rest':>8}")
    spread = max(times) / min(times)
    print(f"{worker.version:24}{theirs:8.2f}{spread:8.2f}{1:8.2f}")
    for layout, done in answers.items():
        totals = [answer.median for answer in done]
        total = statistics.median(totals)
        parts = [
            statistics.median(values) for values in zip(*((a.pointwise, a.rest) for a in done))
        ]
        print(
            f"{f'classify, {layout}':24}{total:8.2f}{max(totals) / min(totals):8.2f}"
            f"{theirs / total:8.2f}{parts[0]:11.2f}{parts[1]:8.2f}"
        )


def main() -> None:
    if sys.argv[1:2] == [SERVE]:
        _, _, _, threads, _, _ = sys.argv
        serve_onnxruntime(int(threads))
        return
    parser = argparse.ArgumentParser(
        prog="benches/peers/classify", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("--threads", type=numbers, default=[1, 2], metavar="1,2", help="one after the other")
    add("--rounds", type=int, default=5, help="how often the three take turns [5]")
    add("--runs", type=int, default=40, help="of classify in a round [40]")
    add("--seconds", type=float, default=0.5, help="of ONNX Runtime in a round [0.5]")
    add("--binary", type=Path, required=True, help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        for threads in args.threads:
            compare(threads, args)
    except Failure as failure:
        raise SystemExit(f"error: {failure}") from failure


if __name__ == "__main__":
    main()
