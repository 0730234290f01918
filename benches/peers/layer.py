"""A row of the layers file, the inputs that all contenders share, and what they must compute."""

import csv
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

ACTIVATIONS = ("relu", "none")
DTYPES = ("f32", "bf16", "int8")


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
class Quantization:
    """What integers stand for: `scale * (q - zero)`. Those of src and dst are bytes from 0 to 255; of
    dst after a ReLU, zero is 0, so that the ReLU is the saturation."""

    src_scale: np.float32
    src_zero: int
    dst_scale: np.float32
    dst_zero: int
    weight_scale: np.ndarray


@dataclass(frozen=True)
class Inputs:
    """`src [n, c_in, h, w]`, `weight [c_out, c_in / groups]`, `bias [c_out]`, all float32: values that
    the dtype holds, or integers (weights from -127 to 127) where there is a quantization."""

    src: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    quantization: Quantization | None = None


def inputs(layer: Layer, dtype: str = "f32") -> Inputs:
    """Seeded; scaled so that results are of the order of one, about half of them below zero."""
    rng = np.random.default_rng(1)
    depth = layer.c_in // layer.groups
    src = rng.standard_normal(layer.src_shape("nchw"), np.float32)
    weight = rng.standard_normal((layer.c_out, depth), np.float32) / np.float32(depth**0.5)
    bias = rng.standard_normal(layer.c_out, np.float32)
    if dtype == "bf16":
        return Inputs(*map(to_bf16, (src, weight, bias)))
    given = Inputs(src, weight, bias)
    return quantized(layer, given) if dtype == "int8" else given


def to_bf16(x: np.ndarray) -> np.ndarray:
    """The nearest values of bf16, ties to even, as float32."""
    bits = x.view(np.uint32)
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return bits.astype(np.uint32).view(np.float32)


def quantized(layer: Layer, given: Inputs) -> Inputs:
    """The same layer in integers: ranges from the least to the greatest value."""

    def of_range(x: np.ndarray) -> tuple[np.float32, int]:
        low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
        scale = np.float32((high - low) / 255)
        return scale, int(np.rint(-low / scale))

    src_scale, src_zero = of_range(given.src)
    dst_scale, dst_zero = of_range(expected(layer, given))
    weight_scale = (np.abs(given.weight).max(axis=1) / 127).astype(np.float32)
    return Inputs(
        np.clip(np.rint(given.src / src_scale) + src_zero, 0, 255).astype(np.float32),
        np.rint(given.weight / weight_scale[:, None]).astype(np.float32),
        np.rint(given.bias / (src_scale * weight_scale)).astype(np.float32),
        Quantization(src_scale, src_zero, dst_scale, dst_zero, weight_scale),
    )


def expected(layer: Layer, given: Inputs) -> np.ndarray:
    """`dst [n, c_out, h', w']` in float64, as the definition says it."""
    if q := given.quantization:
        # Sums of integers are exact in float64.
        integers = replace(given, src=given.src - np.float32(q.src_zero), quantization=None)
        sums = expected(replace(layer, act="none"), integers).astype(np.float32)
        steps = sums * (q.src_scale * q.weight_scale / q.dst_scale)[:, None, None]
        return np.clip(np.rint(steps) + q.dst_zero, 0, 255).astype(np.float64)
    src = given.src[:, :, :: layer.stride, :: layer.stride].astype(np.float64)
    h, w = layer.out
    src = src.reshape(layer.n, layer.groups, -1, h * w)
    weight = given.weight.astype(np.float64).reshape(layer.groups, -1, src.shape[2])
    dst = (weight @ src).reshape(layer.n, layer.c_out, h, w)
    dst += given.bias.astype(np.float64)[:, None, None]
    return np.maximum(dst, 0.0) if layer.act == "relu" else dst


def error(got: np.ndarray, layout: str, want: np.ndarray, dtype: str = "f32") -> float:
    """The largest error of `got`, in units of the largest value wanted, or of a step of integers (or of the
    share of them that may be off, whichever is worse); NaN counts as infinite."""
    if layout == "nhwc":
        got = got.transpose(0, 3, 1, 2)
    off = np.abs(got - want)
    unit = 1.0 if dtype == "int8" else np.abs(want).max()
    largest = off.max() / unit
    if dtype == "int8":
        # A result that is off by a step everywhere is wrong too.
        largest = max(largest, np.mean(off != 0) / MOST_STEPS_OFF)
    return float(largest) if np.isfinite(largest) else float("inf")


# The share of integers that may be neighbours of what is wanted: fixed-point multipliers have 31 bits, and
# f32 scales 24.
MOST_STEPS_OFF = 0.01


# float32 sums of 2000 products stay an order of magnitude under the first; bf16, TF32 or a wrong
# element are far above it. The second is one rounding to bf16. Integers may be the neighbours of what is
# wanted: libraries multiply by the scales in different ways.
TOLERANCE = {"f32": 1e-5, "bf16": 2.0**-8, "int8": 1.0}


def write_inputs(layer: Layer, given: Inputs, directory: Path) -> None:
    """The files that workers read, little-endian float32."""
    given.src.tofile(directory / "src_nchw.f32")
    np.ascontiguousarray(given.src.transpose(0, 2, 3, 1)).tofile(directory / "src_nhwc.f32")
    given.weight.tofile(directory / "weight.f32")
    given.bias.tofile(directory / "bias.f32")
    if q := given.quantization:
        scales = [q.src_scale, q.src_zero, q.dst_scale, q.dst_zero, *q.weight_scale]
        np.array(scales, np.float32).tofile(directory / "quantization.f32")
