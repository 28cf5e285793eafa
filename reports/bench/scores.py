"""Which score `excitation` is made of, what the gates add to it, how much MACs count, and what hidden units should do.

Decided on training images alone: those that are not measured for scores and repair. Resumable.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from reports.bench.common import (
    FOLDER,
    NETWORKS,
    append_row,
    bundled,
    markdown_table,
    read_rows,
    write_report,
)
from se_prune import planning
from se_prune.artifact import Network
from se_prune.data import DataSource, open_data
from se_prune.data.batches import TensorImages
from se_prune.data.source import balanced_subset
from se_prune.device import choose_device
from se_prune.evaluate import evaluate
from se_prune.layers import layer_costs
from se_prune.pipeline import analyze, apply_plan, structure
from se_prune.pipeline.measure import MEASURED_IMAGES, Structure, evidence_for
from se_prune.records import Budget, HiddenPolicy
from se_prune.scoring import Evidence, score

Variant = tuple[str, bool, float, HiddenPolicy]
#: (criterion, with the measured gates or with gates of 1, exponent of the MACs, what hidden units do)
VARIANTS: tuple[Variant, ...] = (
    ("gate-mean", True, 1.0, "tie"),
    ("gate-fisher", True, 1.0, "tie"),
    ("gate-energy", True, 1.0, "tie"),
    ("gate-obs", True, 1.0, "tie"),
    ("excitation", True, 1.0, "tie"),
    ("excitation", False, 1.0, "tie"),
    ("excitation", True, 0.0, "tie"),
    ("excitation", True, 0.5, "tie"),
    ("excitation", True, 0.75, "tie"),
    ("excitation", True, 1.25, "tie"),
    ("excitation", True, 1.0, "prune"),
    ("excitation", True, 1.0, "keep"),
)
KEPT = (0.5, 0.3)
IMAGES = 8000
ROWS = FOLDER / "scores.jsonl"


def main() -> None:
    """Write `reports/scores.md`."""
    data = open_data("fashion-mnist")
    for name in NETWORKS:
        network = bundled(name)
        mine = [r for r in read_rows(ROWS) if r["network"] == name]
        done = [(r["criterion"], r["gates"], r["power"], r["hidden"]) for r in mine]
        for row in _rows(network, data, [v for v in VARIANTS if v not in done]):
            append_row(ROWS, {"network": name, **row})
    report()


def _rows(network: Network, data: DataSource, variants: list[Variant]) -> Iterator[dict[str, Any]]:
    device = choose_device("auto")
    order = balanced_subset(data.train, len(data.train) - 1, 0)  # measured images stand first
    assert isinstance(order, TensorImages)
    held_out = order.take(torch.arange(MEASURED_IMAGES, MEASURED_IMAGES + IMAGES))
    found, full = structure(network), planning.COST_POWER
    evidence = evidence_of(network, data, found, device) if variants else None
    for criterion, gates, power, hidden in variants:
        assert evidence is not None
        have = evidence if gates else dataclasses.replace(evidence, statistics=None)
        scores = score(criterion, have)
        network.module.cpu()
        costs, top1 = layer_costs(network.module, found.cost.per_layer), {}
        for kept in KEPT:
            planning.COST_POWER = power
            chosen = planning.make_plan(
                found.couplings, costs, scores, Budget(kind="macs", value=kept), hidden=hidden
            )
            planning.COST_POWER = full
            applied = apply_plan(network, found, chosen, device=device, data=data)
            result = evaluate(applied.network.module, held_out, network.header.preprocessing, device=device)
            top1[str(kept)] = result.top1
        yield {"criterion": criterion, "gates": gates, "power": power, "hidden": hidden, "top1": top1}


def evidence_of(
    network: Network, data: DataSource, found: Structure, device: torch.device, seed: int = 0
) -> Evidence:
    """Return what criteria may read, measured as `apply` measures it."""
    statistics = analyze(network, data, device=device, images=MEASURED_IMAGES, seed=seed)
    subset = balanced_subset(data.train, MEASURED_IMAGES, seed)
    return evidence_for(
        network,
        found,
        subset,
        device=device,
        seed=seed,
        statistics=statistics,
        energies=statistics.energies,
    )


def report() -> None:
    """Write `reports/scores.md` from the rows that are there."""
    rows = read_rows(ROWS)
    body = "# Scores, gates, and how much MACs count\n\n"
    body += (
        f"Top-1 on {IMAGES:,} training images that neither scores nor repair have seen (the networks themselves were "
        "trained on them), repaired as `--repair refit` does, no training, one choice of measured images. `excitation` "
        'is the geometric mean of `gate-energy` and `gate-obs`. "Gates of 1": the same score without the measured '
        "gates. The power is the exponent of a channel's MACs in the price of a step (`planning.COST_POWER`, "
        f"{planning.COST_POWER} by default). Hidden units: `--hidden`.\n\n"
    )
    table = [
        [
            f"zoo:{row['network']}",
            row["criterion"],
            "measured" if row["gates"] else "of 1",
            f"{row['power']}",
            row["hidden"],
            *(f"{100 * value:.2f} %" for value in row["top1"].values()),
        ]
        for row in sorted(rows, key=lambda r: NETWORKS.index(r["network"]))
    ]
    columns = [
        "network",
        "criterion",
        "gates",
        "power",
        "hidden units",
        *(f"{100 * k:.0f} % of MACs" for k in KEPT),
    ]
    body += markdown_table(columns, table)
    write_report("scores", "python -m reports.bench scores", body, rows)
