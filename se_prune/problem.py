"""What a planner may choose, and what a choice costs: groups, the widths they may have, and every layer between them.

`kept` and widths hold one number of channels per group; hidden units that follow others are settled by `settled`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from se_prune.records import Coupling, HiddenPolicy, LayerCost
from se_prune.timing import LatencyModel, LayerTimes

#: A group keeps at least this share of its channels, whatever the scores say.
FLOOR_SHARE = 1 / 16


@dataclass(slots=True, kw_only=True)
class Layer:
    """One layer and the groups that its inputs and outputs belong to."""

    name: str
    cost: LayerCost
    into: list[tuple[int, int]]  # (group, channels of the layer's input per channel of the group)
    out: list[tuple[int, int]]


@dataclass(slots=True, kw_only=True)
class Problem:
    """The groups that can be cut, what widths they may have, and the layers whose cost follows from these."""

    couplings: tuple[Coupling, ...]
    layers: list[Layer]
    options: list[tuple[int, ...]]  # allowed numbers of kept channels, descending, per group
    leader: list[int | None]  # the group whose width a hidden group follows
    hidden: HiddenPolicy
    near: list[tuple[Layer, ...]]  # per group, the layers whose cost changes with its width
    times: LayerTimes | None = None

    def follows(self, number: int) -> bool:
        """Say whether a group's width is not the planner's choice."""
        return self.couplings[number].group.kind == "hidden" and self.hidden != "prune"


def pose(
    couplings: Sequence[Coupling],
    costs: Mapping[str, LayerCost],
    round_to: int,
    min_channels: int,
    hidden: HiddenPolicy,
    *,
    times: LatencyModel | None = None,
) -> Problem:
    """Return the problem of some groups and layers; arguments are those of `planning.make_plan`."""
    chosen = tuple(c for c in couplings if c.group.prunable)
    layers = {name: Layer(name=name, cost=cost, into=[], out=[]) for name, cost in costs.items()}
    for number, coupling in enumerate(chosen):
        for piece in coupling.slices:
            if piece.layer not in layers:
                continue
            copies = max(1, len(piece.index) // coupling.group.channels)
            side = layers[piece.layer].into if piece.role == "in" else layers[piece.layer].out
            side.append((number, copies))
    leader = _leaders(chosen)
    return Problem(
        couplings=chosen,
        layers=list(layers.values()),
        options=[_options(c, 1 if c.group.kind == "hidden" else round_to, min_channels) for c in chosen],
        leader=leader,
        hidden=hidden,
        near=_near(list(layers.values()), leader),
        times=None if times is None else LayerTimes.of(times, costs),
    )


def _leaders(couplings: Sequence[Coupling]) -> list[int | None]:
    """Return per hidden group the group whose channels its site gates: the first that its `expand` makes."""
    maker: dict[str, int] = {}
    for number, coupling in enumerate(couplings):
        if coupling.group.kind != "hidden":
            for layer in coupling.layers("out"):
                maker.setdefault(layer, number)
    return [
        min((maker[layer] for layer in set(c.layers("in")) if layer in maker), default=None)
        if c.group.kind == "hidden"
        else None
        for c in couplings
    ]


def _near(layers: Sequence[Layer], leader: Sequence[int | None]) -> list[tuple[Layer, ...]]:
    """Return per group the layers in which it, or a hidden group that may follow it, has channels."""
    found: list[dict[str, Layer]] = [{} for _ in leader]
    for layer in layers:
        for number, _ in (*layer.into, *layer.out):
            found[number][layer.name] = layer
            ahead = leader[number]
            if ahead is not None:
                found[ahead][layer.name] = layer
    return [tuple(each.values()) for each in found]


def _options(coupling: Coupling, round_to: int, min_channels: int) -> tuple[int, ...]:
    group, together = coupling.group, coupling.group.together
    channels, tied = group.channels, group.tied
    floor = min(channels, max(min_channels, tied, math.ceil(channels * FLOOR_SHARE)))
    parts = sum(min(min_channels, len(part)) for part in branches(coupling))
    floor = max(floor, min(channels, tied * parts), channels - tied * len(together))
    inner = [k for k in range(channels - tied, floor - 1, -tied) if k % round_to == 0]
    return (channels, *inner)


def branches(coupling: Coupling) -> list[frozenset[int]]:
    """Return the units of each layer that has a part of the group's channels alone (a branch of a concatenation)."""
    unit_of = {c: number for number, unit in enumerate(coupling.group.together) for c in unit}
    every = len(coupling.group.together)
    found = {
        frozenset(unit_of[c] for c in piece.root if c in unit_of)
        for piece in coupling.slices
        if len(set(piece.root)) < coupling.group.channels
    }
    return sorted((part for part in found if 0 < len(part) < every), key=sorted)


def settled(problem: Problem, kept: Sequence[int]) -> list[int]:
    """Return kept channels per group, with hidden groups that follow set to what they follow."""
    return [_width(problem, kept, number) for number in range(len(kept))]


def _width(problem: Problem, kept: Sequence[int], number: int) -> int:
    if not problem.follows(number):
        return kept[number]
    hidden, leader = problem.couplings[number].group.channels, problem.leader[number]
    if leader is None or problem.hidden == "keep":
        return hidden
    share = kept[leader] / problem.couplings[leader].group.channels
    return max(problem.options[number][-1], math.ceil(hidden * share - 1e-9))


Widths = Sequence[int] | Mapping[int, int]


def _layer_widths(problem: Problem, layer: Layer, widths: Widths) -> tuple[int, int]:
    """Return the channels in and out of one layer at the given widths."""
    groups = problem.couplings
    out = layer.cost.out_channels - sum((groups[g].group.channels - widths[g]) * t for g, t in layer.out)
    into = layer.cost.in_channels - sum((groups[g].group.channels - widths[g]) * t for g, t in layer.into)
    return into, out


def _layer_cost(problem: Problem, layer: Layer, widths: Widths) -> tuple[int, int]:
    """Return (MACs, parameters) of one layer at the given widths."""
    cost = layer.cost
    into, out = _layer_widths(problem, layer, widths)
    share_out = cost.out_channels or 1
    weights = cost.weights * out // share_out
    macs = cost.macs * out // share_out
    if not cost.channelwise:
        weights = weights * into // (cost.in_channels or 1)
        macs = macs * into // (cost.in_channels or 1)
    return macs, weights + cost.biases * out // share_out


def totals(problem: Problem, kept: Sequence[int]) -> tuple[int, int]:
    """Return (MACs, parameters) of all layers."""
    widths = settled(problem, kept)
    pairs = [_layer_cost(problem, layer, widths) for layer in problem.layers]
    return sum(p[0] for p in pairs), sum(p[1] for p in pairs)


def saved(problem: Problem, before: Sequence[int], after: Sequence[int], number: int) -> tuple[float, float]:
    """Return what a change of one group's width alone saves: (MACs, parameters), or the milliseconds twice.

    Only the layers near the group are counted, so that looking at every group of a network in turn takes a time that
    grows with its depth, and not with the square of that.
    """
    ends = []
    for kept in (before, after):
        sums = [0.0, 0.0]
        for layer in problem.near[number]:
            widths = {g: _width(problem, kept, g) for g, _ in (*layer.into, *layer.out)}
            if problem.times is not None:
                cost: tuple[float, float] = (
                    problem.times.at(layer.name, *_layer_widths(problem, layer, widths)),
                ) * 2
            else:
                cost = _layer_cost(problem, layer, widths)
            sums = [sums[0] + cost[0], sums[1] + cost[1]]
        ends.append(sums)
    return ends[0][0] - ends[1][0], ends[0][1] - ends[1][1]


def latency(problem: Problem, kept: Sequence[int]) -> float:
    """Return milliseconds, as the table says."""
    assert problem.times is not None, "a budget of latency comes with a table"
    widths, times = settled(problem, kept), problem.times
    layers = sum(times.at(layer.name, *_layer_widths(problem, layer, widths)) for layer in problem.layers)
    return layers + times.model.fixed_ms
