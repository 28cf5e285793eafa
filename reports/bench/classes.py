"""Cutting for three of the classes against cutting for all of them: MACs at equal accuracy on the three.

The class-agnostic cut is measured, planned and repaired on all classes' training images, the other on those of the
three; all answer with the three outputs on the three classes' test images. Without training, and after a fine-tune that
is distilled from the dense network: two epochs of all the bundled images, or six of those of three classes, which are
fewer steps. Resumable.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from rich.progress import track

from reports.bench.common import (
    FOLDER,
    NETWORKS,
    append_row,
    bundled,
    markdown_table,
    read_rows,
    write_report,
)
from reports.bench.criteria import finetuned
from se_prune.artifact import Network
from se_prune.data import DataSource, open_data
from se_prune.pipeline import apply_plan, assess, for_classes, like, plan, structure
from se_prune.records import Budget

CPU = torch.device("cpu")
SUBSETS = (("trouser", "sneaker", "bag"), ("pullover", "coat", "shirt"), ("t-shirt", "dress", "sandal"))
KEPT = (0.5, 0.35, 0.25, 0.18, 0.13, 0.09, 0.06, 0.04)
#: Accuracy below the dense network's on the three classes, in points.
DROPS = (0.2, 0.5, 1.0, 2.0, 5.0)
#: Epochs on the images of all classes, and on those of three.
EPOCHS = {"all": 2, "three": 6}
#: What a cut is called once it is fine-tuned on the three classes.
TRAINED = {"all": "all, trained for three", "three": "three, trained"}
#: Title of a table, its ways, and the pairs of ways whose MACs are compared.
TABLES: dict[str, tuple[tuple[str, ...], tuple[tuple[str, str], ...]]] = {
    "no training": (("all", "three"), (("all", "three"),)),
    "fine-tuned": (
        ("all, trained", "all, trained for three", "three, trained"),
        (("all, trained", "three, trained"), ("all, trained for three", "three, trained")),
    ),
}
ROWS = FOLDER / "classes.jsonl"


def main() -> None:
    """Write `reports/classes.md`."""
    torch.set_num_threads(1)
    data = open_data("fashion-mnist")
    done = {(r["network"], r["kept"]) for r in read_rows(ROWS)}
    todo = [job for job in itertools.product(NETWORKS, KEPT) if job not in done]
    for name, kept in track(todo, "classes"):
        append_row(ROWS, {"network": name, "kept": kept, "top1": _accuracies(bundled(name), data, kept)})
        report()
    report()


def _cut(network: Network, data: DataSource, kept: float) -> Network:
    found, budget = structure(network), Budget(kind="macs", value=kept)
    chosen = plan(network, found, budget, criterion="excitation", device=CPU, data=data)
    return apply_plan(network, found, chosen, device=CPU, data=data).network


def _accuracies(network: Network, data: DataSource, kept: float) -> dict[str, dict[str, float]]:
    """Return per subset the accuracy of the dense network and of each way on its test images."""
    every = _cut(network, data, kept)
    trained = finetuned(every, network, data, epochs=EPOCHS["all"])
    result = {}
    for names in SUBSETS:
        small, part = for_classes(network, data, names)
        cuts = {"all": like(every, small, data), "three": _cut(small, part, kept)}
        found = {"dense": small, **cuts, "all, trained": like(trained, small, data)}
        for which, after in TRAINED.items():
            found[after] = finetuned(cuts[which], small, part, epochs=EPOCHS["three"])
        result[",".join(names)] = {key: assess(own, part, device=CPU)[1].top1 for key, own in found.items()}
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
    body = [
        "# Cutting for three classes\n\n"
        "Smallest share of the dense MACs that keeps the dense network's accuracy on the three classes within a number "
        "of points (3,000 test images, the three outputs alone): cut for all ten classes, and cut for the three. "
        f"Fine-tuned: {EPOCHS['all']} epochs on the 12,000 bundled images, or {EPOCHS['three']} on the 3,600 of the "
        "three classes, distilled from the dense network. Budgets measured: "
        f'{", ".join(f"{100 * k:g} %" for k in KEPT)}; linear in between. "≤": the smallest budget measured still '
        'reaches it. "–": the largest one does not.\n'
    ]
    missing = len(NETWORKS) * len(KEPT) - len(rows)
    if missing:
        body.append(f"Of {len(NETWORKS) * len(KEPT)} budgets, {missing} are not in the tables yet.\n")
    found = [[row for row in rows if row["network"] == name] for name in NETWORKS]
    found = [mine for mine in found if mine]
    for mine in found:
        for title, (ways, pairs) in TABLES.items():
            columns = ("classes", "dense", "points", *ways, *(_over(pair) for pair in pairs))
            body += [
                f"## zoo:{mine[0]['network']}, {title}\n",
                markdown_table(columns, _table(mine, ways, pairs)),
            ]
    for title, (_, pairs) in TABLES.items():
        for pair in pairs:
            ratios = [ratio for mine in found for ratio in _ratios(mine, pair)]
            if ratios:
                body.append(
                    f"{title.capitalize()}, {_over(pair)}: over the {len(ratios)} cases in which both reach it, "
                    f"{min(ratios):.2f} to {max(ratios):.2f}, {statistics.median(ratios):.2f} in the median.\n"
                )
    write_report("classes", "python -m reports.bench classes", "\n".join(body), rows)


def _over(pair: tuple[str, str]) -> str:
    return " : ".join(pair)


def _least(rows: Sequence[dict[str, Any]], names: Sequence[str], way: str, drop: float) -> float | None:
    """Return the smallest share of the MACs at which a way loses no more points than `drop` on a subset."""
    key = ",".join(names)
    points = [(row["kept"], row["top1"][key][way]) for row in rows]
    return macs_at(points, rows[0]["top1"][key]["dense"] - drop / 100)


def _ratio(
    rows: Sequence[dict[str, Any]], names: Sequence[str], pair: Sequence[str], drop: float
) -> float | None:
    first, second = (_least(rows, names, way, drop) for way in pair)
    if first is None or second is None or first == second == min(row["kept"] for row in rows):
        return None
    return first / second


def _ratios(rows: Sequence[dict[str, Any]], pair: tuple[str, str]) -> list[float]:
    found = [_ratio(rows, names, pair, drop) for names, drop in itertools.product(SUBSETS, DROPS)]
    return [ratio for ratio in found if ratio is not None]


def _table(
    rows: Sequence[dict[str, Any]], ways: Sequence[str], pairs: Sequence[tuple[str, str]]
) -> list[list[str]]:
    table = []
    for names, drop in itertools.product(SUBSETS, DROPS):
        key = ",".join(names)
        cells = [f"{100 * rows[0]['top1'][key]['dense']:.2f} %", f"{drop:g}"]
        for way in ways:
            least = _least(rows, names, way, drop)
            mark = "≤ " if least == min(row["kept"] for row in rows) else ""
            cells.append("–" if least is None else f"{mark}{100 * least:.1f} %")
        for pair in pairs:
            ratio = _ratio(rows, names, pair, drop)
            cells.append("–" if ratio is None else f"{ratio:.2f}")
        table.append([key, *cells])
    return table
