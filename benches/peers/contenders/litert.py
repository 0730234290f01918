"""LiteRT (TensorFlow Lite), whose default CPU path is XNNPACK. NHWC.

The model, one CONV_2D, is written with the flatbuffer schema that LiteRT ships: what TensorFlow's
converter makes of the same layer, without TensorFlow.
"""

from importlib.metadata import version

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

from contenders import Files, Loaded
from layer import Layer, Quantization


def contender(layout: str, threads: int, dtype: str):
    int8 = dtype == "int8"

    def load(layer: Layer, files: Files) -> Loaded:
        content = model(layer, files.weight(), files.bias(), files.quantization() if int8 else None)
        interpreter = Interpreter(model_content=content, num_threads=threads)
        interpreter.allocate_tensors()
        # A node of XNNPACK's, the only delegate that is there by default, follows those it took.
        nodes = [op["op_name"] for op in interpreter._get_ops_details()]
        if nodes != ["CONV_2D", "DELEGATE"]:
            raise RuntimeError(f"XNNPACK did not take the convolution: nodes {nodes}")
        src = interpreter.get_input_details()[0]["index"]
        dst = interpreter.get_output_details()[0]["index"]
        # The tensors live in the interpreter; its user writes and reads them in place.
        values = files.src(layout)
        interpreter.set_tensor(src, (values - 128).astype(np.int8) if int8 else values)
        shift = np.float32(128 if int8 else 0)
        return Loaded(interpreter.invoke, lambda: interpreter.get_tensor(dst) + shift)

    return layout, f"ai-edge-litert {version('ai-edge-litert')}", load


def model(
    layer: Layer, weight: np.ndarray, bias: np.ndarray, quantization: Quantization | None
) -> bytes:
    """A .tflite file: `dst = act(conv(src, weight) + bias)`, of signed bytes if it is quantized."""
    float32, int8, int32 = (getattr(schema.TensorType, n) for n in ("FLOAT32", "INT8", "INT32"))
    types = dict(src=float32, weight=float32, bias=float32, dst=float32)
    scales: dict[str, tuple[list[float], int]] = {}
    if q := quantization:
        types = dict(src=int8, weight=int8, bias=int32, dst=int8)
        weight, bias = weight.astype(np.int8), bias.astype(np.int32)
        scales = dict(
            src=([float(q.src_scale)], q.src_zero - 128),
            weight=(q.weight_scale.tolist(), 0),
            bias=((q.src_scale * q.weight_scale).tolist(), 0),
            dst=([float(q.dst_scale)], q.dst_zero - 128),
        )

    def tensor(name: str, shape: tuple[int, ...], buffer: int):
        made = schema.TensorT(shape=list(shape), type=types[name], buffer=buffer, name=name)
        if name in scales:
            scale, zero = scales[name]
            made.quantization = schema.QuantizationParametersT(
                scale=scale, zeroPoint=[zero] * len(scale), quantizedDimension=0
            )
        return made

    relu = schema.ActivationFunctionType.RELU
    options = schema.Conv2DOptionsT(
        padding=schema.Padding.VALID,
        strideH=layer.stride,
        strideW=layer.stride,
        fusedActivationFunction=relu if layer.act == "relu" else 0,
    )
    operator = schema.OperatorT(
        opcodeIndex=0,
        inputs=[0, 1, 2],
        outputs=[3],
        builtinOptionsType=schema.BuiltinOptions.Conv2DOptions,
        builtinOptions=options,
    )
    graph = schema.SubGraphT(
        tensors=[
            tensor("src", layer.src_shape("nhwc"), 0),
            tensor("weight", (layer.c_out, 1, 1, weight.shape[1]), 1),
            tensor("bias", bias.shape, 2),
            tensor("dst", layer.dst_shape("nhwc"), 0),
        ],
        inputs=[0],
        outputs=[3],
        operators=[operator],
    )
    code = schema.BuiltinOperator.CONV_2D
    root = schema.ModelT(
        version=3,
        operatorCodes=[schema.OperatorCodeT(deprecatedBuiltinCode=code, builtinCode=code)],
        subgraphs=[graph],
        # Buffer 0 is that of tensors without constant data.
        buffers=[
            schema.BufferT(),
            schema.BufferT(data=weight.reshape(-1).view(np.uint8)),
            schema.BufferT(data=bias.view(np.uint8)),
        ],
    )
    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(root.Pack(builder), b"TFL3")
    return bytes(builder.Output())
