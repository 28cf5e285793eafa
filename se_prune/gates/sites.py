"""Finding gate sites: every multiply of a feature map by a gate computed from that map's own pooled values."""

from __future__ import annotations

import collections
import math
from dataclasses import replace

import torch
from torch import nn

from se_prune.gates.trace import Node, Trace, trace
from se_prune.records import GateSite

FC_OPS = frozenset({"convolution", "addmm", "mm", "bmm", "linear", "conv1d", "conv2d"})
#: Operations that keep each channel to itself: walking through them stays with the same feature map.
CHANNELWISE = frozenset(
    {
        "relu", "relu_", "silu", "silu_", "hardswish", "hardswish_", "gelu", "sigmoid", "hardtanh", "hardtanh_",
        "clamp", "clamp_", "clamp_min", "clamp_min_", "leaky_relu", "leaky_relu_", "elu", "elu_", "mish", "mish_",
        "tanh", "native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "batch_norm",
        "alias", "detach", "clone", "contiguous", "_to_copy", "native_dropout", "dropout", "add", "mul", "div",
        "view", "_unsafe_view", "expand",
    }
)  # fmt: skip
GATE_ACTIVATIONS = frozenset(
    {"sigmoid", "sigmoid_", "hardsigmoid", "hardsigmoid_", "clamp", "clamp_", "div", "hardtanh"}
)


def positions(shape: tuple[int, ...]) -> int:
    """Return how many positions H·W a tensor (N, C, H, W) has; 1 for (N, C)."""
    return math.prod(shape[2:])


def find_sites(model: nn.Module, example: torch.Tensor) -> tuple[GateSite, ...]:
    """Find the gate sites of a network from one forward pass.

    Args:
        model: Any eager network; it is run in eval mode without gradients and left as it was.
        example: Images (N, C, H, W) of the network's input size.

    Returns:
        The sites in the order in which they run. Empty where there is none.
    """
    record = trace(model, example)
    sites: list[GateSite] = []
    used: collections.Counter[str] = collections.Counter()
    for node in record.nodes:
        if node.op not in {"mul", "mul_"} or node.multiply is None or len(node.operands) < 2:
            continue
        site = _site(record, node, 1) or _site(record, node, 0)
        if site is not None:
            used[site.name] += 1
            times = used[site.name]
            sites.append(site if times == 1 else replace(site, name=f"{site.name}#{times}"))
    return tuple(sites)


def _site(record: Trace, node: Node, operand: int) -> GateSite | None:
    """Return the site of a multiply whose `operand` is the gate, or None if it is no gate."""
    gate_index, features_index = node.operands[operand], node.operands[1 - operand]
    if gate_index is None or features_index is None or gate_index == features_index:
        return None
    gate_index = _unexpanded(record, gate_index)
    if len(node.shape) != 4 or positions(node.shape) == 1 or positions(record.nodes[gate_index].shape) != 1:
        return None
    path = _path_to_squeeze(record, gate_index)
    if path is None or not _same_map(record, path[0], features_index):
        return None
    steps = [record.nodes[i] for i in path[1]]
    layers = [i for i, step in enumerate(steps) if step.op in FC_OPS and step.layers]
    if not layers:
        return None
    activation = next((step.op for step in steps[layers[-1] :] if step.op in GATE_ACTIVATIONS), None)
    if activation is None:
        return None
    first, last = steps[layers[0]], steps[layers[-1]]
    two = len(layers) > 1
    expand = last.layers[0]
    inside = expand.startswith(f"{node.module}.")
    return GateSite(
        name=node.module if inside else expand.rpartition(".")[0] or expand,
        owner=node.module,
        call=node.call,
        multiply=node.multiply or 0,
        gate_operand=operand,
        channels=node.shape[1],
        hidden=first.shape[1] if two else 0,
        reduce=first.layers[0] if two else None,
        expand=expand,
        features=_maker(record, features_index),
        gate_activation=activation,
    )


def _unexpanded(record: Trace, index: int) -> int:
    while record.nodes[index].op in {"expand", "alias"} and record.nodes[index].inputs:
        index = record.nodes[index].inputs[0]
    return index


def _path_to_squeeze(record: Trace, gate: int) -> tuple[int, list[int]] | None:
    """Walk back from the gate to the one map that its squeeze pooled; None if it depends on anything else."""
    seen: set[int] = set()
    queue, sources = [gate], set()
    while queue:
        index = queue.pop()
        if index in seen:
            continue
        seen.add(index)
        node = record.nodes[index]
        if not node.inputs:
            return None
        for previous in node.inputs:
            if positions(record.nodes[previous].shape) > 1 and len(record.nodes[previous].shape) == 4:
                sources.add(previous)
            else:
                queue.append(previous)
        if len(seen) > 64:
            return None
    if len(sources) != 1:
        return None
    return sources.pop(), sorted(seen)


def _ancestors(record: Trace, index: int, limit: int = 8) -> list[int]:
    found, queue = [], [(index, 0)]
    while queue:
        current, depth = queue.pop(0)
        found.append(current)
        node = record.nodes[current]
        if node.op in CHANNELWISE and depth < limit:
            queue.extend((i, depth + 1) for i in node.inputs if record.nodes[i].shape == node.shape)
    return found


def _same_map(record: Trace, first: int, second: int) -> bool:
    a, b = _ancestors(record, first), _ancestors(record, second)
    return first in b or second in a or bool(set(a) & set(b))


def _maker(record: Trace, index: int) -> str | None:
    for current in _ancestors(record, index):
        node = record.nodes[current]
        if node.op == "convolution" and node.layers:
            return node.layers[0]
    return None
