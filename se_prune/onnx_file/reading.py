"""Reading an ONNX file without trust: what is not a plain float32 classifier in one file is refused.

Nothing in the file is run and no other file is opened. Nodes that the output does not need are dropped, so that
whatever runs the graph later runs only what was looked at.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from se_prune.errors import CheckpointError, SePruneError, UsageError
from se_prune.records import Preprocessing
from se_prune.zoo.steps import LARGEST_MAP, LARGEST_NUMBER, MOST_STEPS

if TYPE_CHECKING:
    from numpy.typing import NDArray

INSTALL = "pip install onnx onnxruntime"
METADATA_PREFIX = "se_prune."
OLDEST_OPSET = 7
EXPORT_AGAIN = "export it again as one float32 classifier with one image input"


@dataclass(slots=True, kw_only=True)
class Graph:
    """A graph as far as a classifier needs it.

    Attributes:
        model: The onnx ModelProto, without what the output does not need.
        opset: Of the default domain.
        nodes: In the order in which they run.
        constants: The initializers by name.
        images: The name of the input.
        size: Of the input, (N, C, H, W); None where the file leaves it open.
        output: The name of the output.
        metadata: What the file says about itself.
    """

    model: Any
    opset: int
    nodes: list[Any]
    constants: dict[str, NDArray[Any]]
    images: str
    size: tuple[int | None, int | None, int | None, int | None]
    output: str
    metadata: dict[str, str]


def read_graph(path: Path) -> Graph:
    """Read and check a file.

    Raises:
        CheckpointError: It is broken, needs other files, or is not a float32 classifier of images.
        SePruneError: The package onnx is missing.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    except ImportError as error:
        raise SePruneError(
            f"opening an ONNX file needs a package that is missing ({error}): {INSTALL}"
        ) from error
    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error
    except (DecodeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a whole ONNX file; copy or download it again.") from error
    if not model.graph.node:
        raise CheckpointError(
            f"{path} holds no graph, so it is no whole ONNX file; copy or download it again."
        )
    _require_plain(model, path)
    opset = _opset(model, path)
    output = _output(model, path)
    constants = {tensor.name: array(tensor, path) for tensor in model.graph.initializer}
    _keep_needed(model, output)
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError) as error:
        first = str(error).strip().partition("\n")[0][:200]
        raise CheckpointError(f"{path} is not a valid ONNX file ({first}); {EXPORT_AGAIN}.") from error
    images, size = _images(model, constants, path)
    return Graph(
        model=model,
        opset=opset,
        nodes=list(model.graph.node),
        constants=constants,
        images=images,
        size=size,
        output=output,
        metadata={item.key: item.value for item in model.metadata_props},
    )


def _tensors(model: Any) -> list[Any]:
    inside = [a.t for node in model.graph.node for a in node.attribute if a.HasField("t")]
    return [*model.graph.initializer, *inside]


def _require_plain(model: Any, path: Path) -> None:
    """Refuse other files, control flow, functions and operators that are not ONNX's own."""
    outside = [t for t in _tensors(model) if t.data_location or t.external_data]
    if outside:
        raise CheckpointError(
            f"{path} keeps '{outside[0].name}' in another file, which is not opened; {EXPORT_AGAIN} "
            "(onnx.save_model(onnx.load(file), out) puts all in one)."
        )
    if model.functions or model.graph.sparse_initializer:
        raise CheckpointError(f"{path} holds functions or sparse tensors; {EXPORT_AGAIN}.")
    if len(model.graph.node) > MOST_STEPS:
        raise CheckpointError(
            f"{path} has {len(model.graph.node)} nodes, more than any classifier; {EXPORT_AGAIN}."
        )
    for node in model.graph.node:
        if node.domain not in {"", "ai.onnx"}:
            raise CheckpointError(
                f"{path}: the operator {node.op_type} is of the domain {node.domain!r} and not ONNX's own; "
                f"{EXPORT_AGAIN}, without quantisation and before any optimisation for one runtime."
            )
        if any(a.HasField("g") or a.graphs for a in node.attribute):
            raise CheckpointError(f"{path} has control flow ({node.op_type}); {EXPORT_AGAIN}.")


def _opset(model: Any, path: Path) -> int:
    import onnx

    versions = [item.version for item in model.opset_import if item.domain in {"", "ai.onnx"}]
    newest = onnx.defs.onnx_opset_version()
    if len(versions) != 1 or not OLDEST_OPSET <= versions[0] <= newest:
        shown = versions[0] if versions else "none"
        raise CheckpointError(
            f"{path} is of opset {shown}, and opsets {OLDEST_OPSET} to {newest} are read; "
            "convert it with onnx.version_converter, or update onnx."
        )
    return int(versions[0])


def array(tensor: Any, path: Path | str) -> NDArray[Any]:
    """Return a tensor of the file as an array.

    Raises:
        CheckpointError: Its values are missing, not numbers, or not finite.
    """
    import onnx

    kinds = onnx.TensorProto
    if tensor.data_type not in {kinds.FLOAT, kinds.DOUBLE, kinds.INT32, kinds.INT64, kinds.BOOL}:
        kind = (
            kinds.DataType.Name(tensor.data_type)
            if tensor.data_type in kinds.DataType.values()
            else "unknown"
        )
        raise CheckpointError(f"{path}: '{tensor.name}' is of type {kind.lower()}; {EXPORT_AGAIN}.")
    try:
        values: NDArray[Any] = np.array(onnx.numpy_helper.to_array(tensor))
    except (ValueError, TypeError, MemoryError, OverflowError) as error:
        raise CheckpointError(
            f"{path}: '{tensor.name}' does not hold the values that it claims; copy or download the file again."
        ) from error
    if values.dtype.kind == "f" and not np.isfinite(values).all() and values.size > 1:
        raise CheckpointError(
            f"{path}: '{tensor.name}' holds NaN or infinite values, so its training failed; open another file."
        )
    return values


def _output(model: Any, path: Path) -> str:
    names = [value.name for value in model.graph.output]
    if len(names) != 1:
        shown = ", ".join(names[:5]) or "none"
        raise CheckpointError(
            f"{path} has {len(names)} outputs ({shown}), and a classifier has one; {EXPORT_AGAIN}."
        )
    return str(names[0])


def _keep_needed(model: Any, output: str) -> None:
    """Drop the nodes and initializers that the output does not depend on."""
    needed, kept = {output}, []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            needed.update(name for name in node.input if name)
            kept.append(node)
    kept.reverse()
    initializers = [tensor for tensor in model.graph.initializer if tensor.name in needed]
    for values, keep in ((model.graph.node, kept), (model.graph.initializer, initializers)):
        copies = [type(item).FromString(item.SerializeToString()) for item in keep]
        del values[:]
        values.extend(copies)


def _images(
    model: Any, constants: Mapping[str, Any], path: Path
) -> tuple[str, tuple[int | None, int | None, int | None, int | None]]:
    import onnx

    inputs = [value for value in model.graph.input if value.name not in constants]
    kinds = [value.type.tensor_type for value in inputs]
    shapes = [[_size(dim) for dim in kind.shape.dim] for kind in kinds]
    if len(inputs) != 1 or len(shapes[0]) != 4:
        shown = "; ".join(f"{v.name} {s}" for v, s in zip(inputs[:4], shapes, strict=False)) or "none"
        raise CheckpointError(
            f"{path} has the inputs {shown}, and a classifier of images has one of shape (N, C, H, W); {EXPORT_AGAIN}."
        )
    if kinds[0].elem_type != onnx.TensorProto.FLOAT:
        raise CheckpointError(f"{path} does not take float32 images; {EXPORT_AGAIN}.")
    n, c, h, w = shapes[0]
    return str(inputs[0].name), (n, c, h, w)


def _size(dim: Any) -> int | None:
    return int(dim.dim_value) if dim.HasField("dim_value") and dim.dim_value > 0 else None


def input_size(graph: Graph, asked: Sequence[int] | None, path: Path | str) -> tuple[int, int, int]:
    """Return the size (C, H, W) of one image: the file's own, else our own metadata's, else what was asked for.

    Args:
        graph: The graph.
        asked: (C, H, W) or (H, W) of `--input-size`.
        path: The file, for messages.

    Raises:
        UsageError: It is open in the file and was not given, or contradicts the file.
        CheckpointError: No classifier takes images as large.
    """
    own = (graph.size[1] or _first_channels(graph), *graph.size[2:])
    stated = _stated(graph, "input_size", 3)
    given = tuple(asked) if asked is not None else () if stated is None else tuple(int(v) for v in stated)
    wanted = (None,) * (3 - len(given)) + given
    size = [a if a is not None else b for a, b in zip(own, wanted, strict=True)]
    shown = ",".join("?" if v is None else str(v) for v in own)
    if None in size:
        raise UsageError(f"{path} leaves the size of its images open ({shown}); add --input-size C,H,W.")
    result = (int(size[0] or 0), int(size[1] or 0), int(size[2] or 0))
    if any(b is not None and a != b for a, b in zip(result, wanted, strict=True)):
        raise UsageError(
            f"{path} takes images of {shown} alone, not {','.join(map(str, given))}; leave --input-size out."
        )
    if min(result) < 1 or max(result) > LARGEST_NUMBER or math.prod(result) > LARGEST_MAP // 16:
        raise CheckpointError(
            f"{path} takes images of {result}, which no classifier does; give another file."
        )
    return result


def _first_channels(graph: Graph) -> int | None:
    """Return how many channels the first convolution takes; None where the images go elsewhere first."""
    for node in graph.nodes:
        if node.op_type == "Conv" and node.input[0] == graph.images and node.input[1] in graph.constants:
            return int(graph.constants[node.input[1]].shape[1])
    return None


def _stated(graph: Graph, key: str, count: int) -> list[float] | None:
    """Return some numbers that our own export wrote into the metadata; None where they are not there."""
    try:
        values = json.loads(graph.metadata.get(METADATA_PREFIX + key, ""))
    except (ValueError, RecursionError):
        return None
    numbers = (
        isinstance(values, list) and len(values) == count and all(type(v) in {int, float} for v in values)
    )
    return values if numbers and all(map(math.isfinite, values)) else None


def preprocessing_of(graph: Graph, size: tuple[int, int, int]) -> Preprocessing | None:
    """Return the mean and standard deviation that our own export noted; None for another tool's file."""
    mean, std = _stated(graph, "mean", size[0]), _stated(graph, "std", size[0])
    if mean is None or std is None or min(std) <= 0:
        return None
    return Preprocessing(input_size=size, mean=tuple(mean), std=tuple(std))


def classes_of(graph: Graph, count: int) -> tuple[str, ...]:
    """Return the class names that our own export noted, if there are `count` of them."""
    try:
        names = json.loads(graph.metadata.get(f"{METADATA_PREFIX}classes", ""))
    except (ValueError, RecursionError):
        return ()
    fits = isinstance(names, list) and len(names) == count and all(isinstance(name, str) for name in names)
    return tuple(names) if fits else ()
