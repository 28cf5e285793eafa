"""From a gate back to the squeeze: which map's pooled values the gate was computed from, and by which layers.

N images, C channels, H×W positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from se_prune.gates.flow import Flow, positions
from se_prune.gates.ops import ELEMENTWISE, FC_OPS, POOLS, SOFTMAX, VIEWS, base
from se_prune.gates.trace import Node

#: Operations between a gate and its map after which the walk gives up.
LIMIT = 64
ATTENTION = "its squeeze is attention over positions, not a mean or a maximum"
UNPOOLED = "it is computed from the map without a squeeze"
CONVOLVED = "its squeeze is a convolution, not a mean or a maximum"
ONE_AXIS = "its map is pooled along one axis only"
OTHER = "it is computed from other values than its own map's pooled ones"


@dataclass(frozen=True, slots=True, kw_only=True)
class Squeeze:
    """How a map was pooled (`avg`, `max`, `avg+max`, …) and the nodes from there to the gate, in order."""

    kind: str
    steps: tuple[int, ...]


class NoSqueezeError(Exception):
    """The gate is not computed from the map's own pooled values; the message says from what."""


@dataclass(slots=True)
class _Walk:
    flow: Flow
    features: int
    pooled: set[int] = field(default_factory=set)
    steps: set[int] = field(default_factory=set)
    sources: set[int] = field(default_factory=set)
    kinds: set[str] = field(default_factory=set)

    @property
    def images(self) -> int:
        return self.flow.record.nodes[self.features].shape[0]

    def maps(self) -> dict[int, int]:
        """Return the roots that stand for the features, whole or a part of a concatenation, and their channels."""
        nodes = self.flow.record.nodes
        root = self.flow.roots[self.features]
        found = {root: nodes[root].shape[1]}
        if nodes[root].op == "cat" and nodes[root].args[1:2] in {(1,), (-3,)}:
            found |= {self.flow.roots[i]: nodes[i].shape[1] for i in nodes[root].inputs}
        return found


def find_squeeze(flow: Flow, gate: int, features: int) -> Squeeze:
    """Walk back from a gate to the pooling of the features' map.

    Args:
        flow: The facts of the trace.
        gate: The node that made the gate.
        features: The node that the gate multiplies.

    Raises:
        NoSqueezeError: The gate depends on anything else.
    """
    walk = _Walk(flow, features)
    maps = walk.maps()
    ends = _to_pools(walk, gate, maps)
    for end, dims in ends:
        _to_maps(walk, end, dims, maps)
    root = flow.roots[features]
    if walk.sources not in ({root}, set(maps) - {root}) or not walk.sources:
        raise NoSqueezeError(OTHER)
    return Squeeze(kind="+".join(sorted(walk.kinds)), steps=tuple(sorted(walk.steps)))


def _to_pools(walk: _Walk, gate: int, maps: dict[int, int]) -> list[tuple[int, int]]:
    """Collect the nodes between the gate and the pools; return each pool's input and how many axes it took."""
    nodes = walk.flow.record.nodes
    sizes = {walk.images * channels for channels in maps.values()}
    queue = [gate]
    ends: list[tuple[int, int]] = []
    while queue:
        index = queue.pop()
        if index in walk.steps or not walk.flow.live[index]:
            continue
        node = nodes[index]
        if index == 0 or walk.flow.roots[index] in maps or len(walk.steps) > LIMIT:
            raise NoSqueezeError(_why_unpooled(walk, own=walk.flow.roots[index] in maps))
        walk.steps.add(index)
        whole = math.prod(node.shape) in sizes or (walk.flow.uniform[index] and node.shape[1] > 1)
        if base(node.op) in POOLS and whole:
            walk.kinds.add(POOLS[base(node.op)])
            ends.extend((i, _axes(node)) for i in node.inputs)
        else:
            queue.extend(node.inputs)
    return ends


def _why_unpooled(walk: _Walk, own: bool) -> str:
    steps = [walk.flow.record.nodes[i] for i in walk.steps]
    if not own:
        return OTHER
    if any(s.op in {"bmm", "mm"} and not s.parameters for s in steps) or any(s.op in SOFTMAX for s in steps):
        return ATTENTION
    if any(_gathers(walk.flow, step) for step in steps):
        return CONVOLVED
    return UNPOOLED


def _gathers(flow: Flow, node: Node) -> bool:
    """Say whether a convolution goes from a map to one position."""
    shapes = [flow.record.nodes[i].shape for i in node.inputs]
    return node.op in FC_OPS and positions(node.shape) == 1 and any(positions(s) > 1 for s in shapes)


def _to_maps(walk: _Walk, index: int, dims: int, maps: dict[int, int]) -> None:
    """Walk on from a pool's input, through further pools and anything elementwise, to the map itself."""
    nodes = walk.flow.record.nodes
    queue = [(index, dims)]
    while queue:
        current, taken = queue.pop()
        if walk.flow.roots[current] in maps:
            # with one position, shapes do not tell how many axes were pooled
            if positions(nodes[current].shape) == 1 and taken < len(nodes[current].shape) - 2:
                raise NoSqueezeError(ONE_AXIS)
            walk.sources.add(walk.flow.roots[current])
            continue
        node = nodes[current]
        op = base(node.op)
        if op not in POOLS and op not in VIEWS and op not in ELEMENTWISE:
            raise NoSqueezeError(OTHER)
        if current in walk.pooled:
            continue
        walk.pooled.add(current)
        if len(walk.pooled) > LIMIT:
            raise NoSqueezeError(OTHER)
        more = _axes(node) if op in POOLS else 0
        for before in node.inputs:
            merged = len(nodes[before].shape) - len(node.shape) if "view" in op or op == "reshape" else 0
            queue.append((before, taken + more + max(0, merged)))


def _axes(node: Node) -> int:
    """Return how many axes a pool takes away."""
    if "pool2d" in node.op:
        return 2
    given = node.args[1:]
    axes = next((a for a in given if isinstance(a, tuple)), None)
    return len(axes) if axes else 1
