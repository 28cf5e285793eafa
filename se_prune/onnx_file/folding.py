"""Values of a graph that do not depend on the images: weights in Constant nodes, and arithmetic on shapes.

onnx's own reference implementation computes them, operator by operator, for a list of operators whose results are
no larger than what was checked before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from se_prune.errors import CheckpointError
from se_prune.onnx_file.reading import array

if TYPE_CHECKING:
    from numpy.typing import NDArray

ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Equal", "Where", "Max", "Min", "Pow"})
FOLDABLE = ELEMENTWISE | {
    "Cast", "Concat", "ConstantOfShape", "Expand", "Flatten", "Floor", "Gather", "Identity", "Neg", "Reciprocal",
    "ReduceProd", "Reshape", "Slice", "Sqrt", "Squeeze", "Transpose", "Unsqueeze",
}  # fmt: skip
#: Values of the largest constant that may be computed; weights are stored, not computed.
LARGEST_CONSTANT = 1 << 26


def constant(node: Any, path: Path) -> NDArray[Any]:
    """Return the value of a Constant node.

    Raises:
        CheckpointError: It is of a kind that no classifier needs, or damaged.
    """
    import onnx

    attributes = {a.name: a for a in node.attribute}
    if "value" in attributes:
        return array(attributes["value"].t, path)
    for key, kind in (
        ("value_float", "f4"),
        ("value_floats", "f4"),
        ("value_int", "i8"),
        ("value_ints", "i8"),
    ):
        if key in attributes:
            return np.array(onnx.helper.get_attribute_value(attributes[key]), dtype=kind)
    raise CheckpointError(f"{path}: the Constant {node.output[0]} holds no numbers; export it again.")


def fold(node: Any, inputs: Sequence[NDArray[Any] | None], opset: int, path: Path) -> NDArray[Any]:
    """Compute a node of constants alone.

    Args:
        node: A node of a `FOLDABLE` operator.
        inputs: Its inputs; None for one that is left out.
        opset: The file's.
        path: The file, for messages.

    Raises:
        CheckpointError: The inputs do not go together, or the result is larger than any constant should be.
    """
    import onnx
    from onnx.reference import ReferenceEvaluator

    given = {
        name: value for name, value in zip(node.input, inputs, strict=True) if name and value is not None
    }
    types = [
        onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
        for n, v in given.items()
    ]
    outputs = [onnx.ValueInfoProto(name=node.output[0])]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "fold", types, outputs),
        opset_imports=[onnx.helper.make_opsetid("", opset)],
    )
    try:
        size = _largest(node.op_type, list(given.values()))
        if size <= LARGEST_CONSTANT:
            with np.errstate(all="ignore"):
                return np.asarray(ReferenceEvaluator(model).run(None, given)[0])
    except Exception as error:  # the reference raises whatever numpy does
        first = str(error).strip().partition("\n")[0][:160]
        raise CheckpointError(
            f"{path}: {node.op_type} ({node.output[0]}) cannot be computed ({first}); export it again."
        ) from error
    raise CheckpointError(
        f"{path}: {node.op_type} ({node.output[0]}) would make a constant of up to {size:.3g} values; "
        "the file is damaged or not to be trusted."
    )


def _largest(op: str, inputs: Sequence[NDArray[Any]]) -> int:
    """Return how many values the result can have."""
    if op == "ConstantOfShape":
        return math.prod(abs(int(v)) for v in inputs[0].ravel()[:64])
    if op == "Expand":
        wanted = tuple(abs(int(v)) for v in inputs[1].ravel()[:64])
        return math.prod(np.broadcast_shapes(inputs[0].shape, wanted))
    if op == "Gather":
        return inputs[0].size * inputs[1].size
    if op in ELEMENTWISE:
        return math.prod(np.broadcast_shapes(*(value.shape for value in inputs)))
    return sum(value.size for value in inputs)
