"""The operators of classifiers, each as steps. What the comparison with onnxruntime would find, is not checked here.

Shapes: N images, C channels, H×W positions, I and O inputs and outputs of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from se_prune.onnx_file.converting import Builder, Convert, Node, UnreadError
from se_prune.zoo.steps import Value

if TYPE_CHECKING:
    from numpy.typing import NDArray

FLOAT = 1


def _conv(b: Builder, node: Node) -> None:
    weight, x = node.weights(1), node.map()
    rank = weight.ndim - 2
    if rank not in {1, 2} or len(b.shape(x)) != weight.ndim:
        raise UnreadError(f"it has {rank} axes of positions, and 1 or 2 are read")
    kernel, groups = weight.shape[2:], int(node.number("group", 1))
    stride, dilation = node.ints("strides", [1] * rank), node.ints("dilations", [1] * rank)
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    before, after = _pads(node, b.shape(x)[2:], reach, stride)
    if before != after:
        pairs = [v for pair in reversed(list(zip(before, after, strict=True))) for v in pair]
        x = b.add(node, "pad", [x], {"pads": tuple(pairs), "value": 0.0}, passing=True)
        before = (0,) * rank
    tensors = {"weight": weight}
    if node.has(2):
        tensors["bias"] = node.weights(2)
    args = {
        "rank": rank,
        "in_channels": weight.shape[1] * groups,
        "out_channels": weight.shape[0],
        "kernel_size": tuple(kernel),
        "stride": stride,
        "padding": before,
        "dilation": dilation,
        "groups": groups,
        "bias": node.has(2),
    }
    b.add(node, "conv", [x], args, named=node.proto.input[1], weights=tensors)


def _pads(
    node: Node, positions: Sequence[int], reach: Sequence[int], stride: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the padding before and after every axis of positions."""
    rank, rule = len(reach), node.attributes.get("auto_pad", b"NOTSET").decode()
    if rule in {"SAME_UPPER", "SAME_LOWER"}:
        sizes = zip(positions, reach, stride, strict=True)
        total = [max(0, (-(-p // s) - 1) * s + r - p) for p, r, s in sizes]
        small, large = tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)
        return (small, large) if rule == "SAME_UPPER" else (large, small)
    pads = node.ints("pads", [0] * 2 * rank) if rule == "NOTSET" else (0,) * 2 * rank
    if len(pads) != 2 * rank:
        raise UnreadError(f"it has {len(pads)} pads for {rank} axes")
    return pads[:rank], pads[rank:]


def _norm(b: Builder, node: Node) -> None:
    if node.attributes.get("training_mode"):
        raise UnreadError("it is in training mode; export the network in eval mode")
    scale, bias, mean, variance = (node.weights(i) for i in range(1, 5))
    args = {
        "rank": len(b.shape(node.map())) - 2,
        "channels": scale.size,
        "eps": node.number("epsilon", 1e-5),
        "momentum": round(1 - node.number("momentum", 0.9), 6),
    }
    tensors = {"weight": scale, "bias": bias, "running_mean": mean, "running_var": variance}
    b.add(node, "norm", [node.map()], args, named=node.proto.input[1], weights=tensors)


def _linear(b: Builder, node: Node, weight: NDArray[Any], bias: NDArray[Any] | None) -> None:
    """Add a fully connected layer with a weight (O, I)."""
    if len(b.shape(node.map())) != 2 or weight.ndim != 2:
        raise UnreadError(f"it multiplies {b.shape(node.map())} by {weight.shape}, not (N, I) by a matrix")
    tensors = {"weight": weight}
    if bias is not None:
        tensors["bias"] = np.broadcast_to(bias, (1, weight.shape[0]))[0].copy()
    args = {"inputs": weight.shape[1], "outputs": weight.shape[0], "bias": bias is not None}
    b.add(node, "linear", [node.map()], args, named=node.proto.input[1], weights=tensors)


def _gemm(b: Builder, node: Node) -> None:
    if node.attributes.get("transA"):
        raise UnreadError("it transposes the images")
    weight = node.weights(1) if node.attributes.get("transB") else node.weights(1).T
    alpha, beta = node.number("alpha", 1), node.number("beta", 1)
    bias = node.weights(2) if node.has(2) else None
    _linear(
        b, node, weight if alpha == 1 else weight * alpha, bias if bias is None or beta == 1 else bias * beta
    )


def _matmul(b: Builder, node: Node) -> None:
    _linear(b, node, node.weights(1).T, None)


def _elementwise(op: str) -> Convert:
    def convert(b: Builder, node: Node) -> None:
        constants = [node.constant(0), node.constant(1)]
        if constants[0] is None and constants[1] is None:
            b.add(node, op, [node.map(0), node.map(1)])
            return
        index = 0 if constants[0] is None else 1
        value = constants[1 - index]
        assert value is not None
        _with_constant(b, node, op, index, value)

    return convert


def _with_constant(b: Builder, node: Node, op: str, index: int, value: NDArray[Any]) -> None:
    """Add what a map (input `index`) and a constant make."""
    x, swapped = node.map(index), index == 1
    if op == "div" and swapped:
        raise UnreadError("it divides a constant by a map")
    if op == "sub" and swapped:
        x = b.add(node, "mul_by", [x], {"value": -1.0}, passing=True)
    if value.size == 1 and value.ndim <= len(b.shape(x)):
        number = float(value.ravel()[0])
        kind, number = {
            "add": ("add_by", number),
            "sub": ("add_by", number if swapped else -number),
            "mul": ("mul_by", number),
            "div": ("div_by", number),
        }[op]
        b.add(node, kind, [x], {"value": number})
        return
    vector = _per_channel(value, b.shape(x))
    if op in {"add", "sub"}:
        shift = -vector if op == "sub" and not swapped else vector
        if b.with_bias(node, x, shift, node.proto.input[index]):
            return
        scale = np.ones_like(vector)
    else:
        scale, shift = (vector if op == "mul" else 1 / vector), None
    _scaled(b, node, x, scale, shift)


def _per_channel(value: NDArray[Any], shape: Sequence[int]) -> NDArray[Any]:
    """Return a constant that has one value per channel as (C,)."""
    full = (1,) * (len(shape) - value.ndim) + value.shape
    if len(full) != len(shape) or full[1] != shape[1] or value.size != shape[1]:
        raise UnreadError(f"a constant of shape {value.shape} is no number and has not one value per channel")
    return value.reshape(-1)


def _scaled(b: Builder, node: Node, x: str, scale: NDArray[Any], shift: NDArray[Any] | None) -> None:
    """Scale and shift every channel by its own number: a depthwise 1×1 convolution, whose channels can leave."""
    if len(b.shape(x)) != 4:
        raise UnreadError("a constant per channel is read on maps (N, C, H, W) alone")
    channels = scale.size
    tensors = {"weight": scale} | ({} if shift is None else {"bias": shift})
    args: dict[str, Value] = {
        "rank": 2,
        "in_channels": channels,
        "out_channels": channels,
        "kernel_size": (1, 1),
        "groups": channels,
        "bias": shift is not None,
    }
    b.add(node, "conv", [x], args, weights=tensors)


def _plain(op: str, **defaults: float) -> Convert:
    """Return the converter of an operator on one map whose attributes are numbers."""

    def convert(b: Builder, node: Node) -> None:
        args = {name: node.number(name, value) for name, value in defaults.items()}
        b.add(node, op, [node.map()], args)

    return convert


def _clip(b: Builder, node: Node) -> None:
    args: dict[str, Any] = {}
    for index, (name, old) in enumerate((("low", "min"), ("high", "max")), start=1):
        bound = float(node.weights(index).ravel()[0]) if node.has(index) else node.number(old, math.inf)
        if math.isfinite(bound) and abs(bound) < 3e38:
            args[name] = bound
    if args:
        b.add(node, "clamp", [node.map()], args)
    else:
        b.alias(node, node.map())


def _softmax(op: str) -> Convert:
    def convert(b: Builder, node: Node) -> None:
        rank = len(b.shape(node.map()))
        axis = int(node.number("axis", -1 if b.graph.opset >= 13 else 1)) % rank
        if rank == 2 and axis == 1:
            b.add(node, op, [node.map()], {"axis": 1})
        else:
            raise UnreadError(f"it is over axis {axis} of {rank}, and one over the classes of (N, K) is read")

    return convert


def _mean(b: Builder, node: Node) -> None:
    rank = len(b.shape(node.map()))
    axes = node.listed(1, "axes")
    if not axes:
        raise UnreadError("it names no axes")
    chosen = tuple(sorted(a % rank for a in axes))
    b.add(node, "mean", [node.map()], {"axes": chosen, "keep": bool(node.number("keepdims", 1))})


def _global_pool(b: Builder, node: Node) -> None:
    b.add(node, "mean", [node.map()], {"axes": tuple(range(2, len(b.shape(node.map())))), "keep": True})


def _pool(b: Builder, node: Node) -> None:
    x, kernel = node.map(), node.ints("kernel_shape")
    if len(kernel) != 2:
        raise UnreadError(f"it has {len(kernel)} axes of positions, and 2 are read")
    stride, dilation = node.ints("strides", [1, 1]), node.ints("dilations", [1, 1])
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    before, after = _pads(node, b.shape(x)[2:], reach, stride)
    args: dict[str, Any] = {
        "kernel_size": kernel,
        "stride": stride,
        "ceil_mode": bool(node.number("ceil_mode", 0)),
    }
    even = before == after and all(2 * p <= k for p, k in zip(before, kernel, strict=True))
    pads = (before[1], after[1], before[0], after[0])
    if node.proto.op_type == "MaxPool":
        args |= {
            "dilation": dilation,
            "padding": before if even else (0, 0),
            "pads": (0,) * 4 if even else pads,
        }
        b.add(node, "max_pool", [x], args)
        return
    counted = bool(node.number("count_include_pad", 0))
    if dilation != (1, 1) or not (even or counted):
        raise UnreadError("it pads one side more than the other, or is dilated")
    if not even:
        x = b.add(node, "pad", [x], {"pads": pads, "value": 0.0}, passing=True)
    b.add(node, "avg_pool", [x], args | {"padding": before if even else (0, 0), "count_include_pad": counted})


def _pad(b: Builder, node: Node) -> None:
    pads = node.listed(1, "pads") or ()
    if node.attributes.get("mode", b"constant") != b"constant" or len(pads) != 8 or node.has(3):
        raise UnreadError("only constant padding of maps (N, C, H, W) is read")
    if any(pads[axis] for axis in (0, 1, 4, 5)):
        raise UnreadError("it pads images or channels")
    filled = node.weights(2).ravel() if node.has(2) else np.array([node.number("value", 0)])
    value = float(filled[0]) if filled.size else 0.0
    b.add(node, "pad", [node.map()], {"pads": (pads[3], pads[7], pads[2], pads[6]), "value": value})


def _shape(b: Builder, node: Node) -> None:
    shape = b.shape(node.map())
    start, end = int(node.number("start", 0)), node.attributes.get("end")
    b.constants[node.proto.output[0]] = np.array(shape[start:end], dtype=np.int64)


def _reshape(b: Builder, node: Node) -> None:
    shape = b.shape(node.map())
    wanted = [int(v) for v in node.weights(1).ravel()]
    if not node.attributes.get("allowzero"):
        wanted = [shape[i] if v == 0 else v for i, v in enumerate(wanted)]
    known = math.prod(v for v in wanted if v != -1)
    _reshaped(b, node, [math.prod(shape) // max(1, known) if v == -1 else v for v in wanted])


def _flatten(b: Builder, node: Node) -> None:
    shape, axis = b.shape(node.map()), int(node.number("axis", 1))
    axis %= len(shape)
    _reshaped(b, node, [math.prod(shape[:axis]), math.prod(shape[axis:])])


def _squeeze(b: Builder, node: Node) -> None:
    shape = b.shape(node.map())
    axes = node.listed(1, "axes") or tuple(i for i, v in enumerate(shape) if i and v == 1)
    gone = {axis % len(shape) for axis in axes}
    _reshaped(b, node, [v for i, v in enumerate(shape) if i not in gone])


def _unsqueeze(b: Builder, node: Node) -> None:
    shape, axes = list(b.shape(node.map())), node.listed(1, "axes") or ()
    rank = len(shape) + len(axes)
    for axis in sorted(a % rank for a in axes):
        shape.insert(axis, 1)
    _reshaped(b, node, shape)


def _reshaped(b: Builder, node: Node, wanted: Sequence[int]) -> None:
    """Add a reshape that leaves the batch and, where it can, the number of channels open.

    The open axis is the one that keeps the channels; else that of what they are flattened into, and of (N, a, b, H, W),
    a channel shuffle, b.
    """
    x = node.map()
    shape = b.shape(x)
    if math.prod(wanted) != math.prod(shape) or not wanted or wanted[0] != b.batch or len(wanted) > 6:
        raise UnreadError(f"it makes {list(wanted)} of {list(shape)}, which mixes the images of a batch")
    if tuple(wanted) == shape:
        b.alias(node, x)
        return
    rest = list(wanted[1:])
    same = [i for i, v in enumerate(rest) if len(shape) > 1 and v == shape[1]]
    rest[same[0] if same else 1 if len(rest) == 4 else 0] = -1
    b.add(node, "reshape", [x], {"shape": tuple(rest)})


def _expand(b: Builder, node: Node) -> None:
    shape, wanted = b.shape(node.map()), tuple(int(v) for v in node.weights(1).ravel())
    full = np.broadcast_shapes(shape, wanted)
    if len(full) != len(shape) or full[0] != b.batch:
        raise UnreadError(f"it makes {full} of {shape}")
    if full == shape:
        b.alias(node, node.map())
        return
    pairs = zip(full[1:], shape[1:], strict=True)
    b.add(
        node, "expand", [node.map()], {"shape": tuple(-1 if new == old else int(new) for new, old in pairs)}
    )


def _transpose(b: Builder, node: Node) -> None:
    rank = len(b.shape(node.map()))
    axes = node.ints("perm", range(rank)[::-1])
    if axes[:1] != (0,):
        raise UnreadError("it moves the axis of the images")
    b.add(node, "permute", [node.map()], {"axes": axes})


def _concat(b: Builder, node: Node) -> None:
    maps = [node.map(i) for i in range(len(node.proto.input))]
    rank = len(b.shape(maps[0]))
    if int(node.number("axis", 1)) % rank != 1:
        raise UnreadError("it joins along another axis than the channels")
    b.add(node, "concat", maps)


def _same(b: Builder, node: Node) -> None:
    b.alias(node, node.map())


def _cast(b: Builder, node: Node) -> None:
    if node.attributes.get("to") != FLOAT:
        raise UnreadError("it changes the type of a map")
    b.alias(node, node.map())


NODES: dict[str, Convert] = {
    "Add": _elementwise("add"),
    "AveragePool": _pool,
    "BatchNormalization": _norm,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": _concat,
    "Conv": _conv,
    "Div": _elementwise("div"),
    "Dropout": _same,
    "Elu": _plain("elu", alpha=1.0),
    "Expand": _expand,
    "Flatten": _flatten,
    "Gelu": _plain("gelu"),
    "Gemm": _gemm,
    "GlobalAveragePool": _global_pool,
    "HardSigmoid": _plain("hardsigmoid", alpha=0.2, beta=0.5),
    "HardSwish": _plain("hardswish"),
    "Identity": _same,
    "LeakyRelu": _plain("leaky_relu", alpha=0.01),
    "LogSoftmax": _softmax("log_softmax"),
    "MatMul": _matmul,
    "MaxPool": _pool,
    "Mul": _elementwise("mul"),
    "Pad": _pad,
    "ReduceMean": _mean,
    "Relu": _plain("relu"),
    "Reshape": _reshape,
    "Shape": _shape,
    "Sigmoid": _plain("sigmoid"),
    "Softmax": _softmax("softmax"),
    "Softplus": _plain("softplus"),
    "Squeeze": _squeeze,
    "Sub": _elementwise("sub"),
    "Tanh": _plain("tanh"),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
