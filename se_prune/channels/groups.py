"""Channel groups of a network as plain records."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from se_prune.artifact import CONV_TYPES
from se_prune.channels.graph import OUT_FNS, build_graph, expands, found_groups, role_of
from se_prune.gates.shuffles import shuffled_layers
from se_prune.gates.trace import trace
from se_prune.records import ChannelGroup, Coupling, GateSite, GroupKind, LayerSlice


def couplings(model: nn.Module, example: torch.Tensor, sites: Sequence[GateSite]) -> tuple[Coupling, ...]:
    """Find the channel groups of a network.

    Args:
        model: The network; left as it is.
        example: Images (N, C, H, W) of its input size, on its device.
        sites: Its gate sites; they decide which groups are gated and which are hidden units.

    Raises:
        SurgeryError: torch-pruning cannot trace the network.
    """
    names = {module: name for name, module in model.named_modules()}
    graph = build_graph(model, example)
    groups = list(found_groups(graph, names, expands(sites)))
    endless = set().union(*(members for _, _, members in groups))
    order = {name: position for position, name in enumerate(names.values())}
    shuffled = shuffled_layers(trace(model, example))
    found = [
        _endless(names[root], graph.get_out_channels(root))
        if group is None or any(i.dep.target.module in endless for i in group if i.dep.handler in OUT_FNS)
        else _coupling(graph, group, names, sites, shuffled)
        for root, group, _ in groups
    ]
    return tuple(sorted(found, key=lambda c: order[c.group.name]))


def _endless(name: str, channels: int) -> Coupling:
    """Return the group of a layer that torch-pruning cannot follow; what else belongs to it is not known."""
    info = ChannelGroup(
        name=name,
        kind="inner",
        channels=channels,
        members=(name,),
        prunable=False,
        reason="torch-pruning follows its channels without end",
    )
    every = tuple(range(channels))
    return Coupling(group=info, slices=(LayerSlice(layer=name, role="out", index=every, root=every),))


def _coupling(
    graph: Any,
    group: Any,
    names: Mapping[nn.Module, str],
    sites: Sequence[GateSite],
    shuffled: Collection[str],
) -> Coupling:
    slices: list[LayerSlice] = []
    reasons: list[str] = []
    modules: dict[str, nn.Module] = {}
    for item in group.items:
        module, handler = item.dep.target.module, item.dep.handler
        if isinstance(module, nn.Parameter):
            reasons.append("a bare parameter depends on it")
            continue
        if module not in names:
            continue
        role = role_of(module, handler)
        if role is None:
            if any(True for _ in module.parameters(recurse=False)):
                reasons.append(f"{names[module]} is a {type(module).__name__}")
            continue
        modules[names[module]] = module
        root = [-1 if r is None else int(r) for r in item.root_idxs]
        slices.append(
            LayerSlice(layer=names[module], role=role, index=tuple(map(int, item.idxs)), root=tuple(root))
        )
    if any(piece.role == "out" and piece.layer in shuffled for piece in slices):
        reasons.append("a channel shuffle reorders its channels")
    channels = len(group[0].idxs)
    tied = _tied(channels, slices, modules)
    reasons += _refusals(slices, modules, channels, tied)
    if not reasons and not _independent(graph, group, names, slices, tied):
        reasons.append("some of its channels take others along")
    info = ChannelGroup(
        name=names[group[0].dep.target.module],
        kind=_kind(slices, sites),
        channels=channels,
        members=tuple(dict.fromkeys(s.layer for s in slices)),
        site=_site_of(slices, sites),
        prunable=not reasons,
        reason=reasons[0] if reasons else None,
        tied=tied,
    )
    return Coupling(group=info, slices=tuple(slices))


def _tied(channels: int, slices: Sequence[LayerSlice], modules: Mapping[str, nn.Module]) -> int:
    """Return how many channels leave together: a grouped convolution must lose as many of each of its groups."""
    units = channels
    for piece in slices:
        module = modules[piece.layer]
        if piece.role != "channelwise" and isinstance(module, CONV_TYPES) and module.groups > 1:
            units = math.gcd(units, len(piece.index) // module.groups)
    return channels // units


def _independent(
    graph: Any, group: Any, names: Mapping[nn.Module, str], slices: Sequence[LayerSlice], tied: int
) -> bool:
    """Say whether random halves of the channels touch exactly what the slices say of them.

    Where each channel takes another along, one half of n channels shows none of it with a chance of 2^(-n/2);
    few channels are therefore halved more often. What is missed here, `verify` refuses. Of channels that leave
    together (`tied`), all or none are taken.
    """
    root, channels = group[0].dep.target.module, len(group[0].idxs) // tied
    prune = graph.get_pruner_of_module(root).prune_out_channels
    generator = torch.Generator().manual_seed(0)
    for _ in range(max(1, 32 // channels) if channels > 1 else 0):
        units = torch.randperm(channels, generator=generator)[: channels // 2].tolist()
        half = [u + channels * i for u in units for i in range(tied)]
        found: dict[tuple[str, str], set[int]] = {}
        for item in graph.get_pruning_group(root, prune, sorted(half)).items:
            module = item.dep.target.module
            role = role_of(module, item.dep.handler) if module in names else None
            if role is not None:
                found.setdefault((names[module], role), set()).update(map(int, item.idxs))
        if found != _touched(slices, set(half)):
            return False
    return True


def _touched(slices: Sequence[LayerSlice], roots: Collection[int]) -> dict[tuple[str, str], set[int]]:
    """Return the channels of every layer, by role, that belong to some channels of the group."""
    result: dict[tuple[str, str], set[int]] = {}
    for piece in slices:
        touched = {i for i, root in zip(piece.index, piece.root, strict=True) if root in roots}
        if touched:
            result.setdefault((piece.layer, piece.role), set()).update(touched)
    return result


def _refusals(
    slices: Sequence[LayerSlice], modules: Mapping[str, nn.Module], channels: int, tied: int
) -> list[str]:
    reasons = []
    if not any(s.role == "in" for s in slices):
        reasons.append("output layer")
    for piece in slices:
        module = modules[piece.layer]
        if isinstance(module, CONV_TYPES) and module.groups > 1 and piece.role != "channelwise":
            width = module.in_channels if piece.role == "in" else module.out_channels
            if piece.index != piece.root or len(piece.index) != width:
                reasons.append(f"{piece.layer} is a grouped convolution of a concatenation")
            elif tied == channels:
                reasons.append(f"the groups of {piece.layer} have one channel each")
        if -1 in piece.root:
            reasons.append(f"the channels of {piece.layer} do not map one to one")
    return reasons


def _kind(slices: Sequence[LayerSlice], sites: Sequence[GateSite]) -> GroupKind:
    made = {s.layer for s in slices if s.role == "out"}
    if made & {site.reduce for site in sites}:
        return "hidden"
    gates = {site.expand for site in sites}
    if len(made - gates) > 1:
        return "stream"
    return "gated" if made & gates else "inner"


def _site_of(slices: Sequence[LayerSlice], sites: Sequence[GateSite]) -> str | None:
    made = {s.layer for s in slices if s.role == "out"}
    owners = [site.name for site in sites if site.reduce in made or site.expand in made]
    return owners[0] if len(owners) == 1 else None
