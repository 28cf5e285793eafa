"""How much a channel's MACs should count when `excitation` sets the widths: the choice of `planning.COST_POWER`.

Decided on training images alone: those that are not measured for scores and repair.
"""

from __future__ import annotations

import torch

from reports.bench.common import NETWORKS, bundled, markdown_table, write_report
from se_prune import planning
from se_prune.data import open_data
from se_prune.data.source import balanced_subset
from se_prune.device import choose_device
from se_prune.evaluate import evaluate
from se_prune.pipeline import analyze, apply_plan, plan, structure
from se_prune.pipeline.measure import MEASURED_IMAGES
from se_prune.records import Budget

POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
KEPT = (0.75, 0.5, 0.3)
IMAGES = 4000


def main() -> None:
    """Write `reports/allocation.md`."""
    data, device = open_data("fashion-mnist"), choose_device("auto")
    order = balanced_subset(data.train, len(data.train) - 1, 0)  # measured images stand first
    held_out = order.take(torch.arange(MEASURED_IMAGES, MEASURED_IMAGES + IMAGES))
    chosen_power, rows = planning.COST_POWER, []
    for name in NETWORKS:
        network = bundled(name)
        found = structure(network)
        statistics = analyze(network, data, device=device, images=MEASURED_IMAGES)
        for power in POWERS:
            planning.COST_POWER = power
            accuracies = []
            for kept in KEPT:
                budget = Budget(kind="macs", value=kept)
                chosen = plan(
                    network,
                    found,
                    budget,
                    criterion="excitation",
                    device=device,
                    data=data,
                    statistics=statistics,
                )
                applied = apply_plan(network, found, chosen, device=device, data=data, repair="bn")
                preprocessing = network.header.preprocessing
                accuracies.append(
                    evaluate(applied.network.module, held_out, preprocessing, device=device).top1
                )
            rows.append(
                {"network": name, "power": power, "top1": dict(zip(map(str, KEPT), accuracies, strict=True))}
            )
    planning.COST_POWER = chosen_power
    body = "# How much MACs count when widths are set\n\n"
    body += (
        f"Top-1 on {IMAGES:,} training images that neither scores nor repair have seen (the networks themselves were "
        "trained on them), `excitation`, BN recalibrated, no training. The power is the exponent of a channel's MACs "
        f"in the price of a step (`planning.COST_POWER`); {chosen_power} is the default.\n\n"
    )
    body += markdown_table(
        ["network", "power", *(f"{100 * k:.0f} % of MACs" for k in KEPT)],
        [
            [f"zoo:{r['network']}", f"{r['power']}", *(f"{100 * v:.2f} %" for v in r["top1"].values())]
            for r in rows
        ],
    )
    write_report("allocation", "python -m reports.bench allocation", body, rows)
