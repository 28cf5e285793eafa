"""Finding gate sites: every multiply of a feature map by a gate computed from that map's own pooled values.

A gate has one value per image and channel, in [0, 1] or a multiple of it; between the squeeze and the gate stand one
or two learned layers. What looks like a gate and is none is reported with the reason. N images, C channels, H×W
positions.
"""

from __future__ import annotations

import collections
import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from se_prune.gates.bounds import CLIPS, RISING
from se_prune.gates.flow import Flow, follow, positions
from se_prune.gates.ops import ELEMENTWISE, FC_OPS, SOFTMAX, VIEWS, base
from se_prune.gates.squeeze import NoSqueezeError, Squeeze, find_squeeze
from se_prune.gates.trace import Node, trace
from se_prune.records import GateSite, LeftAlone, SiteKind

#: Names of gate activations: functions that bound their values.
GATE_ACTIVATIONS = (RISING.keys() | CLIPS.keys()) - {"relu"}
UNREAD = "its multiply is none that Python calls (scripted code, einsum), so its gate cannot be read; write it u * s"
BRANCHES = "a softmax over branches: the gates share one sum and none closes by itself"


@dataclass(frozen=True, slots=True, kw_only=True)
class Discovery:
    """The gate sites of a network in the order in which they run, and what looks like one and was left alone."""

    sites: tuple[GateSite, ...]
    left_alone: tuple[LeftAlone, ...]


def find_sites(model: nn.Module, example: torch.Tensor) -> tuple[GateSite, ...]:
    """Return the gate sites of `discover`; empty where there is none."""
    return discover(model, example).sites


def discover(model: nn.Module, example: torch.Tensor) -> Discovery:
    """Find the gate sites of a network from one forward pass.

    Args:
        model: Any eager network; it is run in eval mode without gradients and left as it was.
        example: Images (N, C, H, W) of the network's input size.

    Returns:
        The sites, and the multiplies by something like a gate that are no site.
    """
    flow = follow(trace(model, example))
    sites: list[GateSite] = []
    left: list[LeftAlone] = []
    used: collections.Counter[str] = collections.Counter()
    for node in flow.record.nodes:
        found = _judge(flow, node) if base(node.op) == "mul" else None
        if isinstance(found, GateSite):
            used[found.name] += 1
            times = used[found.name]
            sites.append(found if times == 1 else replace(found, name=f"{found.name}#{times}"))
        elif found is not None:
            left.append(LeftAlone(name=node.module, shape=node.shape[1:], reason=found))
    return Discovery(sites=tuple(sites), left_alone=tuple(left))


def explain(site: GateSite) -> str:
    """Say in one line how a site pools, which layers make its gate, what it scales and where."""
    own = site.name.partition("#")[0]

    def short(layer: str) -> str:
        return layer.removeprefix(f"{own}.") or "parameters of the network itself"

    steps = [f"{site.squeeze} squeeze"]
    if site.reduce is not None:
        steps.append(f"{short(site.reduce)} ({site.hidden} hidden)")
    if site.expand is not None:
        steps.append(short(site.expand) + (" along the channels" if site.kind == "eca" else ""))
    steps.append(("" if site.scale == 1 else f"{site.scale:g}·") + site.gate_activation)
    scaled = site.features or f"a map of {site.channels} channels"
    where = "" if site.owner == own else f", multiplied in {site.owner or 'the network itself'}"
    return f"{' → '.join(steps)}, × {scaled}{where}"


def _judge(flow: Flow, node: Node) -> GateSite | str | None:
    """Return the site of a multiply, or why what looks like a gate is none, or None where nothing does."""
    if len(node.operands) < 2 or node.operands[0] is None or node.operands[1] is None:
        return None
    second = _verdict(flow, node, 1)
    if isinstance(second, GateSite):
        return second
    first = _verdict(flow, node, 0)
    return first if second is None or isinstance(first, GateSite) else second


def _verdict(flow: Flow, node: Node, operand: int) -> GateSite | str | None:
    """Judge a multiply by its `operand` as the gate."""
    gate, features = node.operands[operand], node.operands[1 - operand]
    if gate is None or features is None or not flow.live[gate] or len(node.shape) < 4:
        return None
    gate_shape, shape = flow.record.nodes[gate].shape, flow.record.nodes[features].shape
    if shape != node.shape or (flow.roots[gate] == flow.roots[features] and gate_shape == shape):
        return None  # the map that is scaled has the product's shape; x · f(x) is an activation
    low, high = flow.bounds[gate]
    bounded = math.isfinite(low) and math.isfinite(high)
    if not flow.uniform[gate] or len(gate_shape) != 4 or gate_shape[1] != shape[1]:
        return _other_shape(flow, gate, shape) if bounded else None
    return _by_channel(flow, node, operand, bounded)


def _by_channel(flow: Flow, node: Node, operand: int, bounded: bool) -> GateSite | str | None:
    """Judge a multiply by one value per image and channel."""
    gate, features = node.operands[operand], node.operands[1 - operand]
    assert gate is not None
    assert features is not None
    if bounded and _is_softmax(flow, gate):
        return BRANCHES
    try:
        squeeze = find_squeeze(flow, gate, features)
    except NoSqueezeError as error:
        return (str(error) if node.multiply is not None else UNREAD) if bounded else None
    fcs = _fcs(flow, squeeze.steps)
    reason = _refused(flow, node, gate, fcs)
    if reason is not None:
        return reason if bounded or fcs else None
    return _site(flow, node, operand, squeeze)


def _fcs(flow: Flow, steps: tuple[int, ...]) -> list[Node]:
    """Return the distinct layers among the steps; layers that average and maximum share are one."""
    distinct: dict[tuple[str, ...], Node] = {}
    for step in (flow.record.nodes[i] for i in steps):
        if step.op in FC_OPS and step.parameters:
            distinct.setdefault(step.parameters, step)
    return list(distinct.values())


def _other_shape(flow: Flow, gate: int, shape: tuple[int, ...]) -> str:
    """Say what kind of gate differs from one value per channel of a map `shape`."""
    found = flow.record.nodes[gate].shape
    if _is_softmax(flow, gate):
        return BRANCHES if len(shape) != 4 else "a softmax (attention)"
    if len(shape) != 4 or len(found) != 4:
        return f"its features {shape} are no map (N, C, H, W)"
    if found[1:3] == (1, 1) and found[3] == shape[3] > 1 < shape[1]:
        return "its channels come last; gates are measured on maps (N, C, H, W)"
    if found[1] == 1:
        kind = "image" if positions(found) == 1 else "position (a spatial gate)"
        return f"one value per {kind}, not per channel"
    if 1 in found[2:] and positions(shape) > 1 and found[2:] != shape[2:]:
        return "it differs along one axis of the map"
    return "it differs from position to position"


def _is_softmax(flow: Flow, index: int) -> bool:
    """Say whether a value is a softmax, but for views and arithmetic after it."""
    queue, seen = [index], set[int]()
    while queue and len(seen) < 32:
        current = queue.pop()
        node = flow.record.nodes[current]
        if node.op in SOFTMAX:
            return True
        seen.add(current)
        if base(node.op) in ELEMENTWISE | VIEWS | {"split", "select", "slice", "unbind"}:
            queue.extend(i for i in node.inputs if i not in seen)
    return False


def _refused(flow: Flow, node: Node, gate: int, fcs: list[Node]) -> str | None:
    """Return what keeps a per-channel gate of the map's own pooled values from being a site."""
    low, high = flow.bounds[gate]
    reasons = [
        (node.multiply is None, UNREAD),
        (not fcs, "no learned layer stands between squeeze and gate"),
        (len(fcs) > 2, f"{len(fcs)} learned layers stand between squeeze and gate, not one or two"),
        (low < 0 or math.isinf(high), "its values are not limited to [0, 1] or a multiple of it"),
        (high > 1 and low > high / 10, f"its values lie in [{low:.3g}, {high:.3g}]: it never closes"),
    ]
    return next((reason for holds, reason in reasons if holds), None)


def _site(flow: Flow, node: Node, operand: int, squeeze: Squeeze) -> GateSite:
    fcs = _fcs(flow, squeeze.steps)
    first, last = fcs[0], fcs[-1]
    gate, features = node.operands[operand], node.operands[1 - operand]
    assert gate is not None
    assert features is not None
    across = last.shape[1] != node.shape[1]
    kind: SiteKind = "eca" if across else "effective-se" if len(fcs) == 1 else "se"
    expand = last.layers[0]
    inside = expand.startswith(f"{node.module}.")
    hidden = first.shape[1] if across else math.prod(first.shape[1:])
    return GateSite(
        name=node.module if inside else expand.rpartition(".")[0] or expand,
        owner=node.module,
        call=node.call,
        multiply=node.multiply or 0,
        gate_operand=operand,
        channels=node.shape[1],
        hidden=hidden if len(fcs) > 1 else 0,
        reduce=first.layers[0] if len(fcs) > 1 else None,
        expand=expand,
        features=_maker(flow, features),
        gate_activation=_activation(flow, squeeze.steps, last),
        kind=kind,
        squeeze=squeeze.kind,
        scale=round(flow.bounds[gate][1], 2),
    )


def _activation(flow: Flow, steps: tuple[int, ...], last: Node) -> str:
    """Return the first function after the last layer that bounds its values."""
    nodes = [flow.record.nodes[i] for i in steps]
    after = nodes[max(i for i, node in enumerate(nodes) if node.parameters == last.parameters) + 1 :]
    return next((base(node.op) for node in after if base(node.op) in GATE_ACTIVATIONS), "other")


def _maker(flow: Flow, index: int) -> str | None:
    """Return the convolution whose output the features are, through elementwise operations."""
    nodes = flow.record.nodes
    queue, seen = collections.deque([(index, 0)]), {index}
    while queue:
        current, depth = queue.popleft()
        node = nodes[current]
        if node.op == "convolution" and node.layers:
            return node.layers[0]
        if base(node.op) in ELEMENTWISE and depth < 8:
            new = [i for i in node.inputs if nodes[i].shape == node.shape and i not in seen]
            seen.update(new)
            queue.extend((i, depth + 1) for i in new)
    return None
