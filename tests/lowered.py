"""Graphs whose weights are quantized, and what their codes stand for."""

import numpy as np
import onnx_ir as ir

from ffmerge.config import DTYPES, QuantizeConfig
from ffmerge.passes.graph.run import share_model

LOWER = [name for name in DTYPES if name not in ("fp32", "fp16")]
TWO = "(float[n,64] x) => (float[n,64] y) { h = MatMul(x, W) t = Relu(h) y = MatMul(t, W) }"
GEMMS = """(float[n,64] x) => (float[n,64] y) {
    h = Gemm<transB=1>(x, W, c) t = Relu(h) y = Gemm<transB=1>(t, W, c) }"""


def relative(got, expected):
    return np.abs(got - expected).max() / np.abs(expected).max()


def lower(model, precision, feeds=None, **settings):
    if precision == "int8-static":
        settings["calibration"] = [feeds]
    return share_model(model, dtype=precision, config=QuantizeConfig(**settings))


def array(model, name):
    return model.graph.initializers[name].const_value.numpy()


def nibbles(packed):
    """Return the values of bytes [..., n] as [..., 2n], the low half of each byte first."""
    return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)


def decoded(floats, packed):
    """Give the float graph the values that the packed graph's bytes stand for."""
    for name, value in floats.graph.initializers.items():
        scale = packed.graph.initializers.get(f"{name}/scale")
        if scale is None:
            continue
        # equal codes are one tensor: of a pair with opposite signs only the scales differ
        held = packed.graph.initializers.get(name) or scale.uses()[0].node.inputs[1]
        codes, shape = held.const_value.numpy(), value.const_value.numpy().shape
        if codes.dtype == np.int8:  # per channel of the first axis longer than one
            values = codes * array(packed, f"{name}/scale").reshape(
                -1, *[1] * (codes.ndim - 1 - (codes.shape[0] == 1))
            )
        else:
            width = scale.const_value.shape[1] * 32
            values = nibbles(codes).reshape(len(codes), -1, 32) - 8.0
            values = (values * array(packed, f"{name}/scale")[..., None]).reshape(-1, width)
            use = value.uses()[0].node
            straight = use.op_type == "Gather" or use.attributes.get_int("transB", 0)
            values = values[:, : shape[1]] if straight else values[:, : shape[0]].T
        value.const_value = ir.Tensor(np.ascontiguousarray(values.reshape(shape), dtype="f"))
    return floats
