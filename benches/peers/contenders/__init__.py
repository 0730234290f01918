"""Python libraries of the comparison, and what they are given and give back.

Each module has `contender(argument, threads, dtype)`: the layout, the version, and a function that makes
a `Loaded` of a layer and its files. A library is imported only in the process that runs it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from layer import Layer, Quantization

# The module of each contender, and its argument there.
CONTENDERS = {
    "litert": ("contenders.litert", "nhwc"),
    "openvino-nchw": ("contenders.openvino", "nchw"),
    "openvino-nhwc": ("contenders.openvino", "nhwc"),
    "onnxruntime": ("contenders.onnxruntime", "nchw"),
    "torch-onednn": ("contenders.torch", "onednn"),
    "torch-nchw": ("contenders.torch", "nchw"),
    "torch-nhwc": ("contenders.torch", "nhwc"),
    "torch-addmm": ("contenders.torch", "addmm"),
}

# Those that run layers of another type than f32.
OF_DTYPE = {
    "bf16": ("openvino-nchw", "openvino-nhwc", "torch-onednn", "torch-nchw", "torch-nhwc"),
    "int8": ("litert", "onnxruntime"),
}


@dataclass
class Loaded:
    """A layer that is ready: what is timed, and its result in the contender's layout.

    `keep` holds arrays whose memory the library reads without owning it.
    """

    call: Callable[[], object]
    dst: Callable[[], np.ndarray]
    keep: object = None


class Files:
    """The inputs of a layer, each a fresh array."""

    def __init__(self, layer: Layer, directory: Path, offset: int) -> None:
        self._layer, self._directory, self._offset = layer, directory, offset

    def buffer(self, shape: tuple[int, ...], dtype: type = np.float32) -> np.ndarray:
        """NaN (of integers all bits), `offset` bytes past a boundary of 64: nobody owes speed to
        malloc's choice."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        values = np.full(size + 128, 0xFF, np.uint8)
        start = -values.ctypes.data % 64 + self._offset
        return values[start : start + size].view(dtype).reshape(shape)

    def src(self, layout: str, dtype: type = np.float32) -> np.ndarray:
        src = self.buffer(self._layer.src_shape(layout), dtype)
        src[...] = self._read(f"src_{layout}").reshape(src.shape)
        return src

    def dst(self, layout: str, dtype: type = np.float32) -> np.ndarray:
        return self.buffer(self._layer.dst_shape(layout), dtype)

    def quantization(self) -> Quantization:
        """Of int8 only."""
        src_scale, src_zero, dst_scale, dst_zero, *weight = self._read("quantization")
        scales = np.array(weight, np.float32)
        return Quantization(src_scale, int(src_zero), dst_scale, int(dst_zero), scales)

    def weight(self) -> np.ndarray:
        """`[c_out, c_in / groups]`."""
        return self._read("weight").reshape(self._layer.c_out, -1)

    def bias(self) -> np.ndarray:
        return self._read("bias")

    def _read(self, name: str) -> np.ndarray:
        return np.fromfile(self._directory / f"{name}.f32", np.float32)
