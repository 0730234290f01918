"""PyTorch, in four ways.

onednn  the fused, prepacked op that torch.compile emits when it freezes a model; channels last
nchw    conv2d, then an in-place ReLU
nhwc    the same on channels-last tensors
addmm   the matrix product by hand (MKL), then an in-place ReLU; NCHW
"""

import torch

from contenders import Files, Loaded
from layer import Layer


def contender(way: str, threads: int, dtype: str):
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    layout = "nhwc" if way in ("onednn", "nhwc") else "nchw"

    def load(layer: Layer, files: Files) -> Loaded:
        given = torch.from_numpy(files.src(layout)), *map(torch.from_numpy, (files.weight(), files.bias()))
        src, weight, bias = (x.to(torch.bfloat16) if dtype == "bf16" else x for x in given)
        if layout == "nhwc":
            src = src.permute(0, 3, 1, 2)
            assert src.is_contiguous(memory_format=torch.channels_last)
        call = {"onednn": fused, "nchw": eager, "nhwc": eager, "addmm": product}[way](
            layer, src, weight, bias, torch.from_numpy(files.dst(layout))
        )

        def dst():
            result = call()
            result = result.permute(0, 2, 3, 1) if layout == "nhwc" else result
            return result.float().numpy()

        return Loaded(call, dst)

    return layout, f"torch {torch.__version__}", load


def fused(layer: Layer, src, weight, bias, _):
    strides, zeros, ones = [layer.stride] * 2, [0, 0], [1, 1]
    packed = torch.ops.mkldnn._reorder_convolution_weight(
        weight[:, :, None, None], zeros, strides, ones, layer.groups, list(src.shape)
    )
    act = layer.act
    op = torch.ops.mkldnn._convolution_pointwise.default
    return lambda: op(src, packed, bias, zeros, strides, ones, layer.groups, act, [], None)


def eager(layer: Layer, src, weight, bias, _):
    weight = weight[:, :, None, None]
    if not src.is_contiguous():
        weight = weight.contiguous(memory_format=torch.channels_last)
    conv, relu_, stride, groups = torch.conv2d, torch.relu_, layer.stride, layer.groups
    if layer.act == "relu":
        return lambda: relu_(conv(src, weight, bias, stride, 0, 1, groups))
    return lambda: conv(src, weight, bias, stride, 0, 1, groups)


def product(layer: Layer, src, weight, bias, dst):
    """One product per sample and group: addmm for one of them, baddbmm for more."""
    n, groups, stride = layer.n, layer.groups, layer.stride
    h, w = layer.out
    rows = weight.reshape(groups, -1, weight.shape[1])
    _, m, k = rows.shape
    left = rows.expand(n, groups, m, k).reshape(n * groups, m, k)
    offsets = bias.reshape(groups, m, 1).expand(n, groups, m, 1).reshape(n * groups, m, 1)
    out = dst.view(n * groups, m, h * w)
    if n * groups == 1:
        left, offsets, out, multiply = left[0], offsets[0], out[0], torch.addmm
    else:
        multiply = torch.baddbmm
    kept = src[:, :, ::stride, ::stride]
    gathered = torch.empty(kept.shape) if stride > 1 else src
    right = gathered.view(out.shape[:-2] + (k, h * w))
    relu = layer.act == "relu"

    def call():
        if stride > 1:
            gathered.copy_(kept)
        multiply(offsets, left, right, out=out)
        if relu:
            out.relu_()
        return dst

    return call
