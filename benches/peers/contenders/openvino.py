"""OpenVINO's CPU plugin, fed NCHW or NHWC.

In the NHWC model a transposition stands before and after the convolution; the plugin turns both
into the layout in which it runs the convolution, so that nothing is moved.
"""

import sys

import numpy as np

# Its import would report usage over the network, in a process of its own that can outlive this one.
# openvino does without where the package is missing.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]

import openvino as ov
from openvino import opset13 as ops

from contenders import Files, Loaded
from layer import Layer


def contender(layout: str, threads: int, dtype: str):
    core = ov.Core()
    config = {
        "INFERENCE_NUM_THREADS": threads,
        # It would choose bf16 by itself where the CPU has it.
        "INFERENCE_PRECISION_HINT": dtype,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        # Threads stay where the driver puts the process, as everybody's.
        "ENABLE_CPU_PINNING": False,
    }

    def load(layer: Layer, files: Files) -> Loaded:
        described = model(layer, layout, files.weight(), files.bias(), dtype)
        compiled = core.compile_model(described, "CPU", config)
        request = compiled.create_infer_request()
        if dtype == "bf16":
            # NumPy has no such type: its bits.
            src, dst = files.buffer(layer.src_shape(layout), np.uint16), files.dst(layout, np.uint16)
            src[...] = files.src(layout).view(np.uint32) >> 16
            tensors = [ov.Tensor(x, x.shape, ov.Type.bf16) for x in (src, dst)]
        else:
            src, dst = files.src(layout), files.dst(layout)
            tensors = [ov.Tensor(x, shared_memory=True) for x in (src, dst)]
        request.set_input_tensor(tensors[0])
        request.set_output_tensor(tensors[1])

        def call() -> None:
            # Without sharing, every call would copy the result once more.
            request.infer(share_outputs=True)

        def result() -> np.ndarray:
            if dtype == "bf16":
                return (dst.astype(np.uint32) << 16).view(np.float32)
            return dst

        return Loaded(call, result, keep=(src, tensors))

    return layout, f"openvino {ov.__version__.split('-')[0]}", load


def model(
    layer: Layer, layout: str, weight: np.ndarray, bias: np.ndarray, dtype: str
) -> ov.Model:
    src = ops.parameter(layer.src_shape(layout), getattr(ov.Type, dtype))
    # Under its precision hint the plugin runs what is f32 in the model in bf16.
    x = ops.convert(src, "f32") if dtype == "bf16" else src
    x = x if layout == "nchw" else ops.transpose(x, [0, 3, 1, 2])
    strides, zeros, ones = [layer.stride] * 2, [0, 0], [1, 1]
    if layer.groups == 1:
        weight = weight[:, :, None, None]
        x = ops.convolution(x, weight, strides, zeros, zeros, ones)
    else:
        weight = weight.reshape(layer.groups, -1, weight.shape[1], 1, 1)
        x = ops.group_convolution(x, weight, strides, zeros, zeros, ones)
    x = ops.add(x, bias[None, :, None, None])
    if layer.act == "relu":
        x = ops.relu(x)
    if layout == "nhwc":
        x = ops.transpose(x, [0, 2, 3, 1])
    if dtype == "bf16":
        x = ops.convert(x, "bf16")
    return ov.Model([x], [src])
