"""Which channels each layer loses by a plan."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

from se_prune.records import Coupling, Plan


def lost_channels(
    plan: Plan, couplings: Sequence[Coupling], role: Literal["out", "in"] = "out"
) -> dict[str, set[int]]:
    """Return per layer, by name, which of its channels leave; layers that lose none have no entry, or an empty one.

    Args:
        plan: What leaves.
        couplings: The channel groups of the dense network.
        role: The channels that a layer makes, or those that it reads.
    """
    removed = {group.name: set(group.removed) for group in plan.groups}
    lost: dict[str, set[int]] = defaultdict(set)
    for coupling in couplings:
        gone = removed.get(coupling.group.name)
        for piece in coupling.slices if gone else ():
            if piece.role == role:
                places = zip(piece.index, piece.root, strict=True)
                lost[piece.layer] |= {i for i, root in places if gone and root in gone}
    return lost
