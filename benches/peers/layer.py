"""A row of the layers file, the inputs that all contenders share, and what they must compute."""

import csv
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

ACTIVATIONS = ("relu", "none")


@dataclass(frozen=True)
class Layer:
    """A 1x1 convolution with bias, then ReLU or nothing."""

    model: str
    name: str
    n: int
    c_in: int
    c_out: int
    h: int
    w: int
    stride: int
    groups: int
    act: str

    @property
    def out(self) -> tuple[int, int]:
        """Height and width of dst."""
        return -(-self.h // self.stride), -(-self.w // self.stride)

    @property
    def flops(self) -> int:
        """Two per multiplication of the convolution; bias and ReLU do not count."""
        h, w = self.out
        return 2 * self.n * h * w * self.c_out * self.c_in // self.groups

    def src_shape(self, layout: str) -> tuple[int, int, int, int]:
        if layout == "nchw":
            return self.n, self.c_in, self.h, self.w
        return self.n, self.h, self.w, self.c_in

    def dst_shape(self, layout: str) -> tuple[int, int, int, int]:
        h, w = self.out
        return (self.n, self.c_out, h, w) if layout == "nchw" else (self.n, h, w, self.c_out)

    def request(self) -> str:
        """The layer as a worker reads it."""
        return (
            f"{self.n} {self.c_in} {self.c_out} {self.h} {self.w} {self.stride} {self.groups} "
            f"{self.act}"
        )

    @staticmethod
    def from_request(text: str) -> "Layer":
        *sizes, act = text.split(" ")
        return Layer("", "", *map(int, sizes), act)


def read(path: Path, only: str, batch: int | None) -> list[Layer]:
    """The layers whose line contains `only`, with `batch` instead of their own n if given."""
    layers = []
    with path.open() as file:
        for row in csv.DictReader(file):
            if only not in ",".join(row.values()):
                continue
            try:
                sizes = [int(row[c]) for c in ("n", "cin", "cout", "h", "w", "stride", "groups")]
                layer = Layer(row["model"], row["layer"], *sizes, row["act"])
            except (KeyError, ValueError) as error:
                raise SystemExit(f"{path}: {row} is not a layer: {error!r}") from error
            if layer.act not in ACTIVATIONS:
                raise SystemExit(f"{path}: act is {layer.act!r}, expected one of {ACTIVATIONS}")
            layers.append(replace(layer, n=batch) if batch else layer)
    if not layers:
        raise SystemExit(f"{path}: no layer contains {only!r}")
    return layers


@dataclass(frozen=True)
class Inputs:
    """`src [n, c_in, h, w]`, `weight [c_out, c_in / groups]`, `bias [c_out]`, all float32."""

    src: np.ndarray
    weight: np.ndarray
    bias: np.ndarray


def inputs(layer: Layer) -> Inputs:
    """Seeded; scaled so that results are of the order of one, about half of them below zero."""
    rng = np.random.default_rng(1)
    depth = layer.c_in // layer.groups
    src = rng.standard_normal(layer.src_shape("nchw"), np.float32)
    weight = rng.standard_normal((layer.c_out, depth), np.float32) / np.float32(depth**0.5)
    return Inputs(src, weight, rng.standard_normal(layer.c_out, np.float32))


def expected(layer: Layer, given: Inputs) -> np.ndarray:
    """`dst [n, c_out, h', w']` in float64, as the definition says it."""
    src = given.src[:, :, :: layer.stride, :: layer.stride].astype(np.float64)
    h, w = layer.out
    src = src.reshape(layer.n, layer.groups, -1, h * w)
    weight = given.weight.astype(np.float64).reshape(layer.groups, -1, src.shape[2])
    dst = (weight @ src).reshape(layer.n, layer.c_out, h, w)
    dst += given.bias.astype(np.float64)[:, None, None]
    return np.maximum(dst, 0.0) if layer.act == "relu" else dst


def error(got: np.ndarray, layout: str, want: np.ndarray) -> float:
    """The largest error of `got`, in units of the largest value wanted; NaN counts as infinite."""
    if layout == "nhwc":
        got = got.transpose(0, 3, 1, 2)
    largest = np.abs(got - want).max() / np.abs(want).max()
    return float(largest) if np.isfinite(largest) else float("inf")


# float32 sums of 2000 products stay an order of magnitude under this; bf16, TF32 or a wrong
# element are far above it.
TOLERANCE = 1e-5


def write_inputs(layer: Layer, given: Inputs, directory: Path) -> None:
    """The files that workers read, little-endian float32."""
    given.src.tofile(directory / "src_nchw.f32")
    np.ascontiguousarray(given.src.transpose(0, 2, 3, 1)).tofile(directory / "src_nhwc.f32")
    given.weight.tofile(directory / "weight.f32")
    given.bias.tofile(directory / "bias.f32")
