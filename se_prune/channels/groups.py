"""Channel groups of a network as plain records."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from se_prune.artifact import CONV_TYPES, geometry
from se_prune.channels.graph import OUT_FNS, build_graph, expands, found_groups, role_of
from se_prune.channels.joints import follows, refusal, split_sizes
from se_prune.channels.shuffles import shuffle_of
from se_prune.channels.ties import Sharing, irregular, regular
from se_prune.computed import mixes_inputs, plain
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
    shuffles: list[tuple[int, dict[int, int]]] = []
    splits: list[tuple[tuple[int, ...], dict[int, int]]] = []
    for item in group.items:
        module, handler = item.dep.target.module, item.dep.handler
        if isinstance(module, nn.Parameter):
            reasons.append("a bare parameter depends on it")
            continue
        places = {int(i): -1 if r is None else int(r) for i, r in zip(item.idxs, item.root_idxs, strict=True)}
        groups = shuffle_of(module)
        if groups is not None:
            shuffles.append((groups, places))
        sizes, reason = split_sizes(item.dep.target), refusal(item.dep.target)
        if sizes is not None and not follows(item.dep.target):
            splits.append((sizes, places))
        if reason is not None:
            reasons.append(reason)
        if module not in names:
            continue
        role = role_of(module, handler)
        if role is None:
            if any(True for _ in module.parameters(recurse=False)):
                reasons.append(f"{names[module]} is a {type(module).__name__}")
            continue
        modules[names[module]] = module
        index = tuple(sorted(places))
        slices.append(
            LayerSlice(layer=names[module], role=role, index=index, root=tuple(places[i] for i in index))
        )
    if not shuffles and any(piece.role == "out" and piece.layer in shuffled for piece in slices):
        reasons.append("a channel shuffle reorders its channels")
    channels = len(group[0].idxs)
    reasons += ["it has one channel"] if channels == 1 else []
    reasons += _refusals(slices, modules)
    info = ChannelGroup(
        name=names[group[0].dep.target.module],
        kind=_kind(slices, sites),
        channels=channels,
        members=tuple(dict.fromkeys(s.layer for s in slices)),
        site=_site_of(slices, sites),
    )
    if not reasons:
        leave = functools.partial(_leaving, channels, slices, modules, shuffles, splits)
        info, reason = _in_units(graph, group, names, slices, info=info, leave=leave)
        reasons += [reason] if reason else []
    if reasons:
        info = dataclasses.replace(info, prunable=False, reason=reasons[0])
    return Coupling(group=info, slices=tuple(slices))


def _in_units(
    graph: Any,
    group: Any,
    names: Mapping[nn.Module, str],
    slices: Sequence[LayerSlice],
    *,
    info: ChannelGroup,
    leave: Callable[..., tuple[int, tuple[tuple[int, ...], ...], str | None]],
) -> tuple[ChannelGroup, str | None]:
    """Return a group with the channels that leave together, and why nothing can leave.

    Those that take one another along are looked for where single channels, or those that grouped convolutions and
    shuffles hold together, do more than the slices say.
    """
    along: list[list[int]] = []
    for _ in range(2):
        tied, units, reason = leave(along=along)
        info = dataclasses.replace(info, tied=tied, units=units)
        if reason is not None or _independent(graph, group, names, slices, info.together):
            return info, reason
        along = _taken_along(graph, group)
    return info, "some of its channels take others along"


def _leaving(
    channels: int,
    slices: Sequence[LayerSlice],
    modules: Mapping[str, nn.Module],
    shuffles: Sequence[tuple[int, Mapping[int, int]]],
    splits: Sequence[tuple[tuple[int, ...], Mapping[int, int]]],
    *,
    along: Sequence[Sequence[int]],
) -> tuple[int, tuple[tuple[int, ...], ...], str | None]:
    """Return how many channels leave together, the units where they are irregular, and why nothing can leave.

    `along` are channels that take one another along, every channel in one. They count where each takes one channel of
    every equal part, as a concatenation joins parts; where neighbours do, torch-pruning has guessed a reshape.
    """
    reason = _unfollowed(channels, shuffles, splits)
    if along and shuffles:
        reason = "some of its channels take others along"
    if reason is not None:
        return 1, (), reason
    rows = [list(row) for row in along] or [
        [places[p] for p in range(start, start + groups)]
        for groups, places in shuffles
        for start in range(0, channels, groups)
    ]
    sharings = [
        Sharing(groups=len(sizes), group_of={root: i // sizes[0] for i, root in places.items()})
        for sizes, places in splits
    ]
    narrow = []
    for piece in slices:
        module = modules[piece.layer]
        if isinstance(module, CONV_TYPES) and module.groups > 1 and piece.role != "channelwise":
            width = len(piece.index) // module.groups
            group_of = {root: i // width for i, root in zip(piece.index, piece.root, strict=True)}
            sharings.append(Sharing(groups=module.groups, group_of=group_of))
            narrow += [piece.layer] if module.groups == channels else []
    tied = regular(channels, sharings, rows)
    if tied is not None and (not rows or tied <= max(len(r) for r in rows) ** 2):
        return tied, (), None
    units = () if along else irregular(channels, sharings, rows)
    if units and len(units[0]) < channels:
        return len(units[0]), units, None
    reason = "no part of its channels leaves grouped convolutions and channel shuffles equal shares"
    if narrow:
        reason = f"the groups of {narrow[0]} have one channel each"
    return 1, (), "some of its channels take others along" if along else reason


def _unfollowed(
    channels: int,
    shuffles: Sequence[tuple[int, Mapping[int, int]]],
    splits: Sequence[tuple[tuple[int, ...], Mapping[int, int]]],
) -> str | None:
    """Say why shuffles and splits of a group's channels cannot be followed."""
    every = list(range(channels))
    if any(sorted(places) != every or sorted(places.values()) != every for _, places in shuffles):
        return "a channel shuffle reorders its channels among others"
    if len(shuffles) > 1:
        return "more than one channel shuffle reorders its channels"
    if any(len(set(sizes)) > 1 or len(places) != sum(sizes) for sizes, places in splits):
        return "a split into unequal parts, or of a concatenation, reads its channels"
    return None


def _is_grouped(module: nn.Module) -> bool:
    return isinstance(module, CONV_TYPES) and module.groups > 1


def _independent(
    graph: Any,
    group: Any,
    names: Mapping[nn.Module, str],
    slices: Sequence[LayerSlice],
    together: Sequence[Sequence[int]],
) -> bool:
    """Say whether random halves of the channels touch exactly what the slices say of them.

    Where each channel takes another along, one half of n channels shows none of it with a chance of 2^(-n/2);
    few channels are therefore halved more often. What is missed here, `verify` refuses. Of channels that leave
    together, all or none are taken.
    """
    root, units = group[0].dep.target.module, len(together)
    prune = graph.get_pruner_of_module(root).prune_out_channels
    generator = torch.Generator().manual_seed(0)
    for _ in range(max(1, 32 // units) if units > 1 else 0):
        half = [
            c for u in torch.randperm(units, generator=generator)[: units // 2].tolist() for c in together[u]
        ]
        found: dict[tuple[str, str], set[int]] = {}
        for item in graph.get_pruning_group(root, prune, sorted(half)).items:
            module = item.dep.target.module
            role = role_of(module, item.dep.handler) if module in names else None
            if role is not None:
                found.setdefault((names[module], role), set()).update(map(int, item.idxs))
        if found != _touched(slices, set(half)):
            return False
    return True


def _taken_along(graph: Any, group: Any) -> list[list[int]]:
    """Return which channels of a group take one another along, every channel in one list.

    So it is where a map is joined to what a depthwise convolution makes of it (GhostNet), and both are added to a
    stream.
    """
    root = group[0].dep.target.module
    prune = graph.get_pruner_of_module(root).prune_out_channels
    row_of: dict[int, list[int]] = {}
    for channel in range(len(group[0].idxs)):
        found = {channel}
        for item in graph.get_pruning_group(root, prune, [channel]).items:
            if item.dep.target.module is root and role_of(root, item.dep.handler) in {"out", "channelwise"}:
                found.update(map(int, item.idxs))
        row = sorted({c for f in found for c in row_of.get(f, [f])})
        row_of.update(dict.fromkeys(row, row))
    return [row for channel, row in sorted(row_of.items()) if row[0] == channel]


def _touched(slices: Sequence[LayerSlice], roots: Collection[int]) -> dict[tuple[str, str], set[int]]:
    """Return the channels of every layer, by role, that belong to some channels of the group."""
    result: dict[tuple[str, str], set[int]] = {}
    for piece in slices:
        touched = {i for i, root in zip(piece.index, piece.root, strict=True) if root in roots}
        if touched:
            result.setdefault((piece.layer, piece.role), set()).update(touched)
    return result


def _refusals(slices: Sequence[LayerSlice], modules: Mapping[str, nn.Module]) -> list[str]:
    reasons = []
    if not any(s.role == "in" for s in slices):
        reasons.append("output layer")
    for piece in slices:
        module = modules[piece.layer]
        width = _width(module, piece.role)
        if piece.index and not 0 <= piece.index[0] <= piece.index[-1] < width:
            reasons.append(f"torch-pruning numbers the channels of {piece.layer} wrongly")
        elif _is_grouped(module) and piece.role != "channelwise" and len(piece.index) != width:
            reasons.append(f"{piece.layer} is a grouped convolution of a concatenation")
        if piece.role == "in" and mixes_inputs(module) and plain(module) is None:
            reasons.append(f"{piece.layer} computes its weights from all its inputs together")
        if -1 in piece.root:
            reasons.append(f"the channels of {piece.layer} do not map one to one")
    return reasons


def _width(module: nn.Module, role: str) -> int:
    size = geometry(module)
    assert size is not None
    return size.in_channels if role == "in" else size.out_channels


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
