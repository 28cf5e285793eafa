"""Folding a gate whose multiply stands in the forward of a larger module: its last layer becomes a constant.

The multiply cannot be taken out of code that is not ours. But the last layer (`expand`) can be made to give what the
gate's activation turns into the constant, so that nothing depends on the squeeze and the first layer any more, and a
runtime that drops dead operations and folds constants drops them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import nn

from se_prune.artifact import CONV_TYPES
from se_prune.errors import SurgeryError
from se_prune.gates.bounds import bounds_of
from se_prune.gates.ops import FC_OPS
from se_prune.gates.trace import Node, Trace, trace
from se_prune.records import GateSite

#: Bisections, and how far from 0 the last layer's constant may be.
STEPS, FAR = 80, 60.0
#: Rounding of a gate.
CLOSE = 1e-9


def chain_to_gate(record: Trace, site: GateSite, modules: dict[str, nn.Module]) -> tuple[int, ...] | str:
    """Return the operations from a site's last layer to its gate, the layer's first, or why it cannot be a constant."""
    nodes = record.nodes
    readers: dict[int, int] = defaultdict(int)
    for node in nodes:
        for previous in set(node.inputs):
            readers[previous] += 1
    multiply = multiply_of(nodes, site)
    layer = modules.get(site.expand or "")
    if site.kind == "eca" or multiply is None or not isinstance(layer, (nn.Linear, *CONV_TYPES)):
        return "its last layer is no fully connected one"
    if sum(site.expand in node.layers and bool(node.inputs) for node in nodes) != 1:
        return f"{site.expand} runs more than once"
    steps: list[int] = []
    current = nodes[multiply].operands[site.gate_operand]
    while current is not None:
        if readers[current] != 1:
            return "its gate is read by more than its multiply"
        steps.append(current)
        if nodes[current].op in FC_OPS and site.expand in nodes[current].layers:
            return tuple(reversed(steps))
        if len(nodes[current].inputs) != 1 or nodes[current].parameters:
            break
        (current,) = nodes[current].inputs
    return "its gate is more than its last layer and an activation"


def multiply_of(nodes: Sequence[Node], site: GateSite) -> int | None:
    """Return the operation that is a site's own multiply, or None where there is no such one."""
    found = [
        i
        for i, n in enumerate(nodes)
        if (n.module, n.call, n.multiply) == (site.owner, site.call, site.multiply)
        and n.op in {"mul", "mul_"}
    ]
    return found[0] if len(found) == 1 else None


def first_is_unused(record: Trace, chain: Sequence[int], site: GateSite) -> bool:
    """Say whether nothing needs a site's first layer where its last one, at the front of the chain, is a constant."""
    nodes, reduce = record.nodes, site.reduce
    if reduce is None or sum(reduce in node.layers and bool(node.inputs) for node in nodes) != 1:
        return False
    readers = [set(node.inputs) for node in nodes]
    current = chain[0]
    while not (nodes[current].op in FC_OPS and reduce in nodes[current].layers):
        before = nodes[current].inputs
        own = current == chain[0] or not nodes[current].parameters
        if len(before) != 1 or not own or sum(before[0] in each for each in readers) != 1:
            return False
        (current,) = before
    return True


def gate_levels(
    model: nn.Module, example: torch.Tensor, site: GateSite, constants: torch.Tensor
) -> torch.Tensor:
    """Return what the last layer must give (C,) for the gate to be some constants (C,).

    The operations between never fall, so that halving an interval finds it.

    Raises:
        SurgeryError: The gate never is one of the constants.
    """
    record = trace(model, example)
    chain = chain_to_gate(record, site, dict(model.named_modules()))
    assert not isinstance(chain, str)
    levels = []
    for constant in constants.double().tolist():
        low, high = -FAR, FAR
        for _ in range(STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if _gate(record, chain, middle) < constant else (low, middle)
        if not abs(_gate(record, chain, high) - constant) <= CLOSE:
            raise SurgeryError(
                f"the gate of '{site.name}' is never {constant:.4g}, so that it cannot be folded; leave it out."
            )
        levels.append(high)
    return torch.tensor(levels, dtype=torch.float64)


def _gate(record: Trace, chain: Sequence[int], level: float) -> float:
    """Return the gate where the last layer gives `level`."""
    known = {chain[0]: (level, level)}
    for index in chain[1:]:
        known[index] = bounds_of(record.nodes[index], known)
    low, high = known[chain[-1]]
    return low if math.isclose(low, high, rel_tol=1e-12, abs_tol=1e-300) else math.nan
