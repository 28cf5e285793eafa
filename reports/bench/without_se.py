"""The bundled networks beside the same networks without SE blocks, trained alike.

The networks without SE are not bundled; `runs/without-se/` holds them after the commands that this study names.
"""

from __future__ import annotations

import sys
from pathlib import Path

from reports.bench.common import NETWORKS, bundled, markdown_table, write_report
from se_prune.checkpoint import open_model
from se_prune.cost import count_cost
from se_prune.data import open_data
from se_prune.device import choose_device
from se_prune.evaluate import paired
from se_prune.pipeline import assess
from se_prune.results import Evaluation

TRAINED = Path("runs/without-se")


def command(with_se: str) -> str:
    """Return the command that trains the twin without SE of a bundled network."""
    name = with_se.removeprefix("se_")
    return (
        f"se-prune train --arch zoo:{name} --data DIR --recipe recipes/fashion_{with_se}.toml "
        f"-o {TRAINED}/{name}.safetensors"
    )


def main() -> None:
    """Write `reports/without_se.md`."""
    data, device = open_data("fashion-mnist"), choose_device("auto")
    table, rows = [], []
    for name in NETWORKS:
        path = TRAINED / f"{name.removeprefix('se_')}.safetensors"
        if not path.exists():
            sys.exit(f"{path} is missing; make it with `{command(name)}` (DIR: the four idx files).")
        results: list[Evaluation] = []
        for network in (bundled(name), open_model(path)):
            _, result = assess(network, data, device=device)
            cost = count_cost(network.module, network.header.preprocessing)
            results.append(result)
            training = next(e.details for e in network.header.history if e.stage == "train")
            row = {
                "network": network.header.arch.ref,
                "params": cost.params,
                "macs": cost.macs,
                "epochs": training["settings"]["epochs"],
                "images": training["train_images"],
                "seed": training["seed"],
                "top1": result.top1,
            }
            rows.append(row)
            low, high = result.top1_ci95
            table.append(
                [
                    row["network"],
                    f"{row['images']:,}",
                    str(row["epochs"]),
                    str(row["seed"]),
                    f"{cost.params:,}",
                    f"{cost.macs / 1e6:.1f} M",
                    f"{100 * result.top1:.2f} %",
                    f"{100 * low:.2f} to {100 * high:.2f} %",
                ]
            )
        test = paired(results[0], results[1], data.test)
        table[-1].append(f"{100 * test.top1_difference:+.2f} (p = {test.p_value:.2g})")
        table[-2].append("")
    body = "# The bundled networks and the same without SE\n\n"
    body += (
        f"Trained alike, by the same recipe; accuracy on the {len(data.test):,} test images. "
        "Points: without SE minus with SE, exact McNemar test. One seed each: the difference between seeds is not "
        "known here.\n\n"
    )
    columns = [
        "network",
        "training images",
        "epochs",
        "seed",
        "parameters",
        "MACs",
        "top-1",
        "95 % interval",
        "points",
    ]
    body += markdown_table(columns, table)
    body += "\nThe networks without SE:\n\n" + "".join(f"- `{command(name)}`\n" for name in NETWORKS)
    write_report("without_se", "python -m reports.bench without_se", body, rows)
