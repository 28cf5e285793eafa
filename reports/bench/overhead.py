"""The time of the statistics pass against plain inference over the same loader, interleaved."""

from __future__ import annotations

import statistics as stats
import time

import torch

from reports.bench.common import NETWORKS, bundled, markdown_table, write_report
from se_prune.data import open_data
from se_prune.data.source import balanced_subset
from se_prune.device import choose_device
from se_prune.gates.sites import find_sites
from se_prune.gates.statistics import collect
from se_prune.pipeline import example_input

IMAGES, ROUNDS, BATCH = 4096, 15, 256


def main() -> None:
    """Write `reports/overhead.md`."""
    data, device = open_data("fashion-mnist"), choose_device("auto")
    split = balanced_subset(data.train, IMAGES, 0)
    rows = []
    for name in NETWORKS:
        network = bundled(name)
        preprocessing = network.header.preprocessing
        sites = find_sites(network.module, example_input(preprocessing))

        @torch.no_grad()
        def plain(network=network, preprocessing=preprocessing) -> None:  # type: ignore[no-untyped-def]
            for images, _ in split.batches(BATCH, preprocessing):
                network.module(images.to(device))

        def measured(network=network, preprocessing=preprocessing, sites=sites) -> None:  # type: ignore[no-untyped-def]
            collect(
                network.module,
                sites,
                split,
                preprocessing,
                classes=data.classes,
                device=device,
                batch_size=BATCH,
            )

        ratios = []
        for round_ in range(ROUNDS + 1):
            times = {}
            for label, run in (("plain", plain), ("measured", measured))[:: 1 if round_ % 2 else -1]:
                start = time.perf_counter()
                run()
                times[label] = time.perf_counter() - start
            if round_:
                ratios.append(times["measured"] / times["plain"])
        rows.append(
            {
                "network": name,
                "images": IMAGES,
                "rounds": ROUNDS,
                "threads": torch.get_num_threads(),
                "median": stats.median(ratios),
                "min": min(ratios),
                "max": max(ratios),
            }
        )
    body = "# The statistics pass against plain inference\n\n" + (
        f"Time of the pass over {IMAGES:,} images divided by the time of plain inference over the same loader, in "
        f"{ROUNDS} interleaved rounds, {torch.get_num_threads()} threads.\n\n"
    )
    body += markdown_table(
        ["network", "median ratio", "min", "max"],
        [[f"zoo:{r['network']}", f"{r['median']:.3f}", f"{r['min']:.3f}", f"{r['max']:.3f}"] for r in rows],
    )
    write_report("overhead", "python -m reports.bench overhead", body, rows)
