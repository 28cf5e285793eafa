"""An ONNX network in int8: pairs of QuantizeLinear and DequantizeLinear, which onnxruntime fuses with what is between.

Activations are uint8 with a zero point, over the range seen in calibration; weights int8 per output channel, symmetric,
in 7 bits, so that the sum of two products fits into the 16 bits that CPUs without VNNI add in. Their scales are rounded
up to 16 bits before the weights are divided by them. Biases stay in float, in 16 bits: onnxruntime makes int32 of them
when it opens the file, and it is smaller so. An activation function that the lower end of uint8 replaces (ReLU, ReLU6)
is left out.

Shapes: N images, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from se_prune.export.base import Subject
    from se_prune.results import LayerNoise

#: What becomes int8: layers with weights, and the sums and products between activations.
WEIGHTED, BETWEEN = ("Conv", "Gemm", "MatMul"), ("Add", "Mul")
#: |w| ≤ 64: two products of a uint8 and a weight, 2 · 255 · 64 = 32,640, stay below 2^15.
WEIGHT_MAX = 64
ACTIVATION_MAX = 255
BIAS_MAX = 2**30
#: Least scale, and largest scale or bias, that is kept in 16 bits; and the bytes of the Cast that it takes.
HALF_MIN, HALF_MAX, CAST_BYTES = 2.0**-14, 2.0**15, 30
#: Attributes that exporters write although they say what holds without them.
DEFAULTS = {
    ("ReduceMean", "keepdims"): 1,
    ("ReduceMean", "noop_with_empty_axes"): 0,
    ("Reshape", "allowzero"): 0,
    ("Gemm", "alpha"): 1.0,
    ("Gemm", "beta"): 1.0,
    ("Gemm", "transA"): 0,
}
#: Values of the images at a time, and images at most: every tensor of the network is held for each.
CALIBRATION_VALUES, CALIBRATION_BATCH = 2**18, 32


@dataclass(frozen=True, slots=True)
class Range:
    """Smallest and largest value of a tensor; scale and zero point of uint8 that hold both and 0."""

    low: float
    high: float

    def affine(self) -> tuple[np.float32, np.uint8]:
        """Return (scale, zero point)."""
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        scale = np.float32((high - low) / ACTIVATION_MAX) or np.float32(1.0)
        return scale, np.uint8(np.clip(round(-low / float(scale)), 0, ACTIVATION_MAX))


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node that can become int8: its place in the graph, the layer's name, and the tensors that it reads and settles.

    `settled` is its output, or that of the activation function behind it, `dropped`, which uint8 replaces.
    """

    index: int
    layer: str
    kind: str
    reads: tuple[str, ...]
    settled: str
    dropped: int | None
    last: bool


def quantise(model: Any, subject: Subject) -> tuple[Any, tuple[LayerNoise, ...]]:
    """Return the int8 form of a network, and the noise of every layer; the worst layers stay in float where it pays.

    Args:
        model: The float ModelProto; it is not changed.
        subject: Its images for calibration, and others on which the noise is measured.
    """
    from se_prune.export.noise import choose

    form = Int8Form(model)
    form.calibrate(subject.calibration.numpy())
    kept, layers = choose(form, subject.images.numpy())
    if subject.pixels is not None:  # the network is a part of what is exported
        layers = tuple(replace(n, layer=n.layer.replace("network.", "", 1)) for n in layers)
    return shrink(form.build({c.index for c in form.candidates} - kept)), layers


class Int8Form:
    """A float graph that can be built with any set of its nodes in int8."""

    def __init__(self, model: Any) -> None:
        from onnx import numpy_helper

        self.model = model
        graph = model.graph
        self.weights: dict[str, NDArray[Any]] = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        self.maker = {name: index for index, node in enumerate(graph.node) for name in node.output}
        self.readers: dict[str, list[int]] = {}
        for index, node in enumerate(graph.node):
            for name in node.input:
                self.readers.setdefault(name, []).append(index)
        self.outputs = {value.name for value in graph.output}
        self.ranges: dict[str, Range] = {}
        self.candidates = tuple(c for i in range(len(graph.node)) if (c := self._candidate(i)) is not None)

    def _candidate(self, index: int) -> Candidate | None:
        node = self.model.graph.node[index]
        reads = [name for name in node.input if name not in self.weights]
        if node.op_type in WEIGHTED:
            if reads != [node.input[0]] or not _plain(node):
                return None
            layer = node.input[1].removesuffix(".weight")
        elif node.op_type in BETWEEN and len(reads) == 2:
            layer = f"{node.op_type.lower()} behind {self._layer_before(index)}"
        else:
            return None
        settled, dropped = self._settled(node.output[0])
        last = settled in self.outputs or self._are_logits(settled)
        return Candidate(index, layer, node.op_type, tuple(reads), settled, None if last else dropped, last)

    def _layer_before(self, index: int) -> str:
        """Return the last layer with weights on the way to a node; of a gate's product, the gate's."""
        nodes = self.model.graph.node
        before, seen = sorted(self._makers(index)), set[int]()
        while before:
            at = before.pop()
            node = nodes[at]
            if node.op_type in WEIGHTED and len(node.input) > 1 and node.input[1] in self.weights:
                return str(node.input[1]).removesuffix(".weight")
            seen.add(at)
            before = sorted({*before, *(self._makers(at) - seen)})
        return "the images"

    def _makers(self, index: int) -> set[int]:
        return {self.maker[n] for n in self.model.graph.node[index].input if n in self.maker}

    def weight_size(self, candidate: Candidate) -> int:
        """Return how many weights a node multiplies by."""
        node = self.model.graph.node[candidate.index]
        return self.weights[node.input[1]].size if candidate.kind in WEIGHTED else 0

    def _settled(self, name: str) -> tuple[str, int | None]:
        """Return where a node's output is read, past an activation function that uint8 replaces."""
        readers = self.readers.get(name, [])
        if len(readers) != 1 or name in self.outputs:
            return name, None
        node = self.model.graph.node[readers[0]]
        if node.op_type == "Relu" or (node.op_type == "Clip" and self._starts_at_zero(node)):
            return node.output[0], readers[0]
        return name, None

    def _are_logits(self, name: str) -> bool:
        """Say whether a tensor only goes into the softmax of the output, where 8 bits would make ties."""
        kinds = {self.model.graph.node[index].op_type for index in self.readers.get(name, [])}
        return kinds == {"Softmax"}

    def _starts_at_zero(self, node: Any) -> bool:
        low = self.weights.get(node.input[1]) if len(node.input) > 1 else None
        return low is not None and float(low) == 0.0

    def session(self, model: Any, extra: Sequence[str] = ()) -> Any:
        """Open a model in onnxruntime, with further tensors of it as outputs."""
        import onnx

        from se_prune.export.onnx import session

        if not extra:
            return session(model.SerializeToString())
        opened = onnx.ModelProto.FromString(model.SerializeToString())
        opened.graph.output.extend(onnx.ValueInfoProto(name=name) for name in extra)
        return session(opened.SerializeToString())

    def calibrate(self, images: NDArray[Any]) -> None:
        """Take the range of every tensor that can become uint8 over images (N, …)."""
        names = list(dict.fromkeys(n for c in self.candidates for n in (*c.reads, c.settled)))
        inputs = {value.name for value in self.model.graph.input}
        watched = [n for n in names if n not in inputs and n not in self.outputs]
        opened = self.session(self.model, watched)
        low, high = dict.fromkeys(names, math.inf), dict.fromkeys(names, -math.inf)
        size = max(1, min(CALIBRATION_BATCH, CALIBRATION_VALUES // math.prod(images.shape[1:])))
        for start in range(0, len(images), size):
            batch = images[start : start + size]
            found = dict(zip(watched, opened.run(watched, dict.fromkeys(inputs, batch)), strict=True))
            found |= dict.fromkeys(inputs, batch)
            for name in names:
                if name in found:
                    low[name] = min(low[name], float(found[name].min()))
                    high[name] = max(high[name], float(found[name].max()))
        self.ranges = {n: Range(low[n], high[n]) for n in names if math.isfinite(low[n] + high[n])}

    def build(self, chosen: Collection[int]) -> Any:
        """Return the model with the candidates at these places in int8, and names as short as they can be."""
        return _Builder(
            self, [c for c in self.candidates if c.index in chosen and self._is_finite(c)]
        ).model()

    def _is_finite(self, candidate: Candidate) -> bool:
        """Say whether all that a node reads and settles was finite in calibration."""
        names = candidate.reads if candidate.last else (*candidate.reads, candidate.settled)
        return all(name in self.ranges for name in names)


def _plain(node: Any) -> bool:
    """Say whether a Gemm is y = x·W + b."""
    given = {a.name: a.f if a.type == 1 else a.i for a in node.attribute}
    return node.op_type != "Gemm" or (
        given.get("alpha", 1.0) == given.get("beta", 1.0) == 1.0 and not given.get("transA", 0)
    )


class _Builder:
    """One build of an `Int8Form`."""

    def __init__(self, form: Int8Form, chosen: Sequence[Candidate]) -> None:
        from onnx import TensorProto, helper, numpy_helper

        self.form, self.helper, self.to_tensor = form, helper, numpy_helper.from_array
        self.float32 = TensorProto.FLOAT
        self.chosen = {c.index: c for c in chosen}
        self.dropped = {c.dropped for c in chosen if c.dropped is not None}
        self.settled = {c.settled for c in chosen if not c.last}
        self.wanted = self.settled | {n for c in chosen for n in c.reads}
        self.initializers: dict[str, NDArray[Any]] = {}
        self.nodes: list[Any] = []

    def model(self) -> Any:
        """Return the finished model."""
        import onnx

        graph = self.form.model.graph
        for value in graph.input:
            self._pair(value.name)
        for index, node in enumerate(graph.node):
            if index in self.dropped:
                continue
            made = onnx.NodeProto.FromString(node.SerializeToString())
            candidate = self.chosen.get(index)
            if candidate is None:
                made.input[:] = [self._quantised(n) if n in self.settled else n for n in node.input]
            else:
                self._make_int8(made, candidate)
            self.nodes.append(made)
            for name in made.output:
                self._pair(name)
        result = onnx.ModelProto(
            ir_version=self.form.model.ir_version,
            opset_import=self.form.model.opset_import,
            functions=self.form.model.functions,
        )
        result.graph.name = graph.name
        result.graph.input.extend(graph.input)
        result.graph.output.extend(graph.output)
        result.graph.node.extend(self.nodes)
        used = {name for node in self.nodes for name in node.input}
        values = {**self.form.weights, **self.initializers}
        result.graph.initializer.extend(self.to_tensor(v, n) for n, v in values.items() if n in used)
        return result

    def _quantised(self, name: str) -> str:
        return f"{name}/dq"

    def _pair(self, name: str) -> None:
        """Add the pair of a tensor, where a node in int8 makes or reads it."""
        if name not in self.wanted:
            return
        scale, zero = self.form.ranges[name].affine()
        self.initializers |= {f"{name}/s": np.asarray(scale), f"{name}/z": np.asarray(zero)}
        by = [f"{name}/s", f"{name}/z"] if zero else [f"{name}/s"]
        self._node("QuantizeLinear", [name, *by], f"{name}/q")
        self._node("DequantizeLinear", [f"{name}/q", *by], self._quantised(name))

    def _make_int8(self, node: Any, candidate: Candidate) -> None:
        if candidate.kind in WEIGHTED:
            self._weights(node, candidate.reads[0])
        node.input[:] = [self._quantised(n) if n in candidate.reads else n for n in node.input]
        if candidate.dropped is not None:
            node.output[0] = candidate.settled

    def _weights(self, node: Any, read: str) -> None:
        """Give a layer int8 weights per output channel."""
        weight = self.form.weights[node.input[1]]
        axis = _channel_axis(node)
        others = tuple(a for a in range(weight.ndim) if a != axis)
        scale = np.abs(weight).max(others).astype(np.float32) / WEIGHT_MAX
        scale[scale == 0] = 1.0
        into = float(self.form.ranges[read].affine()[0])
        bias = self.form.weights[node.input[2]] if len(node.input) > 2 and node.input[2] else None
        if bias is not None:  # as int32, the bias of a channel with next to no weights must not overflow
            scale = np.maximum(scale, np.abs(bias).astype(np.float32) / (BIAS_MAX * np.float32(into)))
        small = _is_worth_half(scale) and float(scale.min()) >= HALF_MIN
        scale = up_to_half(scale) if small else scale
        shape = [-1 if a == axis else 1 for a in range(weight.ndim)]
        whole = np.clip(np.rint(weight / scale.reshape(shape)), -WEIGHT_MAX, WEIGHT_MAX).astype(np.int8)
        name = f"{node.output[0]}/w"
        self.initializers |= {f"{name}/q": whole, f"{name}/s": scale}
        by = self._in_half(f"{name}/s", scale) if small else f"{name}/s"
        self._node("DequantizeLinear", [f"{name}/q", by], name, axis=axis)
        node.input[1] = name
        if bias is not None and _is_worth_half(bias):
            node.input[2] = self._in_half(f"{name}/b", bias)

    def _in_half(self, name: str, values: NDArray[Any]) -> str:
        """Keep values in 16 bits; return the name of what becomes float32 of them."""
        self.initializers[name] = values.astype(np.float16)
        self._node("Cast", [name], f"{name}32", to=self.float32)
        return f"{name}32"

    def _node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> None:
        self.nodes.append(self.helper.make_node(kind, inputs, [output], **attributes))


def _is_worth_half(values: NDArray[Any]) -> bool:
    """Say whether 16 bits hold values, and save more bytes than the Cast takes."""
    return values.size > CAST_BYTES // 2 and float(np.abs(values).max()) < HALF_MAX


def up_to_half(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return scales that 16 bits hold exactly, none smaller than before."""
    half = scale.astype(np.float16)
    return np.where(half < scale, np.nextafter(half, np.float16(np.inf)), half).astype(np.float32)


def _channel_axis(node: Any) -> int:
    if node.op_type == "Conv":
        return 0
    if node.op_type == "MatMul":
        return 1
    return 0 if any(a.name == "transB" and a.i for a in node.attribute) else 1


def _is_default(kind: str, attribute: Any) -> bool:
    """Say whether an attribute of a convolution, a mean or a linear layer is what it would be anyway."""
    from onnx import helper

    value = helper.get_attribute_value(attribute)
    if kind != "Conv":
        return bool(DEFAULTS.get((kind, attribute.name)) == value)
    if attribute.name in {"dilations", "strides"}:
        return set(value) == {1}
    defaults = {"group": value == 1, "auto_pad": value == b"NOTSET", "kernel_shape": True}
    return defaults.get(attribute.name, False) or (attribute.name == "pads" and not any(value))


def shrink(model: Any) -> Any:
    """Return a model with one copy of equal constants, the shortest names, and no attribute that says the default.

    Inputs and outputs keep their names.
    """
    import onnx
    from onnx import numpy_helper

    small = onnx.ModelProto.FromString(model.SerializeToString())
    graph = small.graph
    del graph.value_info[:]
    first: dict[tuple[Any, ...], str] = {}
    same: dict[str, str] = {}
    for tensor in graph.initializer:
        value = numpy_helper.to_array(tensor)
        same[tensor.name] = first.setdefault((value.dtype.str, value.shape, value.tobytes()), tensor.name)
    kept = [t for t in graph.initializer if same[t.name] == t.name]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    names: dict[str, str] = {value.name: value.name for value in [*graph.input, *graph.output]} | {"": ""}

    def short(name: str) -> str:
        name = same.get(name, name)
        return names.setdefault(name, str(np.base_repr(len(names), 36)).lower())

    for node in graph.node:
        for field in ("name", "domain", "overload", "doc_string"):
            if field != "domain" or not node.domain:
                node.ClearField(field)
        said = [a for a in node.attribute if not _is_default(node.op_type, a)]
        del node.attribute[:]
        node.attribute.extend(said)
        node.input[:], node.output[:] = map(short, node.input), map(short, node.output)
    for tensor in graph.initializer:
        tensor.name = short(tensor.name)
    return small
