"""What changed between the dense network and the last stage: classes and answers, and where the cost is."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from se_prune.results import Evaluation, Run

Z95 = 1.959963984540054


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassChange:
    """The accuracy of one class in two networks; `interval` of the difference and `n` images where they are known."""

    name: str
    dense: float
    last: float
    n: int | None = None
    interval: tuple[float, float] | None = None

    @property
    def difference(self) -> float:
        """Last minus dense, as a fraction."""
        return self.last - self.dense

    @property
    def is_certain(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Confusion:
    """How many images of a class get an answer, in the dense network and at the last stage."""

    label: int
    answer: int
    dense: int
    last: int


def dense_and_last(run: Run) -> tuple[Evaluation, Evaluation] | None:
    """Return the first and the last evaluation of a run, or None where there are not two."""
    if len(run.stages) < 2:
        return None
    return run.stages[0].evaluation, run.stages[-1].evaluation


def paired_interval(only_first: int, only_second: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of the difference of two proportions on the same `n` images (Agresti and Min 2005).

    Args:
        only_first: Images that only the first network has right.
        only_second: Those that only the second has right.
        n: Images of both.
    """
    total = n + 2
    centre = (only_second - only_first) / total
    spread = only_first + only_second + 1 - (only_second - only_first) ** 2 / total
    half = Z95 * math.sqrt(max(0.0, spread)) / total
    return max(-1.0, centre - half), min(1.0, centre + half)


def answers(run: Run) -> list[tuple[int, int, int]]:
    """Return (label, dense answer, last answer) of the images that both networks have read; empty where unknown."""
    pair = dense_and_last(run)
    if pair is None:
        return []
    first, last = (evaluation.predictions for evaluation in pair)
    if not run.labels or not len(run.labels) == len(first) == len(last):
        return []
    three = zip(run.labels, first, last, strict=True)
    return [(label, a, b) for label, a, b in three if a >= 0 and b >= 0]


def class_changes(run: Run) -> list[ClassChange]:
    """Return the change of every class, largest loss first; empty where not recorded."""
    pair = dense_and_last(run)
    if pair is None:
        return []
    seen, lost, won = Counter[str](), Counter[str](), Counter[str]()
    for label, first, last in answers(run):
        name = class_name(run, label)
        seen[name] += 1
        lost[name] += first == label != last
        won[name] += last == label != first
    dense, after = (value.per_class for value in pair)
    changes = [
        ClassChange(
            name=name,
            dense=dense[name],
            last=after[name],
            n=seen.get(name),
            interval=paired_interval(lost[name], won[name], seen[name]) if name in seen else None,
        )
        for name in dense
        if name in after
    ]
    return sorted(changes, key=lambda change: change.difference)


def class_name(run: Run, number: int) -> str:
    """Return the name of a class, or its number where it has none."""
    return run.classes[number] if 0 <= number < len(run.classes) else str(number)


def confusions(run: Run) -> list[Confusion]:
    """Return how often each answer is given for each class, where either network gives it."""
    first, last = Counter[tuple[int, int]](), Counter[tuple[int, int]]()
    for label, a, b in answers(run):
        first[label, a] += 1
        last[label, b] += 1
    return [
        Confusion(label=label, answer=answer, dense=first[label, answer], last=last[label, answer])
        for label, answer in sorted(first.keys() | last.keys())
    ]


def part_sums(run: Run, unit: str) -> dict[str, tuple[float, float]] | None:
    """Return what each part of the network takes, dense and pruned, in the order of the network; None where unknown."""
    sums: dict[str, list[float]] = {}
    if unit == "ms":
        if run.operations is None:
            return None
        for side, operations in enumerate(run.operations):
            for operation in operations:
                sums.setdefault(operation.part, [0.0, 0.0])[side] += operation.ms
    else:
        if not run.parts:
            return None
        for side, cost in enumerate((run.cost_before, run.cost_after)):
            for layer, macs in cost.per_layer.items():
                sums.setdefault(run.parts.get(layer, "other"), [0.0, 0.0])[side] += macs
    known = [part for part in dict.fromkeys(run.parts.values()) if part in sums]
    order = sorted([*known, *(part for part in sums if part not in known)], key=_rank)
    return {part: (sums[part][0], sums[part][1]) for part in order}


def _rank(part: str) -> int:
    """Return where a part stands: the stem, the stages in their order, SE blocks, the head, what is none of them."""
    order, first = ("stem", "stage", "SE", "head"), part.partition(" ")[0]
    return order.index(first) if first in order else len(order)
