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
from dataclasses import replace

from se_prune.errors import BudgetError, UsageError
from se_prune.ledger import refusals, why_no_more
from se_prune.problem import Problem, branches, latency, pose, saved, settled, totals
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
from se_prune.timing import LatencyModel

#: Exponent of a channel's MACs in a step's price; 0 ignores the cost, 1 is score per MAC. On held-out training images
#: of the bundled networks no power up to 1 did better by more than 0.2 points (`reports/scores.md`).
COST_POWER = 1.0


def make_plan(
    couplings: Sequence[Coupling],
    costs: Mapping[str, LayerCost],
    scores: Scores,
    budget: Budget,
    *,
    round_to: int = 1,
    min_channels: int = 2,
    hidden: HiddenPolicy = "tie",
    times: LatencyModel | None = None,
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
        times: What a budget of latency is counted with; such a budget needs it.

    Raises:
        UsageError: The budget or an option is out of range.
        BudgetError: The floors do not allow the budget; the message says what is reachable.
    """
    problem, target = _reachable(
        couplings, costs, budget, round_to=round_to, min_channels=min_channels, hidden=hidden, times=times
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
    times: LatencyModel | None = None,
) -> None:
    """Check, before anything is measured, that `make_plan` can meet a budget; arguments and errors are its own.

    Raises:
        UsageError: The budget or an option is out of range.
        BudgetError: The floors do not allow the budget; the message says what is reachable.
    """
    _reachable(
        couplings, costs, budget, round_to=round_to, min_channels=min_channels, hidden=hidden, times=times
    )


def fastest(
    couplings: Sequence[Coupling],
    costs: Mapping[str, LayerCost],
    times: LatencyModel,
    *,
    round_to: int = 1,
    min_channels: int = 2,
    hidden: HiddenPolicy = "tie",
) -> float:
    """Return the milliseconds of the network with every group at its floor, as the table says."""
    problem = pose(couplings, costs, round_to, min_channels, hidden, times=times)
    return latency(problem, [options[-1] for options in problem.options])


def predicted(
    couplings: Sequence[Coupling],
    costs: Mapping[str, LayerCost],
    times: LatencyModel,
    plan: Plan | None = None,
) -> float:
    """Return the milliseconds of a plan's network, or of the dense one, as the table says."""
    problem = pose(couplings, costs, 1, 1, "prune", times=times)
    gone = {group.name: len(group.removed) for group in plan.groups} if plan else {}
    return latency(problem, [c.group.channels - gone.get(c.group.name, 0) for c in problem.couplings])


def _reachable(
    couplings: Sequence[Coupling],
    costs: Mapping[str, LayerCost],
    budget: Budget,
    *,
    round_to: int,
    min_channels: int,
    hidden: HiddenPolicy,
    times: LatencyModel | None,
) -> tuple[Problem, float]:
    """Return the problem and what may be left of its measure."""
    check_ranges(budget, round_to, min_channels)
    problem = pose(couplings, costs, round_to, min_channels, hidden, times=times)
    if all(c.group.kind == "hidden" for c in problem.couplings):
        raise BudgetError(f"{budget.option} cannot be met: no channel group can be cut.")
    full = [c.group.channels for c in problem.couplings]
    target = _target(problem, budget, full)
    smallest = settled(problem, [options[-1] for options in problem.options])
    if _measure(problem, budget, smallest) > target:
        reach = _measure(problem, budget, smallest)
        if budget.kind != "latency_ms":
            reach /= _measure(problem, budget, full)
        raise BudgetError(_unreachable(budget, reach, round_to, min_channels))
    return problem, target


def check_ranges(budget: Budget, round_to: int, min_channels: int) -> None:
    """Check what can be checked before the network is opened.

    Raises:
        UsageError: The budget or an option is out of range.
    """
    option = budget.option.split()[0]
    if budget.kind == "latency_ms" and not 0 < budget.value < math.inf:
        raise UsageError(f"{option} must be above 0 milliseconds and finite, got {budget.value:g}.")
    low_open = budget.kind != "sparsity"
    if budget.kind != "latency_ms" and not (0 < budget.value <= 1 if low_open else 0 <= budget.value < 1):
        allowed = "above 0 and at most 1" if low_open else "at least 0 and below 1"
        raise UsageError(f"{option} must be {allowed}, got {budget.value:g}; 0.5 halves the network.")
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
    return f"{budget.option} cannot be met: with {floors} at least {least:g} must stay."


def _measure(problem: Problem, budget: Budget, kept: Sequence[int]) -> float:
    """Return what the budget counts: channels kept, MACs, parameters or milliseconds."""
    if budget.timed:
        return latency(problem, kept)
    if budget.kind == "sparsity":
        return sum(k for k, c in zip(kept, problem.couplings, strict=True) if c.group.kind != "hidden")
    macs, params = totals(problem, kept)
    return macs if budget.kind == "macs" else params


def _target(problem: Problem, budget: Budget, full: Sequence[int]) -> float:
    if budget.kind == "latency_ms":
        return budget.value
    fraction = 1 - budget.value if budget.kind == "sparsity" else budget.value
    return fraction * _measure(problem, budget, full) + 1e-6


def predicted_loss(scores: Scores, group: ChannelGroup, removed: Sequence[int]) -> float | None:
    """Return what the scores say is lost with some channels of a group; None where they are in no common unit."""
    return sum(scores.groups[group.name][channel] for channel in removed) if scores.comparable else None


def sensitivity(
    couplings: Sequence[Coupling], scores: Scores, shares: Sequence[float]
) -> dict[str, tuple[tuple[int, float], ...]]:
    """Return per group (channels removed, predicted loss) where about each of some shares has left, cheapest first.

    Raises:
        UsageError: The criterion's scores are in no common unit.
    """
    if not scores.comparable:
        raise UsageError(
            f"criterion '{scores.criterion}' ranks channels within a group only; take excitation, gate-obs, "
            "gate-energy or gate-fisher to compare groups."
        )
    curves: dict[str, tuple[tuple[int, float], ...]] = {}
    for coupling in couplings:
        group = coupling.group
        if not group.prunable:
            continue
        ordered = sorted(_units(scores.groups[group.name], group))
        losses = [0.0, *(group.tied * value for value in itertools.accumulate(ordered))]
        counts = [min(round(share * group.channels / group.tied), len(ordered)) for share in shares]
        curves[group.name] = tuple((n * group.tied, losses[n]) for n in counts)
    return curves


def _units(values: Sequence[float], group: ChannelGroup) -> list[float]:
    """Return the mean score of the channels that leave together, per unit."""
    return [sum(values[channel] for channel in unit) / group.tied for unit in group.together]


def _normalised(scores: Scores, group: ChannelGroup) -> list[float]:
    values = _units(scores.groups[group.name], group)
    if scores.comparable:
        return values
    mean = sum(values) / len(values)
    return [v / mean if mean > 0 else v for v in values]


def _steps(problem: Problem, scores: Scores) -> list[tuple[float, int, int]]:
    """Return every step (score, group, kept after it), in the order in which they are taken.

    A step's score is the mean over the channels it removes, and never lower than an earlier step's of its
    group. Comparable scores are shares of a signal: they are taken relative to what the group still has of
    it (the last channels of a layer are dear), and per `COST_POWER` of the MACs, or of the milliseconds where they are
    what the budget counts, that the channel costs.
    """
    steps = []
    full = [c.group.channels for c in problem.couplings]
    dense = totals(problem, full)[0] if problem.times is None else latency(problem, full)
    for number, coupling in enumerate(problem.couplings):
        if problem.follows(number):
            continue
        ordered = [v for v in sorted(_normalised(scores, coupling.group)) for _ in range(coupling.group.tied)]
        saving = _saving(problem, number, full, dense) ** COST_POWER if scores.comparable else 1.0
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


def _saving(problem: Problem, number: int, full: Sequence[int], dense: float) -> float:
    """Return the share of the `dense` MACs (or milliseconds) that one channel of a group is worth."""
    without = list(full)
    without[number] = problem.options[number][-1]
    lost = full[number] - without[number]
    if lost == 0:
        return 1.0
    return max(1e-12, saved(problem, full, without, number)[0] / lost / (dense or 1.0))


def _descend(problem: Problem, budget: Budget, target: float, scores: Scores) -> list[int]:
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


def _fill(problem: Problem, budget: Budget, target: float, kept: list[int], scores: Scores) -> list[int]:
    """Put channels back, the highest-scored step first, as long as the target is still met.

    Hidden units that the budget does not count stay out: nothing would hold them back.
    """
    counted = [budget.kind != "sparsity" or c.group.kind != "hidden" for c in problem.couplings]
    undo = [step for step in _steps(problem, scores) if kept[step[1]] <= step[2] and counted[step[1]]]
    current = list(kept)
    measured = _measure(problem, budget, current)
    for _, group, width in reversed(undo):
        options = problem.options[group]
        wider = options[options.index(width) - 1]
        if current[group] != width:
            continue
        trial = list(current)
        trial[group] = wider
        wanted = _measured(problem, budget, measured, current, trial=trial, group=group)
        if wanted <= target:
            current, measured = trial, wanted
    return current


def _measured(
    problem: Problem,
    budget: Budget,
    before: float,
    kept: Sequence[int],
    *,
    trial: Sequence[int],
    group: int,
) -> float:
    """Return `_measure` of a trial that differs from `kept`, whose measure is `before`, in one group alone."""
    if budget.timed:
        return _measure(problem, budget, trial)  # milliseconds are no whole numbers, so that sums would drift
    if budget.kind == "sparsity":
        return before + trial[group] - kept[group]
    return before - saved(problem, kept, trial, group)[0 if budget.kind == "macs" else 1]


def _order(coupling: Coupling, values: Sequence[float], min_channels: int) -> list[int]:
    """Return units in the order in which they leave: the lowest first, the best few of every branch last."""
    staying: set[int] = set()
    for part in branches(coupling):
        best = sorted(part, key=lambda u: (-values[u], -u))
        staying.update(best[:min_channels])
    return sorted(range(len(values)), key=lambda u: (u in staying, values[u], u))


def _plan(
    problem: Problem,
    scores: Scores,
    budget: Budget,
    kept: Sequence[int],
    *,
    round_to: int,
    min_channels: int,
) -> Plan:
    widths = settled(problem, kept)
    full = [c.group.channels for c in problem.couplings]
    before, after = totals(problem, full), totals(problem, kept)
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
            GroupPlan(
                name=group.name,
                kind=group.kind,
                channels=group.channels,
                removed=removed,
                note=note,
                predicted_loss=predicted_loss(scores, group, removed),
            )
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
