"""Small ONNX classifiers as other tools write them, made from text and random weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser

SIZE = (3, 8, 8)
#: An SE network as PaddlePaddle writes it: every weight in a Constant node, biases added on their own, spelled-out
#: hard-swish, HardSigmoid of slope 0.2, one image at a time, probabilities at the end.
PADDLE = """
a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, stem_weights)
b = BatchNormalization (a, stem_bn_scale, stem_bn_offset, stem_bn_mean, stem_bn_variance)
c = Add (b, three)
d = Clip (c, zero, six)
e = Mul (b, d)
u = Div (e, six)
f = GlobalAveragePool (u)
g = Conv <kernel_shape = [1, 1]> (f, se_1_weights)
h = Reshape (se_1_offset, shape_2)
i = Add (g, h)
j = Relu (i)
k = Conv <kernel_shape = [1, 1]> (j, se_2_weights)
l = Reshape (se_2_offset, shape_6)
m = Add (k, l)
s = HardSigmoid <alpha = 0.2, beta = 0.5> (m)
v = Mul (u, s)
n = Conv <kernel_shape = [1, 1]> (v, last_weights)
o = Relu (n)
p = GlobalAveragePool (o)
q = Reshape (p, shape_out)
r = MatMul (q, fc_weights)
t = Add (r, fc_offset)
y = Softmax <axis = 1> (t)
"""


def paddle_values() -> dict[str, np.ndarray[Any, Any]]:
    """Return the weights and constants of `PADDLE`."""
    rng = np.random.default_rng(0)
    shapes = {
        "stem_weights": (6, 3, 3, 3), "stem_bn_scale": (6,), "stem_bn_offset": (6,), "stem_bn_mean": (6,),
        "stem_bn_variance": (6,), "se_1_weights": (2, 6, 1, 1), "se_1_offset": (2,), "se_2_weights": (6, 2, 1, 1),
        "se_2_offset": (6,), "last_weights": (5, 6, 1, 1), "fc_weights": (5, 4), "fc_offset": (4,),
    }  # fmt: skip
    values = {name: rng.normal(0, 0.6, shape).astype(np.float32) for name, shape in shapes.items()}
    values["stem_bn_variance"] = np.abs(values["stem_bn_variance"]) + 0.5
    values |= {name: np.float32(v) for name, v in (("zero", 0), ("three", 3), ("six", 6))}
    shapes_ = {"shape_2": [1, 2, 1, 1], "shape_6": [1, 6, 1, 1], "shape_out": [1, 5]}
    return values | {name: np.array(v, np.int64) for name, v in shapes_.items()}


def model(
    body: str,
    values: Mapping[str, Any],
    *,
    inputs: str = "float[N,3,8,8] x",
    outputs: str = "float[N,K] y",
    opset: int = 13,
    in_nodes: bool = False,
) -> onnx.ModelProto:
    """Return a model of nodes in onnx's text form, with its constants as initializers or in Constant nodes."""
    text = f'<ir_version: 8, opset_import: ["": {opset}]> g ({inputs}) => ({outputs}) {{ {body} }}'
    result = onnx.parser.parse_model(text)
    tensors = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]
    if in_nodes:
        nodes = [onnx.helper.make_node("Constant", [], [t.name], value=t) for t in tensors]
        kept = list(result.graph.node)
        del result.graph.node[:]
        result.graph.node.extend([*nodes, *kept])
    else:
        result.graph.initializer.extend(tensors)
    return result


def paddle(body: str = PADDLE, **changes: Any) -> onnx.ModelProto:
    """Return the network of `PADDLE`, with other values or options where they are given."""
    options = {"inputs": "float[1,3,8,8] x", "outputs": "float[1,4] y", "opset": 11, "in_nodes": True}
    names = {name: changes.pop(name) for name in list(changes) if name not in options}
    return model(body, {**paddle_values(), **names}, **{**options, **changes})


def save(folder: Path, proto: onnx.ModelProto, name: str = "net.onnx") -> Path:
    """Write a model and return its path."""
    path = folder / name
    path.write_bytes(proto.SerializeToString())
    return path
