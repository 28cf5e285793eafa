"""Distillation from the dense network against plain fine-tuning, after the same cut to 30 % of the MACs.

Resumable: each network and seed is a line of `distill.jsonl`.
"""

from __future__ import annotations

import itertools
import statistics as stats
from collections.abc import Sequence
from typing import Any

import torch
from rich.progress import track

from reports.bench.answers import gain, right, top1
from reports.bench.common import (
    FOLDER,
    NETWORKS,
    append_row,
    bundled,
    markdown_table,
    read_rows,
    write_report,
)

KEPT = 0.3
SEEDS = (0, 1, 2)
ROWS = FOLDER / "distill.jsonl"
SETTINGS: dict[str, Any] = {"epochs": 2, "ema_decay": 0.99, "label_smoothing": 0.0}
#: What each arm changes of the settings, and whether it has a teacher.
ARMS: dict[str, tuple[bool, dict[str, Any]]] = {
    "labels alone": (False, {}),
    "labels alone, smoothed by 0.1": (False, {"label_smoothing": 0.1}),
    "distilled": (True, {}),
    "distilled, features too": (True, {"distill_features": 0.5}),
}
FIRST = "labels alone"


def run_job(name: str, seed: int) -> dict[str, Any]:
    """Cut and repair once, then fine-tune in every way; which test images were right after each."""
    from se_prune.data import open_data
    from se_prune.pipeline import apply_plan, finetune, plan, structure
    from se_prune.recipe import train_settings
    from se_prune.records import Budget

    device, data, dense = torch.device("cpu"), open_data("fashion-mnist"), bundled(name)
    found = structure(dense)
    common: dict[str, Any] = {"device": device, "data": data, "seed": seed}
    chosen = plan(dense, found, Budget(kind="macs", value=KEPT), criterion="excitation", **common)
    applied = apply_plan(dense, found, chosen, **common)
    row: dict[str, Any] = {
        "network": name,
        "seed": seed,
        "macs": applied.after.macs / applied.before.macs,
        "dense": right(dense, data),
        "repaired": right(applied.network, data),
    }
    for arm, (taught, changes) in ARMS.items():
        settings = train_settings(None, "finetune", **{**SETTINGS, **changes})
        tuned = finetune(
            applied.network, data, settings, device=device, teacher=dense if taught else None, seed=seed
        )
        row[arm] = right(tuned, data)
    return row


def main(limit: int | None = None) -> None:
    """Make the rows that are missing (at most `limit` of them), then write `reports/distill.md`."""
    torch.set_num_threads(1)
    done = {(row["network"], row["seed"]) for row in read_rows(ROWS)}
    todo = [job for job in itertools.product(NETWORKS, SEEDS) if job not in done]
    for name, seed in track(todo[:limit], "distill"):
        append_row(ROWS, run_job(name, seed))
    report()


def report() -> None:
    """Write `reports/distill.md` from the rows that are there."""
    rows = read_rows(ROWS)
    body = [
        "# Distillation against plain fine-tuning\n\n"
        f"The bundled networks cut to {100 * KEPT:.0f} % of their MACs (`excitation`) and repaired, then fine-tuned "
        f"for {SETTINGS['epochs']} epochs on the bundled 12,000 training images with the default settings but an "
        f"average of the weights (ema_decay = {SETTINGS['ema_decay']}) and, where nothing else is said, no label "
        "smoothing. Every arm of a seed starts from the same repaired network. Top-1 on the 10,000 test images, mean "
        "± standard deviation over seeds; the gain is that over labels alone, in points, with its 95 % interval over "
        "the test images and its standard deviation over seeds; p: paired test over the test images (the mean over "
        "seeds of right or wrong, two-sided normal).\n"
    ]
    missing = len(NETWORKS) * len(SEEDS) - len(rows)
    if missing:
        body.append(f"Of {len(NETWORKS) * len(SEEDS)} cuts, {missing} are not in the table yet.\n")
    for name in NETWORKS:
        mine = [row for row in rows if row["network"] == name]
        if mine:
            body += [f"## zoo:{name}\n", _table(mine)]
    stages = ("dense", "repaired", *ARMS)
    summary = [{key: top1(value) if key in stages else value for key, value in row.items()} for row in rows]
    write_report("distill", "python -m reports.bench distill", "\n".join(body), summary)


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for stage in ("dense", "repaired", *ARMS):
        values = [100 * top1(row[stage]) for row in rows]
        spread = f" ± {stats.stdev(values):.2f}" if len(values) > 1 else ""
        cells = [stage, f"{stats.mean(values):.2f}{spread} ({len(values)})", "", "", ""]
        if stage in ARMS and stage != FIRST:
            mean, half, seeds, p = gain([(row[FIRST], row[stage]) for row in rows])
            cells[2:] = [f"{mean:+.2f} ± {half:.2f}", f"{seeds:.2f}", "< 1e-16" if p < 1e-16 else f"{p:.2g}"]
        lines.append(cells)
    return markdown_table(["", "top-1, % (seeds)", "gain, points (95 %)", "spread of seeds", "p"], lines)
