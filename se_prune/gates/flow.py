"""What follows from a trace about every value in it: which map it is, whether it varies by position, its bounds.

Each is worked out once, node by node in the order in which they ran, so the work grows with the network's length
alone. N images, C channels, H×W positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from se_prune.gates.bounds import Bounds, bounds_of
from se_prune.gates.ops import BROADCASTS, ELEMENTWISE, base
from se_prune.gates.trace import Node, Trace


def positions(shape: tuple[int, ...]) -> int:
    """Return how many positions H·W a tensor (N, C, H, W) has; 1 for (N, C)."""
    return math.prod(shape[2:])


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """Facts by node: `live`, `roots`, `uniform`, `bounds`.

    `live`: it depends on the image. `roots`: the node that made the map, before any elementwise operation on it
    alone; two maps with the same root are the same map. `uniform`: one value per image and channel, whatever the
    shape. `bounds`: an interval that holds every value, from the operations alone.
    """

    record: Trace
    live: tuple[bool, ...]
    roots: tuple[int, ...]
    uniform: tuple[bool, ...]
    bounds: tuple[Bounds, ...]


def follow(record: Trace) -> Flow:
    """Work out the facts of every node of a trace."""
    live: list[bool] = []
    roots: list[int] = []
    uniform: list[bool] = []
    bounds: list[Bounds] = []
    for index, node in enumerate(record.nodes):
        live.append(index == 0 or any(live[i] for i in node.inputs))
        roots.append(_root(record, index, roots))
        uniform.append(_is_uniform(record, node, uniform))
        bounds.append(bounds_of(node, bounds))
    return Flow(
        record=record, live=tuple(live), roots=tuple(roots), uniform=tuple(uniform), bounds=tuple(bounds)
    )


def _root(record: Trace, index: int, roots: list[int]) -> int:
    node = record.nodes[index]
    if base(node.op) not in ELEMENTWISE:
        return index
    found = {roots[i] for i in node.inputs if record.nodes[i].shape == node.shape}
    return found.pop() if len(found) == 1 else index


def _is_uniform(record: Trace, node: Node, uniform: list[bool]) -> bool:
    if len(node.shape) < 2:
        return False
    if positions(node.shape) == 1:
        return True
    if node.op in BROADCASTS:
        return len(node.inputs) == 1 and uniform[node.inputs[0]]
    full = [i for i in node.inputs if len(record.nodes[i].shape) > 1]
    # a parameter may be a map of its own
    return (
        base(node.op) in ELEMENTWISE and bool(full) and not node.parameters and all(uniform[i] for i in full)
    )
