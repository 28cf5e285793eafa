"""A cut in several steps: what each has to leave, how long it is fine-tuned, and the plan that all make together."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from se_prune.errors import SurgeryError
from se_prune.records import Budget, GroupPlan, Plan

#: How the steps of a cut share what leaves: alike, most of it first, or the same share of what is left each time.
StepShape = Literal["linear", "cubic", "geometric"]


def kept_after(shape: StepShape, kept: float, steps: int) -> tuple[float, ...]:
    """Return which fraction of the dense network stays after each step; `kept` after the last.

    With t = step / steps: `linear` leaves 1 - (1 - kept) · t, `cubic` 1 - (1 - kept) · (1 - (1 - t)³) (Zhu and
    Gupta 2017), `geometric` kept ** t.
    """
    times = [step / steps for step in range(1, steps)]
    if shape == "linear":
        inner = [1 - (1 - kept) * t for t in times]
    elif shape == "cubic":
        inner = [1 - (1 - kept) * (1 - (1 - t) ** 3) for t in times]
    else:
        inner = [kept**t for t in times]
    return (*inner, kept)


def epochs_of(total: int, steps: int) -> tuple[int, ...]:
    """Share `total` epochs over the steps: every one but the last has total // (2 · steps), at least 1."""
    each = max(1, total // (2 * steps))
    return (*(each for _ in range(steps - 1)), total - each * (steps - 1))


def goals(budget: Budget, shape: StepShape, steps: int) -> tuple[Budget, ...]:
    """Return the budget of each step, of the dense network."""
    if steps == 1:
        return (budget,)
    if budget.kind == "sparsity":
        return tuple(replace(budget, value=1 - k) for k in kept_after(shape, 1 - budget.value, steps))
    return tuple(replace(budget, value=k) for k in kept_after(shape, budget.value, steps))


def of_what_is_left(goal: Budget, dense: float, left: float) -> Budget:
    """Return a budget of the dense network as one of the network that earlier steps have left.

    Args:
        goal: Channels, MACs or parameters.
        dense: What the budget counts, of the dense network.
        left: The same of the network that is cut next; where it meets the goal already, nothing more has to leave.
    """
    if goal.kind == "sparsity":
        return replace(goal, value=max(0.0, 1 - (1 - goal.value) * dense / left))
    return replace(goal, value=min(1.0, goal.value * dense / left))


def compose(first: Plan | None, then: Plan, goal: Budget) -> Plan:
    """Return one plan of the dense network that cuts what a first plan does, and a second one of what that leaves.

    Args:
        first: A plan of the dense network; None where the second is one itself.
        then: A plan in the numbering of the network that the first leaves.
        goal: The budget that both meet together.

    Raises:
        SurgeryError: The second is not of the network that the first leaves.
    """
    if first is None:
        return replace(then, budget=goal)
    before = {group.name: group for group in first.groups}
    names = {group.name for group in then.groups}
    groups = [_composed(before.get(group.name), group) for group in then.groups]
    groups += [group for group in first.groups if group.name not in names]
    refused = tuple(group for group in then.refused if group.name not in before)
    return replace(
        then,
        budget=goal,
        groups=tuple(groups),
        refused=refused,
        sites=first.sites or then.sites,
        macs_before=first.macs_before,
        params_before=first.params_before,
    )


def _composed(first: GroupPlan | None, then: GroupPlan) -> GroupPlan:
    if first is None:
        return then
    gone = set(first.removed)
    left = [channel for channel in range(first.channels) if channel not in gone]
    if len(left) != then.channels:
        raise SurgeryError(
            f"a plan for {then.channels} channels of '{then.name}' cannot follow one that leaves {len(left)}; please "
            "report the architecture."
        )
    removed = sorted(gone | {left[channel] for channel in then.removed})
    return replace(then, channels=first.channels, removed=tuple(removed))
