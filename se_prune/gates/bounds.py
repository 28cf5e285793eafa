"""Intervals that hold every value of an operation's result, from the operations alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from se_prune.gates.ops import BROADCASTS, SOFTMAX, VIEWS, base
from se_prune.gates.trace import Node

Bounds = tuple[float, float]
Known = Sequence[Bounds] | Mapping[int, Bounds]
ANY: Bounds = (-math.inf, math.inf)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def _exp(x: float) -> float:
    return math.inf if x > 700 else math.exp(x)


#: Functions that never fall: the bounds of the result are those of the bounds.
RISING: dict[str, Callable[[float], float]] = {
    "sigmoid": _sigmoid,
    "hardsigmoid": lambda x: min(max(x / 6 + 0.5, 0.0), 1.0),
    "tanh": math.tanh,
    "erf": math.erf,
    "relu": lambda x: max(x, 0.0),
    "relu6": lambda x: min(max(x, 0.0), 6.0),
    "softplus": lambda x: x if x > 700 else math.log1p(math.exp(x)),
    "exp": _exp,
}
#: Limits of the functions that clip, where no argument gives them.
CLIPS = {"clamp": (None, None), "clamp_min": (None, None), "clamp_max": (None, None), "hardtanh": (-1.0, 1.0)}
#: Functions whose results lie between the least and the greatest of all inputs.
BETWEEN = VIEWS | BROADCASTS | {
    "_to_copy", "amax", "amin", "cat", "chunk", "dropout", "max", "maximum", "mean", "minimum", "native_dropout",
    "select", "slice", "split", "split_with_sizes", "stack", "unbind",
}  # fmt: skip


def bounds_of(node: Node, known: Known) -> Bounds:
    """Return an interval that holds the node's values; every real number where nothing is known.

    Args:
        node: The operation.
        known: The bounds of every node before it.
    """
    op = base(node.op)
    data = [known[i] for i in node.inputs]
    result = ANY
    if op in SOFTMAX:
        result = (0.0, 1.0)
    elif not data or node.parameters:
        pass  # a parameter may hold anything
    elif op in RISING:
        result = (RISING[op](data[0][0]), RISING[op](data[0][1]))
    elif op in CLIPS:
        result = _clipped(node, data[0])
    elif op in {"add", "sub", "rsub", "mul", "div"}:
        result = _arithmetic(op, _operand(node, 0, known), _operand(node, 1, known))
    elif op == "neg":
        result = (-data[0][1], -data[0][0])
    elif op == "reciprocal":
        result = _arithmetic("div", (1.0, 1.0), data[0])
    elif op in BETWEEN:
        result = (min(low for low, _ in data), max(high for _, high in data))
    return result


def _clipped(node: Node, bounds: Bounds) -> Bounds:
    floor, ceiling = CLIPS[base(node.op)]
    given = (None, *node.args[1:]) if base(node.op) == "clamp_max" else node.args[1:]
    floor = given[0] if given else floor
    ceiling = given[1] if len(given) > 1 else ceiling
    low, high = bounds
    if floor is not None:
        low, high = max(low, floor), max(high, floor)
    if ceiling is not None:
        low, high = min(low, ceiling), min(high, ceiling)
    return (low, high)


def _operand(node: Node, position: int, known: Known) -> Bounds:
    index = node.operands[position]
    if index is not None:
        return known[index]
    value = node.args[position]
    return (float(value), float(value)) if isinstance(value, (int, float)) else ANY


def _arithmetic(op: str, a: Bounds, b: Bounds) -> Bounds:
    if op == "add":
        return (a[0] + b[0], a[1] + b[1])
    if op in {"sub", "rsub"}:
        (low, high), (least, most) = (a, b) if op == "sub" else (b, a)
        return (low - most, high - least)
    if op == "div":
        return ANY if b[0] <= 0 <= b[1] else _arithmetic("mul", a, (1 / b[1], 1 / b[0]))
    ends = [0.0 if 0.0 in {x, y} else x * y for x in a for y in b]
    return (min(ends), max(ends))
