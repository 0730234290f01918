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


def contender(layout: str, threads: int):
    core = ov.Core()
    config = {
        "INFERENCE_NUM_THREADS": threads,
        # It would choose bf16 by itself where the CPU has it.
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        # Threads stay where the driver puts the process, as everybody's.
        "ENABLE_CPU_PINNING": False,
    }

    def load(layer: Layer, files: Files) -> Loaded:
        compiled = core.compile_model(
            model(layer, layout, files.weight(), files.bias()), "CPU", config
        )
        src, dst = files.src(layout), files.dst(layout)
        request = compiled.create_infer_request()
        request.set_input_tensor(ov.Tensor(src, shared_memory=True))
        request.set_output_tensor(ov.Tensor(dst, shared_memory=True))

        def call() -> None:
            # Without sharing, every call would copy the result once more.
            request.infer(share_outputs=True)

        return Loaded(call, lambda: dst, keep=src)

    return layout, f"openvino {ov.__version__.split('-')[0]}", load


def model(layer: Layer, layout: str, weight: np.ndarray, bias: np.ndarray) -> ov.Model:
    src = ops.parameter(layer.src_shape(layout), np.float32)
    x = src if layout == "nchw" else ops.transpose(src, [0, 3, 1, 2])
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
    return ov.Model([x], [src])
