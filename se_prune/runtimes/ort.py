"""onnxruntime on the CPU: running a file, profiling it by operation, and timing single layers.

Layers are timed many to a graph, by the profiler: what the runtime does around them (a change of the memory layout, the
call itself) is left out. The packages are imported inside functions only.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from se_prune.errors import SePruneError
from se_prune.export.base import INPUT
from se_prune.export.onnx import OPSET, session
from se_prune.results import OperationTime
from se_prune.timing import LayerShape

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Runs over which a single layer is timed, after one that is not.
LAYER_RUNS = 9
#: A graph of single layers holds at most so many bytes of weights; a file of 2 GB cannot be written.
GRAPH_BYTES = 256 * 2**20
#: Weights and inputs of single layers; the time does not depend on it, as long as it is an ordinary number.
FILL = 0.01
IR_VERSION = 10
#: What is computed by a layer with weights.
LAYERS = frozenset({"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"})
#: How the profiler names the fused or reordered form of an operation.
SUFFIXES = ("_kernel_time", "_nchwc")


def open_file(source: Path | nn.Module, images: torch.Tensor, threads: int) -> Callable[[], None]:
    """Return what runs a file once on images (N, C, H, W)."""
    assert not isinstance(source, nn.Module), "onnxruntime opens files"
    opened = session(source, threads)
    feeds = {INPUT: images.detach().cpu().float().numpy()}

    def run() -> None:
        opened.run(None, feeds)

    return run


def profile(
    source: Path | nn.Module, images: torch.Tensor, threads: int, runs: int
) -> tuple[OperationTime, ...]:
    """Return the time of every operation that onnxruntime runs, in its order, with the layer that it computes."""
    import onnx

    assert not isinstance(source, nn.Module), "onnxruntime opens files"
    feeds = {INPUT: images.detach().cpu().float().numpy()}
    names = Names(onnx.load(source, load_external_data=False).graph)
    result = []
    for event, times in _events(source, feeds, threads, runs).items():
        name, kind = event
        layer = names.layer(name) if kind in LAYERS else None
        result.append(OperationTime(name=name, kind=kind, ms=lower_quartile(times), layer=layer))
    return tuple(result)


def _events(
    source: Path | bytes, feeds: Mapping[str, NDArray[np.float32]], threads: int, runs: int
) -> dict[tuple[str, str], list[float]]:
    """Return milliseconds per run of every operation (name, kind), the first run left out."""
    with tempfile.TemporaryDirectory() as folder:
        opened = session(source, threads, Path(folder) / "profile")
        for _ in range(runs + 1):
            opened.run(None, feeds)
        events = json.loads(Path(opened.end_profiling()).read_bytes())
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(SUFFIXES[0]):
            times[_plain(event["name"]), event["args"]["op_name"]].append(event["dur"] / 1e3)
    if not times:
        raise SePruneError(
            "this onnxruntime does not profile operations; use --runtime torch, or another build of it."
        )
    return {key: values[len(values) // (runs + 1) :] for key, values in times.items()}


def _plain(name: str) -> str:
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return name


class Names:
    """From the profiler's names to layers: an event is named after a node, or after the last output of fused ones."""

    def __init__(self, graph: Any) -> None:
        self.weights = {tensor.name for tensor in graph.initializer}
        self.maker = {output: node for node in graph.node for output in node.output}
        self.node = {node.name: node for node in graph.node}

    def layer(self, name: str) -> str | None:
        """Return the module whose weight an operation multiplies by, walking back through what was fused with it."""
        node = self.maker.get(name) or self.node.get(name)
        for _ in range(4):
            if node is None:
                return None
            if node.op_type in LAYERS:
                weights = [i for i in node.input[:2] if i in self.weights]
                return weights[0].removesuffix(".weight") if weights else None
            node = next((self.maker[i] for i in node.input if i in self.maker), None)
        return None


def lower_quartile(times: Sequence[float]) -> float:
    """Return the lower quartile: other processes only ever add time."""
    return float(np.quantile(np.asarray(times), 0.25))


def time_layers(shapes: Sequence[LayerShape], batch: int, threads: int) -> list[float]:
    """Return the milliseconds of single layers on batches of so many images."""
    result: list[float] = []
    for part in parts(shapes):
        model, feeds = bank(part, batch)
        times: dict[str, list[float]] = {}
        for (name, kind), values in _events(model, feeds, threads, LAYER_RUNS).items():
            if kind in LAYERS:
                times[name] = values
        result += [lower_quartile(times[f"y{i}"]) for i in range(len(part))]
    return result


def parts(shapes: Sequence[LayerShape]) -> Iterator[list[LayerShape]]:
    """Yield the shapes in parts, each of which fits into one graph."""
    part: list[LayerShape] = []
    used = 0
    for shape in shapes:
        size = 4 * shape.macs // (shape.size[0] * shape.size[1])
        if part and used + size > GRAPH_BYTES:
            yield part
            part, used = [], 0
        part.append(shape)
        used += size
    if part:
        yield part


def bank(shapes: Sequence[LayerShape], batch: int) -> tuple[bytes, dict[str, NDArray[np.float32]]]:
    """Return a graph of unconnected layers, the i-th of which writes `y{i}`, and its inputs."""
    from onnx import TensorProto, helper, numpy_helper

    nodes, weights, outputs = [], [], []
    feeds: dict[str, NDArray[np.float32]] = {}
    for i, shape in enumerate(shapes):
        channels_first = (batch, shape.into, *shape.input_size)
        size = channels_first if shape.kind == "conv" else (batch * shape.size[0] * shape.size[1], shape.into)
        source = "x" + "_".join(map(str, size))
        feeds.setdefault(source, np.full(size, FILL, np.float32))
        kernel = (*shape.kernel,) if shape.kind == "conv" else ()
        weight = np.full((shape.out, shape.into // shape.groups, *kernel), FILL, np.float32)
        bias = np.full(shape.out, FILL, np.float32)
        weights += [numpy_helper.from_array(weight, f"w{i}"), numpy_helper.from_array(bias, f"b{i}")]
        nodes.append(_node(helper, shape, [source, f"w{i}", f"b{i}"], f"y{i}"))
        outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, None))
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, x.shape) for n, x in feeds.items()]
    graph = helper.make_graph(nodes, "layers", inputs, outputs, weights)
    opset = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION)
    return bytes(model.SerializeToString()), feeds


def _node(helper: Any, shape: LayerShape, inputs: list[str], output: str) -> Any:
    if shape.kind == "linear":
        return helper.make_node("Gemm", inputs, [output], name=output, transB=1)
    return helper.make_node(
        "Conv",
        inputs,
        [output],
        name=output,
        kernel_shape=shape.kernel,
        strides=shape.stride,
        pads=(*shape.padding, *shape.padding),
        dilations=shape.dilation,
        group=shape.groups,
    )
