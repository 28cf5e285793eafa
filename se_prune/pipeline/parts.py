"""Where in a network a layer or an operation is: stem, a stage, SE blocks, head.

A stage is what works at one resolution. The stem is what runs before the modules that hold the gate sites, the head
what runs after them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from se_prune.records import GateSite
from se_prune.results import OperationTime
from se_prune.runtimes.table import shapes_of

STEM, GATES, HEAD = "stem", "SE blocks", "head"
#: Python between the modules of an eager network.
BETWEEN = "between modules"
#: How a squeeze begins, and what ends a gate, in a graph.
SQUEEZES = frozenset({"ReduceMean", "ReduceMax", "GlobalAveragePool", "GlobalMaxPool"})
MULTIPLY = "Mul"


def layer_parts(model: nn.Module, example: torch.Tensor, sites: Sequence[GateSite]) -> dict[str, str]:
    """Return the part of every convolution and linear layer, in the order in which they run.

    Args:
        model: A dense network.
        example: One image (1, C, H, W).
        sites: Its gate sites.
    """
    shapes = shapes_of(model, example)
    gates = {name for site in sites for name in site.layers}
    main = [name for name in shapes if name not in gates]
    tops = {_first(site.name) for site in sites} or {_first(name) for name in main[1:-1]}
    stem = _leading(main, tops)
    head = _trailing([name for name in main if name not in stem], tops, shapes)
    sizes = list(dict.fromkeys(shapes[name].size for name in main if name not in stem | head))
    result = {}
    for name, shape in shapes.items():
        if name in gates:
            result[name] = GATES
        elif name in stem:
            result[name] = STEM
        elif name in head:
            result[name] = HEAD
        else:
            result[name] = f"stage {sizes.index(shape.size) + 1}, {shape.size[0]} × {shape.size[1]}"
    return result


def _first(name: str, parts: int = 1) -> str:
    return ".".join(name.split(".")[:parts])


def _leading(main: Sequence[str], tops: set[str]) -> set[str]:
    """Return the layers before the first in a module with gate sites, else those of the first layer's module."""
    found = set()
    for name in main:
        if _first(name) in tops:
            break
        found.add(name)
    return found or {name for name in main[:-1] if _first(name, 2) == _first(main[0], 2)}


def _trailing(main: Sequence[str], tops: set[str], shapes: Mapping[str, object]) -> set[str]:
    """Return the layers after the last in a module with gate sites, and those that see no map any more."""
    found = set()
    for name in reversed(main):
        if _first(name) in tops and getattr(shapes[name], "size", None) != (1, 1):
            break
        found.add(name)
    return found


def gate_modules(sites: Sequence[GateSite]) -> tuple[str, ...]:
    """Return the modules that hold the layers of a gate and nothing else, by name."""
    found: list[str] = []
    for site in sites:
        owners = {name.rpartition(".")[0] for name in site.layers}
        if len(site.layers) > 1 and len(owners) == 1 and "" not in owners:
            found += owners
    return tuple(dict.fromkeys(found))


def part_operations(
    operations: Sequence[OperationTime], parts: Mapping[str, str], sites: Sequence[GateSite]
) -> tuple[OperationTime, ...]:
    """Return a profile with the part of every operation.

    What has no layer belongs to the layer before it; in a graph the squeeze before and the multiply after the layers of
    a gate belong to the gate.

    Args:
        operations: In the order in which they run.
        parts: As `layer_parts`, of the dense network.
        sites: The dense network's gate sites.
    """
    gates = gate_modules(sites)
    first = next(iter(parts.values()), STEM)
    names = [_own_part(operation, parts, gates) for operation in operations]
    result: list[str] = []
    main, after_gate, squeeze = first, False, None
    for i, (operation, own) in enumerate(zip(operations, names, strict=True)):
        if own is None:
            result.append(GATES if after_gate else main)
            if operation.kind in SQUEEZES:
                squeeze = i
            if operation.kind == MULTIPLY:
                after_gate = False
            continue
        if own == GATES and operation.layer is not None:
            if not after_gate and squeeze is not None:
                result[squeeze:] = [GATES] * (i - squeeze)
            squeeze = None
            after_gate = operation.name != operation.layer  # the multiply of an eager network is in no module
        elif own not in {GATES, BETWEEN}:
            main, after_gate, squeeze = own, False, None
        result.append(own)
    return tuple(replace(operation, part=part) for operation, part in zip(operations, result, strict=True))


def _own_part(operation: OperationTime, parts: Mapping[str, str], gates: Sequence[str]) -> str | None:
    name = operation.layer or operation.name
    if name in parts:
        return parts[name]
    if any(name == gate or name.startswith(f"{gate}.") for gate in gates):
        return GATES
    return BETWEEN if operation.name.endswith("outside of modules") else None
