"""ONNX Runtime's CPU provider. NCHW; its wheel has no XNNPACK."""

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from contenders import Files, Loaded
from layer import Layer, Quantization


def contender(layout: str, threads: int, dtype: str):
    def load(layer: Layer, files: Files) -> Loaded:
        weight, bias = files.weight(), files.bias()
        if dtype == "int8":
            opened = session(quantized(layer, weight, bias, files.quantization()), threads)
            src, dst = files.src(layout, np.uint8), files.dst(layout, np.uint8)
        else:
            opened = session(model(layer, weight, bias), threads)
            src, dst = files.src(layout), files.dst(layout)
        return Loaded(bound(opened, src, dst), lambda: dst, keep=src)

    return layout, f"onnxruntime {ort.__version__}", load


def session(model: onnx.ModelProto, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def bound(opened: ort.InferenceSession, src: np.ndarray, dst: np.ndarray):
    """A call that reads and writes these arrays in place, which must outlive it."""
    binding = opened.io_binding()
    binding.bind_input("src", "cpu", 0, src.dtype, src.shape, src.ctypes.data)
    binding.bind_output("dst", "cpu", 0, dst.dtype, dst.shape, dst.ctypes.data)
    return lambda: opened.run_with_iobinding(binding)


def model(layer: Layer, weight: np.ndarray, bias: np.ndarray) -> onnx.ModelProto:
    relu = layer.act == "relu"
    conv = helper.make_node(
        "Conv",
        ["src", "weight", "bias"],
        ["conv" if relu else "dst"],
        kernel_shape=[1, 1],
        strides=[layer.stride] * 2,
        group=layer.groups,
    )
    nodes = [conv] + ([helper.make_node("Relu", ["conv"], ["dst"])] if relu else [])
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "layer",
        [value("src", TensorProto.FLOAT, layer.src_shape("nchw"))],
        [value("dst", TensorProto.FLOAT, layer.dst_shape("nchw"))],
        [
            numpy_helper.from_array(weight[:, :, None, None], "weight"),
            numpy_helper.from_array(bias, "bias"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def quantized(
    layer: Layer, weight: np.ndarray, bias: np.ndarray, q: Quantization
) -> onnx.ModelProto:
    """QLinearConv: dst's zero point makes a ReLU of its saturation."""
    constants = {
        "src_scale": q.src_scale,
        "src_zero": np.uint8(q.src_zero),
        "weight": weight[:, :, None, None].astype(np.int8),
        "weight_scale": q.weight_scale,
        "weight_zero": np.zeros(layer.c_out, np.int8),
        "dst_scale": q.dst_scale,
        "dst_zero": np.uint8(q.dst_zero),
        "bias": bias.astype(np.int32),
    }
    conv = helper.make_node(
        "QLinearConv",
        ["src", *constants],
        ["dst"],
        kernel_shape=[1, 1],
        strides=[layer.stride] * 2,
        group=layer.groups,
    )
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [conv],
        "layer",
        [value("src", TensorProto.UINT8, layer.src_shape("nchw"))],
        [value("dst", TensorProto.UINT8, layer.dst_shape("nchw"))],
        [numpy_helper.from_array(np.asarray(x), name) for name, x in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
