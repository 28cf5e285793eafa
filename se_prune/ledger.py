"""The ledger of a plan: for every channel group, why no more of its channels leave."""

from __future__ import annotations

import math
from collections.abc import Sequence

from se_prune.records import ChannelGroup, Coupling, GroupPlan, HiddenPolicy


def why_no_more(
    group: ChannelGroup,
    width: int,
    options: Sequence[int],
    *,
    round_to: int,
    hidden: HiddenPolicy,
    leads: bool,
) -> str:
    """Say why a group that can be cut keeps `width` channels.

    Args:
        group: The group.
        width: How many of its channels stay.
        options: The widths that were allowed, descending.
        round_to: Of what they are multiples.
        hidden: What hidden units do.
        leads: Whether a hidden group's site gates channels that can be cut.
    """
    if group.kind == "hidden" and hidden == "keep":
        return "hidden units are kept"
    if group.kind == "hidden" and hidden == "tie":
        return "follows the channels it gates" if leads else "gates uncut channels"
    if len(options) == 1:
        return _no_room(group, round_to)
    if width == options[-1]:
        return "at its floor"
    return "all score above the cut" if width == group.channels else "the rest score above the cut"


def _no_room(group: ChannelGroup, round_to: int) -> str:
    """Say why a group has no narrower width."""
    if round_to == 1:
        return "its grouped convolutions cannot be narrower" if group.tied > 1 else "at its floor already"
    together = f" ({group.tied} channels leave together)" if group.tied > 1 else ""
    return f"too narrow for multiples of {math.lcm(round_to, group.tied)}{together}"


def refusals(couplings: Sequence[Coupling]) -> tuple[GroupPlan, ...]:
    """Return the groups that cannot be cut, each with the reason."""
    return tuple(
        GroupPlan(
            name=coupling.group.name,
            kind=coupling.group.kind,
            channels=coupling.group.channels,
            removed=(),
            note=coupling.group.reason,
        )
        for coupling in couplings
        if not coupling.group.prunable
    )
