"""A graph to steps: every node that depends on the images becomes a step of `zoo.steps`, all others are computed.

The graph is followed once with shapes alone (tensors on `meta`), at the batch size that it fixes, or 1. Whatever
it computes from the shape of a map is a constant then; only the batch stays open.

Shapes: N images, C channels, H×W positions, K classes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from se_prune.errors import CheckpointError
from se_prune.onnx_file.folding import FOLDABLE, constant, fold
from se_prune.onnx_file.reading import Graph
from se_prune.schema import to_json
from se_prune.zoo.steps import (
    IMAGES,
    LAYERS,
    Final,
    Step,
    StepNetwork,
    Steps,
    Value,
    build,
    layer,
    require_small,
    run,
    usable,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: What exporters put behind a layer's name to name its weight.
WEIGHT_SUFFIX = re.compile(r"[._](weights?|scale|gamma|w_\d+)(_deepcopy_\d+)?$")


#: Adds the steps of a node.
Convert = Callable[["Builder", "Node"], None]


class UnreadError(Exception):
    """A node is not read; the text says what of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """A network and where it came from.

    Attributes:
        module: The network with its weights, in eval mode.
        origins: Per step the value of the graph that it makes, and the operator.
        logits: The value of the graph that the network gives, before its last softmax or sigmoid.
        classes: K.
    """

    module: StepNetwork
    origins: dict[str, tuple[str, str]]
    logits: str
    classes: int


def convert(graph: Graph, size: tuple[int, int, int], path: Path, table: Mapping[str, Convert]) -> Converted:
    """Convert a graph for images of a size (C, H, W), with a converter per operator.

    Raises:
        CheckpointError: A node is not read, its inputs do not go together, or the output is not (N, K).
    """
    builder = Builder(graph, size, path)
    for node in graph.nodes:
        _visit(builder, node, table)
    return builder.finished()


def _visit(builder: Builder, node: Any, table: Mapping[str, Convert]) -> None:
    inputs = [builder.constants.get(name) for name in node.input]
    known = all(value is not None or not name for name, value in zip(node.input, inputs, strict=True))
    if node.op_type == "Constant":
        builder.constants[node.output[0]] = constant(node, builder.path)
    elif known and node.op_type in FOLDABLE:
        builder.constants[node.output[0]] = fold(node, inputs, builder.graph.opset, builder.path)
    elif node.op_type in table:
        try:
            table[node.op_type](builder, Node(node, builder))
        except (UnreadError, RuntimeError, IndexError, TypeError, ValueError, OverflowError) as error:
            first = str(error).partition("\n")[0][:200]
            raise CheckpointError(
                f"{builder.path}: the operator {node.op_type} ({node.name or node.output[0]}) is not read: {first}."
            ) from error
    else:
        have = ", ".join(sorted({*table, *FOLDABLE}))
        raise CheckpointError(
            f"{builder.path}: the operator {node.op_type} ({node.name or node.output[0]}) is not read; "
            f"those of classifiers are: {have}."
        )


@dataclass(slots=True)
class Node:
    """A node as its converter sees it."""

    proto: Any
    builder: Builder
    attributes: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        import onnx

        self.attributes = {a.name: onnx.helper.get_attribute_value(a) for a in self.proto.attribute}

    def ints(self, name: str, default: Sequence[int] = ()) -> tuple[int, ...]:
        """Return an attribute of several integers."""
        return tuple(int(v) for v in self.attributes.get(name, default))

    def number(self, name: str, default: float) -> float:
        """Return an attribute that is one number."""
        return float(self.attributes.get(name, default))

    def has(self, index: int) -> bool:
        """Say whether an input is given."""
        return index < len(self.proto.input) and bool(self.proto.input[index])

    def constant(self, index: int) -> NDArray[Any] | None:
        """Return an input that does not depend on the images; None where it does, or is left out."""
        return self.builder.constants.get(self.proto.input[index]) if self.has(index) else None

    def weights(self, index: int) -> NDArray[Any]:
        """Return an input that must not depend on the images."""
        value = self.constant(index)
        if value is None:
            raise UnreadError(f"its input {index} depends on the images")
        return value

    def map(self, index: int = 0) -> str:
        """Return the step whose output an input is."""
        name = self.proto.input[index] if self.has(index) else ""
        if name not in self.builder.values:
            raise UnreadError(f"its input {index} does not depend on the images")
        return self.builder.values[name]

    def listed(self, index: int, name: str) -> tuple[int, ...] | None:
        """Return integers that newer opsets give as an input and older ones as an attribute."""
        if self.has(index):
            return tuple(int(v) for v in self.weights(index).ravel())
        return self.ints(name) if name in self.attributes else None


class Builder:
    """Collects steps while the graph is followed."""

    def __init__(self, graph: Graph, size: tuple[int, int, int], path: Path) -> None:
        self.graph, self.size, self.path = graph, size, path
        self.batch = graph.size[0] or 1
        self.constants = dict(graph.constants)
        self.values = {graph.images: IMAGES}
        self.steps: dict[str, Step] = {}
        self.weights: dict[str, dict[str, NDArray[Any]]] = {}
        self.origins: dict[str, tuple[str, str]] = {}
        self.made = {IMAGES: torch.empty(self.batch, *size, device="meta")}
        self.uses = Counter(name for node in graph.nodes for name in set(node.input))
        self.uses[graph.output] += 1

    def shape(self, step: str) -> tuple[int, ...]:
        """Return the shape of what a step makes, at the batch size of the pass."""
        return tuple(self.made[step].shape)

    def add(
        self,
        node: Node,
        op: str,
        inputs: Sequence[str],
        args: Mapping[str, Value] | None = None,
        *,
        named: str = "",
        weights: Mapping[str, NDArray[Any]] | None = None,
        passing: bool = False,
    ) -> str:
        """Add a step; its output is that of the node, unless it is `passing` it to a further step.

        Args:
            node: The node that it comes from.
            op: A key of `zoo.steps`' tables.
            inputs: Names of steps.
            args: The operation's arguments.
            named: For a layer, the name of its weight in the graph.
            weights: For a layer, the tensors of its module by name.
            passing: Whether the node needs further steps.
        """
        name = self._name(WEIGHT_SUFFIX.sub("", named) if named else f"{op}_{len(self.steps)}")
        step = Step(name=name, op=op, inputs=tuple(inputs), args=dict(args or {}))
        self._run(step)
        self.steps[name] = step
        if weights is not None:
            self.weights[name] = dict(weights)
        if not passing:
            self.alias(node, name)
        return name

    def _run(self, step: Step) -> None:
        with torch.device("meta"):
            module = layer(step).eval() if step.op in LAYERS else None
        made = run(step, module, [self.made[i] for i in step.inputs])
        require_small(step, made, self.batch)
        if made.shape[0] != self.batch:
            raise UnreadError("it mixes the images of a batch")
        self.made[step.name] = made

    def alias(self, node: Node, step: str) -> None:
        """Say that a node's output is that of a step."""
        self.values[node.proto.output[0]] = step
        self.origins[step] = (node.proto.output[0], node.proto.op_type)

    def with_bias(self, node: Node, step: str, value: NDArray[Any], source: str) -> bool:
        """Add a constant (C,) to the bias of the layer that made `source`; False where other steps read it too."""
        made = self.steps.get(step)
        if made is None or made.op not in {"conv", "linear"} or self.uses[source] != 1:
            return False
        if self.origins[step][0] != source:
            return False
        held = self.weights[step]
        held["bias"] = held["bias"] + value if "bias" in held else value
        self.steps[step] = replace(made, args={**made.args, "bias": True})
        self.alias(node, step)
        return True

    def _name(self, wanted: str) -> str:
        plain = re.sub(r"[^A-Za-z0-9_.]+", "_", wanted.rpartition("::")[2])[:120].strip("._") or "layer"
        name, number = plain, 1
        while not usable(name) or self._clashes(name):
            flat = plain.replace(".", "_")
            name = f"{flat}_{number}" if usable(f"{flat}_{number}") else f"layer_{flat.strip('_')}_{number}"
            number += 1
        return name

    def _clashes(self, name: str) -> bool:
        return any(
            name == other or name.startswith(f"{other}.") or other.startswith(f"{name}.")
            for other in (IMAGES, *self.steps)
        )

    def finished(self) -> Converted:
        """Return the network of the steps that the output needs, with its weights."""
        last = self.values.get(self.graph.output)
        if last is None or last == IMAGES:
            raise CheckpointError(
                f"{self.path}: the output does not depend on the images; give a classifier."
            )
        shape = self.shape(last)
        if len(shape) != 2 or shape[1] < 2:
            raise CheckpointError(
                f"{self.path} gives {list(shape)} for a batch of {self.batch}, not one number per class; "
                "only classifiers can be opened."
            )
        final, last = self._final(last)
        steps = Steps(input_size=self.size, steps=tuple(self._needed(last)), final=final)
        module = build({"steps": to_json(steps)}).eval()
        state = module.state_dict()
        for step in steps.steps:
            for key, values in self.weights.get(step.name, {}).items():
                target = state[f"{step.name}.{key}"]
                target.copy_(torch.from_numpy(np.ascontiguousarray(values)).reshape(target.shape))
        kept = {step.name for step in steps.steps}
        origins = {name: origin for name, origin in self.origins.items() if name in kept}
        return Converted(module=module, origins=origins, logits=self.origins[last][0], classes=shape[1])

    def _final(self, last: str) -> tuple[Final, str]:
        """Take a last softmax or sigmoid off; return it and the step before it."""
        step = self.steps[last]
        finals: dict[str, Final] = {"softmax": "softmax", "log_softmax": "log_softmax", "sigmoid": "sigmoid"}
        if step.op not in finals or step.inputs[0] == IMAGES:
            return "none", last
        return finals[step.op], step.inputs[0]

    def _needed(self, last: str) -> list[Step]:
        needed, kept = {last}, []
        for step in reversed(self.steps.values()):
            if step.name in needed:
                needed.update(step.inputs)
                kept.append(step)
        return kept[::-1]
