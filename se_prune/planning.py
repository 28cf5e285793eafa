"""Scores and a budget to a plan: which channels leave. Pure and deterministic.

Every group gives its channels in the order of their scores. All steps of all groups stand in one queue, sorted by
score; the longest run from its front that is needed to meet the budget is taken, then whatever fits is put back,
highest score first, so that the result meets the budget from below as closely as whole channels allow. Hidden units
follow the channels that they gate in proportion, unless they are kept or have steps of their own. No group falls below
its floor.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from se_prune.errors import BudgetError, UsageError
from se_prune.ledger import refusals, why_no_more
from se_prune.records import (
    Budget,
    ChannelGroup,
    Coupling,
    GroupPlan,
    HiddenPolicy,
    LayerCost,
    Plan,
    Scores,
)

#: A group keeps at least this share of its channels, whatever the scores say.
FLOOR_SHARE = 1 / 16
#: Exponent of a channel's MACs in a step's price; 0 ignores the cost, 1 is score per MAC. On held-out training images
#: of the bundled networks 0.75 and 1 do alike, and less does worse on one of them (`reports/scores.md`).
COST_POWER = 0.75


@dataclass(slots=True, kw_only=True)
class _Layer:
    cost: LayerCost
    into: list[tuple[int, int]]  # (group, channels of the layer's input per channel of the group)
    out: list[tuple[int, int]]


@dataclass(slots=True, kw_only=True)
class _Problem:
    couplings: tuple[Coupling, ...]
    layers: list[_Layer]
    options: list[tuple[int, ...]]  # allowed numbers of kept channels, descending, per group
    leader: list[int | None]  # the group whose width a hidden group follows
    hidden: HiddenPolicy

    def follows(self, number: int) -> bool:
        """Say whether a group's width is not the planner's choice."""
        return self.couplings[number].group.kind == "hidden" and self.hidden != "prune"


def make_plan(
    couplings: Sequence[Coupling],
    costs: Mapping[str, LayerCost],
    scores: Scores,
    budget: Budget,
    *,
    round_to: int = 1,
    min_channels: int = 2,
    hidden: HiddenPolicy = "tie",
) -> Plan:
    """Choose the channels that leave.

    Args:
        couplings: The channel groups with their layers.
        costs: Size and MACs per layer, of the dense network.
        scores: One score per channel of every group that can be cut; lower leaves first.
        budget: Share of channels to remove, or fraction of MACs or parameters to keep.
        round_to: Cut groups keep a multiple of this many channels (hidden units are not rounded).
        min_channels: No group keeps fewer, unless it has fewer.
        hidden: What hidden units do.

    Raises:
        UsageError: The budget or an option is out of range.
        BudgetError: The floors do not allow the budget; the message says what is reachable.
    """
    problem, target = _reachable(
        couplings, costs, budget, round_to=round_to, min_channels=min_channels, hidden=hidden
    )
    kept = _fill(problem, budget, target, _descend(problem, budget, target, scores), scores)
    chosen = _plan(problem, scores, budget, kept, round_to=round_to, min_channels=min_channels)
    return replace(chosen, refused=refusals(couplings))


def check_budget(
    couplings: Sequence[Coupling],
    costs: Mapping[str, LayerCost],
    budget: Budget,
    *,
    round_to: int = 1,
    min_channels: int = 2,
    hidden: HiddenPolicy = "tie",
) -> None:
    """Check, before anything is measured, that `make_plan` can meet a budget; arguments and errors are its own.

    Raises:
        UsageError: The budget or an option is out of range.
        BudgetError: The floors do not allow the budget; the message says what is reachable.
    """
    _reachable(couplings, costs, budget, round_to=round_to, min_channels=min_channels, hidden=hidden)


def _reachable(
    couplings: Sequence[Coupling],
    costs: Mapping[str, LayerCost],
    budget: Budget,
    *,
    round_to: int,
    min_channels: int,
    hidden: HiddenPolicy,
) -> tuple[_Problem, float]:
    """Return the problem and what may be left of its measure."""
    check_ranges(budget, round_to, min_channels)
    problem = _problem(couplings, costs, round_to, min_channels, hidden)
    if all(c.group.kind == "hidden" for c in problem.couplings):
        raise BudgetError(f"--{budget.kind} {budget.value:g} cannot be met: no channel group can be cut.")
    full = [c.group.channels for c in problem.couplings]
    target = _target(problem, budget, full)
    smallest = _widths(problem, [options[-1] for options in problem.options])
    if _measure(problem, budget, smallest) > target:
        reach = _measure(problem, budget, smallest) / _measure(problem, budget, full)
        raise BudgetError(_unreachable(budget, reach, round_to, min_channels))
    return problem, target


def check_ranges(budget: Budget, round_to: int, min_channels: int) -> None:
    """Check what can be checked before the network is opened.

    Raises:
        UsageError: The budget or an option is out of range.
    """
    low_open = budget.kind != "sparsity"
    if not (0 < budget.value <= 1 if low_open else 0 <= budget.value < 1):
        allowed = "above 0 and at most 1" if low_open else "at least 0 and below 1"
        raise UsageError(f"--{budget.kind} must be {allowed}, got {budget.value:g}; 0.5 halves the network.")
    if round_to < 1 or min_channels < 1:
        raise UsageError(
            f"--round-to and --min-channels must be at least 1, got {round_to} and {min_channels}."
        )


def _unreachable(budget: Budget, reach: float, round_to: int, min_channels: int) -> str:
    floors = f"--round-to {round_to} and --min-channels {min_channels}"
    if budget.kind == "sparsity":
        most = math.floor((1 - reach) * 1000) / 1000
        return f"--sparsity {budget.value:g} cannot be met: with {floors} at most {most:g} is reachable."
    least = math.ceil(reach * 1000) / 1000
    return f"--{budget.kind} {budget.value:g} cannot be met: with {floors} at least {least:g} must stay."


def _problem(
    couplings: Sequence[Coupling],
    costs: Mapping[str, LayerCost],
    round_to: int,
    min_channels: int,
    hidden: HiddenPolicy,
) -> _Problem:
    chosen = tuple(c for c in couplings if c.group.prunable)
    layers = {name: _Layer(cost=cost, into=[], out=[]) for name, cost in costs.items()}
    for number, coupling in enumerate(chosen):
        for piece in coupling.slices:
            if piece.layer not in layers:
                continue
            times = max(1, len(piece.index) // coupling.group.channels)
            side = layers[piece.layer].into if piece.role == "in" else layers[piece.layer].out
            side.append((number, times))
    leader = [_leader(coupling, chosen) for coupling in chosen]
    return _Problem(
        couplings=chosen,
        layers=list(layers.values()),
        options=[_options(c, 1 if c.group.kind == "hidden" else round_to, min_channels) for c in chosen],
        leader=leader,
        hidden=hidden,
    )


def _leader(coupling: Coupling, couplings: Sequence[Coupling]) -> int | None:
    """Return the group whose channels a hidden group's site gates: the one that its `expand` makes."""
    if coupling.group.kind != "hidden":
        return None
    expands = set(coupling.layers("in"))
    for number, other in enumerate(couplings):
        if other.group.kind != "hidden" and expands & set(other.layers("out")):
            return number
    return None


def _options(coupling: Coupling, round_to: int, min_channels: int) -> tuple[int, ...]:
    group, together = coupling.group, coupling.group.together
    channels, tied = group.channels, group.tied
    floor = min(channels, max(min_channels, tied, math.ceil(channels * FLOOR_SHARE)))
    parts = sum(min(min_channels, len(part)) for part in _parts(coupling))
    floor = max(floor, min(channels, tied * parts), channels - tied * len(together))
    inner = [k for k in range(channels - tied, floor - 1, -tied) if k % round_to == 0]
    return (channels, *inner)


def _parts(coupling: Coupling) -> list[frozenset[int]]:
    """Return the units of each layer that has a part of the group's channels alone (a branch of a concatenation)."""
    unit_of = {c: number for number, unit in enumerate(coupling.group.together) for c in unit}
    every = len(coupling.group.together)
    found = {
        frozenset(unit_of[c] for c in piece.root if c in unit_of)
        for piece in coupling.slices
        if len(set(piece.root)) < coupling.group.channels
    }
    return sorted((part for part in found if 0 < len(part) < every), key=sorted)


def _order(coupling: Coupling, values: Sequence[float], min_channels: int) -> list[int]:
    """Return units in the order in which they leave: the lowest first, the best few of every part last."""
    staying: set[int] = set()
    for part in _parts(coupling):
        best = sorted(part, key=lambda u: (-values[u], -u))
        staying.update(best[:min_channels])
    return sorted(range(len(values)), key=lambda u: (u in staying, values[u], u))


def _widths(problem: _Problem, kept: Sequence[int]) -> list[int]:
    """Return kept channels per group, with hidden groups that follow set to what they follow."""
    widths = list(kept)
    for number, leader in enumerate(problem.leader):
        if problem.follows(number):
            hidden = problem.couplings[number].group.channels
            if leader is None or problem.hidden == "keep":
                widths[number] = hidden
                continue
            share = kept[leader] / problem.couplings[leader].group.channels
            widths[number] = max(problem.options[number][-1], math.ceil(hidden * share - 1e-9))
    return widths


def _layer_cost(problem: _Problem, layer: _Layer, widths: Sequence[int]) -> tuple[int, int]:
    """Return (MACs, parameters) of one layer at the given widths."""
    cost = layer.cost
    groups = problem.couplings
    out = cost.out_channels - sum((groups[g].group.channels - widths[g]) * t for g, t in layer.out)
    into = cost.in_channels - sum((groups[g].group.channels - widths[g]) * t for g, t in layer.into)
    share_out = cost.out_channels or 1
    weights = cost.weights * out // share_out
    macs = cost.macs * out // share_out
    if not cost.channelwise:
        weights = weights * into // (cost.in_channels or 1)
        macs = macs * into // (cost.in_channels or 1)
    return macs, weights + cost.biases * out // share_out


def _totals(problem: _Problem, kept: Sequence[int]) -> tuple[int, int]:
    widths = _widths(problem, kept)
    pairs = [_layer_cost(problem, layer, widths) for layer in problem.layers]
    return sum(p[0] for p in pairs), sum(p[1] for p in pairs)


def _measure(problem: _Problem, budget: Budget, kept: Sequence[int]) -> int:
    """Return what the budget counts: channels kept, MACs or parameters."""
    if budget.kind == "sparsity":
        return sum(k for k, c in zip(kept, problem.couplings, strict=True) if c.group.kind != "hidden")
    macs, params = _totals(problem, kept)
    return macs if budget.kind == "macs" else params


def _target(problem: _Problem, budget: Budget, full: Sequence[int]) -> float:
    fraction = 1 - budget.value if budget.kind == "sparsity" else budget.value
    return fraction * _measure(problem, budget, full) + 1e-6


def _units(values: Sequence[float], group: ChannelGroup) -> list[float]:
    """Return the mean score of the channels that leave together, per unit."""
    return [sum(values[channel] for channel in unit) / group.tied for unit in group.together]


def _normalised(scores: Scores, group: ChannelGroup) -> list[float]:
    values = _units(scores.groups[group.name], group)
    if scores.comparable:
        return values
    mean = sum(values) / len(values)
    return [v / mean if mean > 0 else v for v in values]


def _steps(problem: _Problem, scores: Scores) -> list[tuple[float, int, int]]:
    """Return every step (score, group, kept after it), in the order in which they are taken.

    A step's score is the mean over the channels it removes, and never lower than an earlier step's of its
    group. Comparable scores are shares of a signal: they are taken relative to what the group still has of
    it (the last channels of a layer are dear), and per `COST_POWER` of the MACs that the channel costs.
    """
    steps = []
    for number, coupling in enumerate(problem.couplings):
        if problem.follows(number):
            continue
        ordered = [v for v in sorted(_normalised(scores, coupling.group)) for _ in range(coupling.group.tied)]
        saving = _saving(problem, number) ** COST_POWER if scores.comparable else 1.0
        total = sum(ordered)
        left, highest = total, -math.inf
        options = problem.options[number]
        for before, after in itertools.pairwise(options):
            lost = ordered[coupling.group.channels - before : coupling.group.channels - after]
            value = sum(lost) / len(lost) / saving
            if scores.comparable and left > 0:
                value *= total / left
            left -= sum(lost)
            highest = max(highest, value)
            steps.append((highest, number, after))
    return sorted(steps, key=lambda s: (s[0], s[1], -s[2]))


def _saving(problem: _Problem, number: int) -> float:
    """Return the share of the dense MACs that one channel of a group is worth."""
    full = [c.group.channels for c in problem.couplings]
    without = list(full)
    without[number] = problem.options[number][-1]
    lost = full[number] - without[number]
    if lost == 0:
        return 1.0
    dense = _totals(problem, full)[0]
    return max(1e-12, (dense - _totals(problem, without)[0]) / lost / max(1, dense))


def _descend(problem: _Problem, budget: Budget, target: float, scores: Scores) -> list[int]:
    """Return the widths after the shortest run of steps that meets the target (bisection)."""
    steps = _steps(problem, scores)
    full = [c.group.channels for c in problem.couplings]

    def after(count: int) -> list[int]:
        kept = list(full)
        for _, group, width in steps[:count]:
            kept[group] = width
        return kept

    low, high = 0, len(steps)
    while low < high:
        middle = (low + high) // 2
        if _measure(problem, budget, after(middle)) <= target:
            high = middle
        else:
            low = middle + 1
    return after(low)


def _fill(problem: _Problem, budget: Budget, target: float, kept: list[int], scores: Scores) -> list[int]:
    """Put channels back, the highest-scored step first, as long as the target is still met.

    Hidden units that the budget does not count stay out: nothing would hold them back.
    """
    counted = [budget.kind != "sparsity" or c.group.kind != "hidden" for c in problem.couplings]
    undo = [step for step in _steps(problem, scores) if kept[step[1]] <= step[2] and counted[step[1]]]
    current = list(kept)
    for _, group, width in reversed(undo):
        options = problem.options[group]
        wider = options[options.index(width) - 1]
        if current[group] != width:
            continue
        trial = list(current)
        trial[group] = wider
        if _measure(problem, budget, trial) <= target:
            current = trial
    return current


def _plan(
    problem: _Problem,
    scores: Scores,
    budget: Budget,
    kept: Sequence[int],
    *,
    round_to: int,
    min_channels: int,
) -> Plan:
    widths = _widths(problem, kept)
    full = [c.group.channels for c in problem.couplings]
    before, after = _totals(problem, full), _totals(problem, kept)
    plans = []
    for number, coupling in enumerate(problem.couplings):
        group = coupling.group
        values = _units(scores.groups[group.name], group)
        order = _order(coupling, values, min_channels)
        gone = order[: (group.channels - widths[number]) // group.tied]
        together = group.together
        removed = tuple(sorted(i for u in gone for i in together[u]))
        note = why_no_more(
            group,
            widths[number],
            problem.options[number],
            round_to=round_to,
            hidden=problem.hidden,
            leads=problem.leader[number] is not None,
        )
        plans.append(
            GroupPlan(name=group.name, kind=group.kind, channels=group.channels, removed=removed, note=note)
        )
    return Plan(
        criterion=scores.criterion,
        budget=budget,
        round_to=round_to,
        min_channels=min_channels,
        groups=tuple(plans),
        macs_before=before[0],
        macs_after=after[0],
        params_before=before[1],
        params_after=after[1],
        hidden=problem.hidden,
    )
