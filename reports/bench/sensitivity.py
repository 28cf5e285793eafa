"""Does the predicted loss of a group, from statistics alone, tell what leaves the outputs when it is cut?

Each group of the bundled networks alone loses a share of its channels, in the order of `excitation`; what reads it is
re-fitted. Measured are the KL divergence of the class probabilities from the dense network's, on 1,024 training images
that neither scores nor repair have seen, and the top-1 that is lost on the 10,000 test images, in points. Resumable.
"""

from __future__ import annotations

import dataclasses
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
    spearman,
    write_report,
)
from reports.bench.scores import evidence_of
from se_prune.artifact import Network
from se_prune.data import DataSource, open_data
from se_prune.data.batches import TensorImages
from se_prune.data.source import balanced_subset
from se_prune.evaluate import evaluate
from se_prune.layers import layer_costs
from se_prune.pipeline import structure
from se_prune.pipeline.measure import MEASURED_IMAGES
from se_prune.planning import make_plan, predicted_loss
from se_prune.records import Budget
from se_prune.scoring import score
from se_prune.surgery.cut import cut
from se_prune.surgery.refit import refit
from se_prune.surgery.repair import divergence

CRITERIA = ("excitation", "gate-obs", "gate-energy", "gate-fisher")
SHARES = (0.25, 0.5, 0.75)
IMAGES, REFIT_IMAGES = 1024, 512
#: What is measured of a cut, and its key in the rows.
MEASURED = {"KL divergence": "measured", "points lost": "points"}
ROWS = FOLDER / "sensitivity.jsonl"


def main() -> None:
    """Make the rows that are missing, then write `reports/sensitivity.md`."""
    torch.set_num_threads(1)
    data = open_data("fashion-mnist")
    for name in NETWORKS:
        done = {(r["group"], r["share"]) for r in read_rows(ROWS) if r["network"] == name}
        _study(name, bundled(name), data, done)
    report()


def _study(name: str, network: Network, data: DataSource, done: set[tuple[str, float]]) -> None:
    device, found, see = torch.device("cpu"), structure(network), network.header.preprocessing
    groups = {c.group.name: c.group for c in found.couplings if c.group.prunable and c.group.kind != "hidden"}
    todo = [(group, share) for group in groups for share in SHARES if (group, share) not in done]
    if not todo:
        return
    evidence = evidence_of(network, data, found, device)
    scores = {criterion: score(criterion, evidence) for criterion in CRITERIA}
    costs = layer_costs(network.module.cpu(), found.cost.per_layer)
    whole = make_plan(found.couplings, costs, scores[CRITERIA[0]], Budget(kind="macs", value=1.0))
    order = balanced_subset(data.train, len(data.train) - 1, 0)  # measured images stand first
    assert isinstance(order, TensorImages)
    dense = evaluate(network.module, data.test, see, device=device).top1
    unseen = order.take(torch.arange(MEASURED_IMAGES, MEASURED_IMAGES + IMAGES))
    for key, share in track(todo, f"sensitivity of {name}"):
        group, values = groups[key], scores[CRITERIA[0]].groups[key]
        together = sorted(group.together, key=lambda unit: sum(values[channel] for channel in unit))
        gone = [c for unit in together[: int(share * len(together))] for c in unit]
        planned = tuple(
            dataclasses.replace(g, removed=tuple(sorted(gone)) if g.name == key else ()) for g in whole.groups
        )
        chosen = dataclasses.replace(whole, groups=planned)
        module = cut(network.module, found.example, chosen).eval()
        refit(
            network.module,
            module,
            found.couplings,
            chosen,
            split=balanced_subset(data.train, REFIT_IMAGES, 0),
            preprocessing=see,
            device=device,
            sites=found.sites,
        )
        row: dict[str, Any] = {"network": name, "group": key, "kind": group.kind, "share": share}
        row["removed"] = len(gone)
        row["measured"] = divergence(network.module, module, unseen, see, device=device)
        row["points"] = 100 * (dense - evaluate(module, data.test, see, device=device).top1)
        row["predicted"] = {
            criterion: predicted_loss(scores[criterion], group, gone) for criterion in CRITERIA
        }
        append_row(ROWS, row)


def report() -> None:
    """Write `reports/sensitivity.md` from the rows that are there."""
    rows = read_rows(ROWS)
    body = (
        "# Sensitivity of channel groups: predicted and measured\n\n"
        + __doc__.partition("\n\n")[2].strip()
        + "\n\n"
    )
    lines = []
    for name in NETWORKS:
        mine = [row for row in rows if row["network"] == name]
        if len(mine) > 2:
            for what, key in MEASURED.items():
                correlations = (
                    spearman([r[key] for r in mine], [r["predicted"][criterion] for r in mine])
                    for criterion in CRITERIA
                )
                lines.append(
                    [f"zoo:{name}", str(len(mine)), what, *(f"{value:.2f}" for value in correlations)]
                )
    body += "Rank correlation (Spearman) of predicted with measured loss over all groups and shares:\n\n"
    body += markdown_table(["network", "cuts", "measured", *CRITERIA], lines) + "\n"
    body += markdown_table(
        ["network", "group", "kind", "removed", "share", *CRITERIA, *MEASURED],
        [
            [
                f"zoo:{r['network']}",
                r["group"],
                r["kind"],
                str(r["removed"]),
                f"{100 * r['share']:.0f} %",
                *(f"{r['predicted'][criterion]:.2g}" for criterion in CRITERIA),
                f"{r['measured']:.2g}",
                f"{r['points']:+.2f}",
            ]
            for r in rows
        ],
    )
    write_report("sensitivity", "python -m reports.bench sensitivity", body, rows)
