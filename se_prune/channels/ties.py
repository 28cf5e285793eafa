"""Which channels of a group leave together, for grouped convolutions and channel shuffles.

A grouped convolution must lose as many channels of each of its groups, and a shuffle whole rows of places (see
`channels.shuffles`). Rows are the smallest things that can leave; what a row takes from each group of each grouped
convolution is its imbalance, and a unit is a small set of rows whose imbalances cancel.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

#: Rows in a unit, and partial sums looked at, before a row is left where it is.
MOST_ROWS = 12
MOST_SUMS = 5000

Imbalance = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """Equal shares: which of a grouped convolution's groups, or a split's parts, each channel of a group is in.

    Every channel is in one.
    """

    groups: int
    group_of: Mapping[int, int]


def regular(channels: int, sharings: Sequence[Sharing], rows: Sequence[Sequence[int]]) -> int | None:
    """Return the least t for which channels i, i + channels/t, i + 2·channels/t, … may leave together, for every i.

    None where that leaves a single unit, of channels that are not one.
    """
    if not sharings and not rows:
        return 1
    row_of = {channel: number for number, row in enumerate(rows) for channel in row}
    for tied in range(1, channels if channels > 1 else 2):
        if channels % tied == 0:
            units = channels // tied
            if all(_whole(range(u, channels, units), rows, row_of, sharings) for u in range(units)):
                return tied
    return None


def _whole(
    unit: Sequence[int], rows: Sequence[Sequence[int]], row_of: Mapping[int, int], sharings: Sequence[Sharing]
) -> bool:
    inside = set(unit)
    touched = {row_of[channel] for channel in unit if channel in row_of}
    return all(inside.issuperset(rows[row]) for row in touched) and not any(_imbalance(unit, sharings))


def _imbalance(row: Iterable[int], sharings: Sequence[Sharing]) -> Imbalance:
    """Return what channels take from each group of each convolution, beyond what they take from its first."""
    channels = list(row)
    result: list[int] = []
    for sharing in sharings:
        counts = collections.Counter(sharing.group_of[c] for c in channels)
        result.extend(counts[group] - counts[0] for group in range(1, sharing.groups))
    return tuple(result)


def irregular(
    channels: int, sharings: Sequence[Sharing], rows: Sequence[Sequence[int]]
) -> tuple[tuple[int, ...], ...]:
    """Return units of one size that may leave, as many as are found; further channels stay."""
    if not rows:
        rows = [(channel,) for channel in range(channels)]
    stock: dict[Imbalance, list[tuple[int, ...]]] = {}
    for row in rows:
        stock.setdefault(_imbalance(row, sharings), []).append(tuple(row))
    units: list[tuple[int, ...]] = []
    for first in list(stock):
        while stock[first]:
            found = _cancelling(first, {kind: len(left) for kind, left in stock.items()})
            if found is None:
                break
            units.append(tuple(sorted(c for kind in found for c in stock[kind].pop(0))))
    sizes = collections.Counter({size: size * n for size, n in collections.Counter(map(len, units)).items()})
    usual = sizes.most_common(1)[0][0] if sizes else 0
    return tuple(sorted(unit for unit in units if len(unit) == usual))


def _cancelling(first: Imbalance, stock: Mapping[Imbalance, int]) -> tuple[Imbalance, ...] | None:
    """Return the fewest rows, `first` among them, whose imbalances sum to 0 (breadth-first)."""
    queue: collections.deque[tuple[Imbalance, tuple[Imbalance, ...]]] = collections.deque([(first, (first,))])
    seen = {first}
    while queue and len(seen) < MOST_SUMS:
        total, taken = queue.popleft()
        if not any(total):
            return taken
        if len(taken) == MOST_ROWS:
            continue
        for kind, left in stock.items():
            further = tuple(a + b for a, b in zip(total, kind, strict=True))
            if further not in seen and taken.count(kind) < left:
                seen.add(further)
                queue.append((further, (*taken, kind)))
    return None
