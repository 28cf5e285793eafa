"""Folding: a gate becomes one constant per channel, absorbed into a layer where that changes nothing else.

With the constant a (C,) for the gate of a site, v = a·u. The SE block is then taken out, and a goes, in this order of
preference, into the layer that makes u (scale and shift of a BN, rows and bias of a convolution), into the convolution
that alone reads v (its input columns), or, where neither is exact, into a depthwise 1×1 convolution that stands
where the block stood. Absorbing is exact where everything between commutes with a positive scale per channel and
nothing else reads what lies between.

Shapes: N images, C channels, H×W positions.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from se_prune.artifact import CONV_TYPES, NORM_TYPES, replace_blocks
from se_prune.errors import SurgeryError, nearest
from se_prune.gates.flow import positions
from se_prune.gates.sites import find_sites
from se_prune.gates.trace import Node, Trace, trace
from se_prune.records import Coupling, FoldKind, GateSite, Plan
from se_prune.surgery.constants import chain_to_gate, first_is_unused, gate_levels
from se_prune.surgery.lost import lost_channels

#: Operations f of one feature map with f(a·x) = a·f(x) for a ≥ 0 per channel.
COMMUTING = frozenset(
    {
        "relu", "relu_", "leaky_relu", "leaky_relu_", "_prelu_kernel", "prelu", "native_dropout", "dropout",
        "max_pool2d", "max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_avg_pool2d",
        "alias", "detach", "clone", "contiguous", "_to_copy",
    }
)  # fmt: skip
NORM_OPS = frozenset(
    {"native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "batch_norm"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How a site can be folded: `owner` is taken out, and its constant goes into `layer`.

    `maker`: into the rows of the layer that makes u; `consumer`: into the columns of the one that reads v; `scale`:
    a depthwise 1×1 convolution takes the owner's place, and `layer` is the owner; `constant`: the owner is the gate's
    last layer, which gives a constant, and the `unused` first one goes away. `operations` of one forward pass go away;
    the map has `channels` and `positions`.
    """

    owner: str
    kind: Literal["maker", "consumer", "scale", "constant"]
    layer: str
    operations: int
    channels: int
    positions: int
    unused: str | None = None

    @property
    def note(self) -> str:
        """Say in a few words where the constant goes."""
        if self.kind == "constant":
            return f"in place of {self.layer}"
        return "into a 1×1 depthwise convolution" if self.kind == "scale" else f"into {self.layer}"


@dataclass(slots=True, kw_only=True)
class Ways:
    """By site: how it can be folded, or why it cannot."""

    found: dict[str, Way] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def find_ways(model: nn.Module, example: torch.Tensor, sites: Sequence[GateSite]) -> Ways:
    """Say of every gate site how it can be folded.

    Args:
        model: The network; left as it is.
        example: Images (N, C, H, W) of its input size.
        sites: Its gate sites, as `find_sites` gives them.
    """
    signatures = _Signatures(model, {site.owner for site in sites})
    try:
        record = trace(model, example)
    finally:
        signatures.close()
    graph = _Graph(record, model)
    result = Ways()
    for site in sites:
        way = "its multiply is in the network's own forward" if not site.owner else _way(graph, site)
        if not isinstance(way, str) and site.owner not in signatures.plain:
            way = f"{site.owner} takes or returns more than one map"
        if isinstance(way, str):
            way = _constant(graph, record, site, way)
        if isinstance(way, str):
            result.refused[site.name] = way
        else:
            result.found[site.name] = way
    return result


class _Signatures:
    """Notes which modules take one tensor, and nothing else, to one tensor, as what replaces them does."""

    def __init__(self, model: nn.Module, names: Collection[str]) -> None:
        self.plain: set[str] = set()
        modules = dict(model.named_modules())
        self.handles = [
            modules[name].register_forward_hook(self._hook(name), with_kwargs=True) for name in names if name
        ]

    def _hook(self, name: str) -> Any:
        def look(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            tensors = [isinstance(value, torch.Tensor) for value in (*args, output)]
            if tensors == [True, True] and not named:
                self.plain.add(name)

        return look

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


class _Graph:
    """A trace with the readers of every operation, and the modules that it names."""

    def __init__(self, record: Trace, model: nn.Module) -> None:
        self.nodes = record.nodes
        self.modules = dict(model.named_modules())
        self.readers: dict[int, set[int]] = defaultdict(set)
        self.uses: dict[str, int] = defaultdict(int)
        for index, node in enumerate(record.nodes):
            for previous in node.inputs:
                self.readers[previous].add(index)
            for layer in set(node.layers):
                self.uses[layer] += 1

    def absorbs(self, node: Node) -> str | None:
        """Return the one layer whose parameters an operation takes as they are, if it can be scaled."""
        names = set(node.layers)
        if len(names) != 1 or len(node.inputs) != 1:
            return None
        (name,) = names
        module = self.modules.get(name)
        kinds = NORM_TYPES if node.op in NORM_OPS else CONV_TYPES
        if self.uses[name] != 1 or not isinstance(module, kinds):
            return None
        return name if isinstance(module._parameters.get("weight"), nn.Parameter) else None


def _way(graph: _Graph, site: GateSite) -> Way | str:
    """Return how a site can be folded, or why it cannot."""
    block = _block(graph, site)
    if isinstance(block, str):
        return block
    multiply, features, inside = block
    shape = graph.nodes[multiply].shape
    if site.channels != shape[1]:
        return "its gate does not have one value per channel"
    kind: Literal["maker", "consumer", "scale"] = "scale"
    layer = None
    if _may_be_shared(graph, multiply, features, inside):
        layer = _maker(graph, features, inside)
        kind = "maker"
        if layer is None:
            layer, kind = _consumer(graph, multiply), "consumer"
    return Way(
        owner=site.owner,
        kind=kind if layer is not None else "scale",
        layer=layer or site.owner,
        operations=len(inside),
        channels=site.channels,
        positions=positions(shape),
    )


def _constant(graph: _Graph, record: Trace, site: GateSite, reason: str) -> Way | str:
    """Return how a site whose block cannot be taken out is folded where it stands, or why it cannot."""
    chain = chain_to_gate(record, site, graph.modules)
    if isinstance(chain, str):
        return f"{reason}, and {chain}"
    assert site.expand is not None
    unused = site.reduce if first_is_unused(record, chain, site) else None
    shape = record.nodes[chain[0]].shape
    return Way(
        owner=site.expand,
        kind="constant",
        layer=site.expand,
        operations=1 if unused is None else 2,
        channels=shape[1],
        positions=positions(shape),
        unused=unused,
    )


def _block(graph: _Graph, site: GateSite) -> tuple[int, int, set[int]] | str:
    """Return the multiply, its features and all operations of an owner that does v = s(u)·u and nothing else."""
    nodes, owner = graph.nodes, site.owner
    own = [i for i, n in enumerate(nodes) if n.module == owner]
    inside = {i for i, n in enumerate(nodes) if n.module == owner or n.module.startswith(f"{owner}.")}
    inside -= {i for i in inside if nodes[i].op == "empty"}
    if any(nodes[i].call != site.call for i in own) or site.call:
        return f"{owner} runs more than once"
    found = [i for i in own if nodes[i].multiply == site.multiply and nodes[i].op in {"mul", "mul_"}]
    more = f"{owner} does more than compute the gate and multiply"
    if not found:
        return more
    multiply = found[0]
    features = nodes[multiply].operands[1 - site.gate_operand]
    strangers = {n for i in inside for n in nodes[i].layers if n != owner and not n.startswith(f"{owner}.")}
    if features is None or features in inside or max(inside) != multiply or strangers:
        return more
    if any(p != features and p not in inside for i in inside for p in nodes[i].inputs):
        return more
    if any(reader not in inside for i in inside - {multiply} for reader in graph.readers[i]):
        return more
    return multiply, features, inside


def _may_be_shared(graph: _Graph, multiply: int, features: int, inside: set[int]) -> bool:
    """Say whether u may take the place of v, which whoever reads v might overwrite."""
    index, overwritten = multiply, False
    while not overwritten:
        readers = graph.readers[index]
        overwritten = any(graph.nodes[r].op.endswith("_") for r in readers)
        views = [r for r in readers if graph.nodes[r].op in {"alias", "detach", "view", "expand"}]
        if not views:
            break
        index = views[0]
    made_by_layer = graph.nodes[features].op in NORM_OPS | {"convolution"}
    return not overwritten or (made_by_layer and graph.readers[features] <= inside)


def _maker(graph: _Graph, features: int, inside: Collection[int]) -> str | None:
    """Walk back from u to the BN or convolution that makes it for the site alone."""
    index, allowed = features, set(inside)
    while graph.readers[index] <= allowed:
        node = graph.nodes[index]
        if node.op in NORM_OPS or node.op == "convolution":
            return graph.absorbs(node)
        if node.op not in COMMUTING or len(node.inputs) != 1:
            return None
        allowed, index = {index}, node.inputs[0]
    return None


def _consumer(graph: _Graph, multiply: int) -> str | None:
    """Walk on from v to the convolution that alone reads it."""
    index = multiply
    while len(graph.readers[index]) == 1:
        (following,) = graph.readers[index]
        node = graph.nodes[following]
        if node.op == "convolution":
            return graph.absorbs(node)
        if node.op not in COMMUTING or len(node.inputs) != 1:
            return None
        index = following
    return None


@torch.no_grad()
def fold(
    model: nn.Module, example: torch.Tensor, constants: Mapping[str, torch.Tensor]
) -> tuple[nn.Module, dict[str, FoldKind]]:
    """Return a copy of a network in which the gates of some sites are constants, and what stands in their place.

    Args:
        model: The network, cut or not; left as it is.
        example: Images (N, C, H, W) of its input size, on its device.
        constants: Per site a constant (C,) for each channel that the network has there, at least 0.

    Returns:
        The folded network, and per module that was taken out (by name) what replaced it.

    Raises:
        SurgeryError: A site is unknown or cannot be folded, or a constant is not a number of at least 0.
    """
    result = copy.deepcopy(model)
    if not constants:
        return result, {}
    image = example.to(next(model.parameters()))
    sites = {site.name: site for site in find_sites(model, image)}
    for name in constants:
        if name not in sites:
            raise SurgeryError(f"the network has no gate site '{name}'{nearest(name, sites)}.")
    ways = find_ways(model, image, [sites[name] for name in constants])
    kinds: dict[str, FoldKind] = {}
    for name, value in constants.items():
        if name in ways.refused:
            raise SurgeryError(f"the gate of '{name}' cannot be folded: {ways.refused[name]}.")
        way = ways.found[name]
        _require_constants(name, value, way.channels)
        kinds[way.owner] = way.kind if way.kind in {"scale", "constant"} else "identity"
        if way.unused is not None:
            kinds[way.unused] = "unused"
    modules = dict(result.named_modules())
    values = dict(constants)
    for name, value in constants.items():
        way = ways.found[name]
        if way.kind == "constant":
            values[name] = gate_levels(model, image, sites[name], value)
        elif way.kind != "scale":
            _absorb(modules[way.layer], value, into_rows=way.kind == "maker")
    replace_blocks(result, kinds, {ways.found[name].owner: value for name, value in values.items()})
    return result, kinds


def _require_constants(name: str, value: torch.Tensor, channels: int) -> None:
    if value.shape != (channels,):
        raise SurgeryError(
            f"the gate of '{name}' has {channels} channels, got constants of shape {tuple(value.shape)}; plan it again."
        )
    if not bool((torch.isfinite(value) & (value >= 0)).all()):
        raise SurgeryError(f"the constants of '{name}' must be numbers of at least 0; plan it again.")


def _absorb(module: nn.Module, value: torch.Tensor, *, into_rows: bool) -> None:
    """Multiply a layer's output channels, or its input channels, by a constant each (C,), in float64."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    a = value.to(device=weight.device, dtype=torch.float64)
    if into_rows:
        for tensor in (weight, module.bias):
            if isinstance(tensor, nn.Parameter):
                tensor.copy_(tensor.double() * a.view(-1, *[1] * (tensor.ndim - 1)))
        return
    assert isinstance(module, CONV_TYPES)
    groups = module.groups
    split = weight.double().reshape(groups, -1, *weight.shape[1:])  # (groups, rows, columns, kernel…)
    columns = a.view(groups, 1, -1, *[1] * (weight.ndim - 2))
    weight.copy_((split * columns).flatten(0, 1))


def planned_constants(plan: Plan) -> dict[str, torch.Tensor]:
    """Return the constants (C,) of every site that a plan folds, in the dense network's channels."""
    return {
        site.name: torch.tensor(site.constants, dtype=torch.float64)
        for site in plan.sites
        if site.action == "fold"
    }


def kept_constants(
    plan: Plan, sites: Sequence[GateSite], couplings: Sequence[Coupling]
) -> dict[str, torch.Tensor]:
    """Return the constants of every site that a plan folds, of those channels that the plan leaves there.

    Args:
        plan: What leaves.
        sites: The gate sites of the dense network.
        couplings: Its channel groups.

    Raises:
        SurgeryError: A site is unknown, or has another number of channels.
    """
    lost = lost_channels(plan, couplings)
    by_name = {site.name: site for site in sites}
    result = {}
    for name, value in planned_constants(plan).items():
        if name not in by_name or len(value) != by_name[name].channels:
            raise SurgeryError(
                f"the plan folds '{name}', which this network does not have in that size; plan it again."
            )
        gone = lost[by_name[name].expand or ""]
        result[name] = value[[i for i in range(len(value)) if i not in gone]]
    return result
