"""How alive the bundled networks' gates are, and what freezing them costs on the test images."""

from __future__ import annotations

import torch

from reports.bench.common import NETWORKS, bundled, markdown_table, write_report
from se_prune.data import open_data
from se_prune.device import choose_device
from se_prune.evaluate import evaluate, paired
from se_prune.gates.summary import fold_constants, summarise
from se_prune.gates.tap import constant_gates, tap
from se_prune.pipeline import analyze
from se_prune.schema import to_dict


def main() -> None:
    """Write `reports/bundled.md`."""
    data, device = open_data("fashion-mnist"), choose_device("auto")
    text = ["# The bundled networks\n"]
    text.append(
        "Gates on the 12,000 bundled training images; accuracy on the 10,000 test images. *Frozen at their means*: "
        "every gate replaced by its mean per channel; *best constants*: by E[s·u²]/E[u²]; neither is retrained.\n"
    )
    rows = []
    for name in NETWORKS:
        network = bundled(name)
        statistics = analyze(network, data, device=device)
        summaries = summarise(statistics)
        variants: dict[str, dict[str, torch.Tensor]] = {
            "as trained": {},
            "frozen at their means": {n: s.s.sum(0) / statistics.n for n, s in statistics.sums.items()},
            "best constants": {n: fold_constants(s) for n, s in statistics.sums.items()},
        }
        results = {}
        for label, constants in variants.items():
            with tap(network.module, statistics.sites, constant_gates(constants)):
                results[label] = evaluate(
                    network.module,
                    data.test,
                    network.header.preprocessing,
                    device=device,
                    classes=data.classes,
                )
        dense = results["as trained"]
        training = next(e.details for e in network.header.history if e.stage == "train")
        text.append(f"## zoo:{name}\n")
        text.append(
            f"Trained {training['settings']['epochs']} epochs on {training['train_images']:,} images, seed "
            f"{training['seed']}, by the command at the top of `recipes/fashion_{name}.toml`.\n"
        )
        table = []
        for label, result in results.items():
            test = paired(dense, result, data.test)
            low, high = result.top1_ci95
            table.append(
                [
                    label,
                    f"{100 * result.top1:.2f} %",
                    f"{100 * low:.2f} to {100 * high:.2f} %",
                    "" if label == "as trained" else f"{100 * test.top1_difference:+.2f}",
                    "" if label == "as trained" else f"{test.p_value:.2g}" if test.p_value else "< 1e-300",
                ]
            )
        text.append(markdown_table(["gates", "top-1", "95 % interval", "points", "McNemar p"], table))
        text.append(
            markdown_table(
                [
                    "site",
                    "channels",
                    "hidden",
                    "mean",
                    "std over images",
                    "class specificity",
                    "saturated",
                    "fold loss",
                ],
                [
                    [
                        s.name,
                        str(s.channels),
                        str(s.hidden),
                        f"{s.mean:.3f}",
                        f"{s.std_images:.3f}",
                        f"{s.class_specificity:.2f}",
                        f"{100 * s.saturated:.1f} %",
                        f"{100 * s.fold_loss:.2f} %",
                    ]
                    for s in summaries
                ],
            )
        )
        rows.append(
            {
                "network": name,
                "sites": [to_dict(s) for s in summaries],
                "top1": {label: r.top1 for label, r in results.items()},
            }
        )
    write_report("bundled", "python -m reports.bench bundled", "\n".join(text), rows)
