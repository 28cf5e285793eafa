"""Cutting for three of the classes against cutting for all of them: MACs at equal accuracy on the three.

No training. The class-agnostic cut is measured, planned and repaired on all classes' training images, the other on
those of the three; both answer with the three outputs on the three classes' test images. Resumable.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

from reports.bench.common import (
    FOLDER,
    NETWORKS,
    append_row,
    bundled,
    markdown_table,
    read_rows,
    write_report,
)
from se_prune.artifact import Network
from se_prune.data import DataSource, open_data
from se_prune.device import choose_device
from se_prune.pipeline import apply_plan, assess, for_classes, like, plan, structure
from se_prune.records import Budget

SUBSETS = (("trouser", "sneaker", "bag"), ("pullover", "coat", "shirt"), ("t-shirt", "dress", "sandal"))
KEPT = (0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.035, 0.025)
#: Accuracy below the dense network's on the three classes, in points.
DROPS = (0.2, 0.5, 1.0, 2.0)
ROWS = FOLDER / "classes.jsonl"


def main() -> None:
    """Write `reports/classes.md`."""
    data = open_data("fashion-mnist")
    for name, kept in itertools.product(NETWORKS, KEPT):
        done = {(r["network"], r["kept"]) for r in read_rows(ROWS)}
        if (name, kept) not in done:
            append_row(ROWS, {"network": name, "kept": kept, "top1": _accuracies(bundled(name), data, kept)})
    report()


def _cut(network: Network, data: DataSource, kept: float) -> Network:
    device, found = choose_device("auto"), structure(network)
    chosen = plan(
        network, found, Budget(kind="macs", value=kept), criterion="excitation", device=device, data=data
    )
    return apply_plan(network, found, chosen, device=device, data=data).network


def _accuracies(network: Network, data: DataSource, kept: float) -> dict[str, dict[str, float]]:
    """Return per subset the accuracy of the class-agnostic cut and of the one for the subset."""
    device = choose_device("auto")
    every = _cut(network, data, kept)
    result = {}
    for names in SUBSETS:
        small, part = for_classes(network, data, names)
        result[",".join(names)] = {
            "dense": assess(small, part, device=device)[1].top1,
            "all": assess(like(every, small, data), part, device=device)[1].top1,
            "three": assess(_cut(small, part, kept), part, device=device)[1].top1,
        }
    return result


def macs_at(points: Sequence[tuple[float, float]], wanted: float) -> float | None:
    """Return the smallest fraction of the MACs from which on every larger cut network reaches an accuracy.

    Between two budgets the accuracy is taken as linear in the MACs; None where the largest does not reach it.
    """
    reached: float | None = None
    previous: tuple[float, float] | None = None
    for kept, top1 in sorted(points, reverse=True):
        if top1 < wanted:
            if previous is None or reached is None:
                return None
            return kept + (previous[0] - kept) * (wanted - top1) / (previous[1] - top1)
        reached, previous = kept, (kept, top1)
    return reached


def report() -> None:
    """Write `reports/classes.md` from the rows that are there."""
    rows = read_rows(ROWS)
    body = ["# Cutting for three classes\n"]
    body.append(
        "Smallest share of the dense MACs that keeps the dense network's accuracy on the three classes within a number "
        "of points (3,000 test images, the three outputs alone, no training): cut for all ten classes, and cut for the "
        f'three. Budgets measured: {", ".join(f"{100 * k:g} %" for k in KEPT)}; linear in between. "≤": the smallest '
        'budget measured still reaches it. "–": the largest one does not.\n'
    )
    for name in NETWORKS:
        body.append(f"## zoo:{name}\n")
        body.append(
            markdown_table(("classes", "dense", "points", "all", "three", "ratio"), _table(rows, name))
        )
    ratios = [float(line[-1]) for name in NETWORKS for line in _table(rows, name) if line[-1] != "–"]
    body.append(
        f"Over the {len(ratios)} cases in which both reach it, the ratio is {min(ratios):.2f} to {max(ratios):.2f}, "
        f"{statistics.median(ratios):.2f} in the median.\n"
    )
    write_report("classes", "python -m reports.bench classes", "\n".join(body), rows)


def _table(rows: Sequence[dict[str, Any]], name: str) -> list[list[str]]:
    mine = [r for r in rows if r["network"] == name]
    table = []
    for names, drop in itertools.product(SUBSETS, DROPS):
        if not mine:
            continue
        key = ",".join(names)
        dense = mine[0]["top1"][key]["dense"]
        found = {
            which: macs_at([(r["kept"], r["top1"][key][which]) for r in mine], dense - drop / 100)
            for which in ("all", "three")
        }
        both = found["all"] is not None and found["three"] is not None
        ratio = f"{found['all'] / found['three']:.2f}" if both else "–"  # type: ignore[operator]
        cells = [
            "–" if v is None else f"{'≤ ' if v == min(KEPT) else ''}{100 * v:.1f} %" for v in found.values()
        ]
        table.append([key, f"{100 * dense:.2f} %", f"{drop}", *cells, ratio])
    return table
