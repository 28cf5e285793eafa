"""A full fine-tune after the cut: a quarter of the training epochs on the whole training set.

Distilled from the dense network, logits and features. The environment's `FASHION_MNIST` names the folder of the four
idx files. Resumable: a run that is killed goes on at its step, and each finished one is a line of
`full_finetune.jsonl`.
"""

from __future__ import annotations

import itertools
import os
import statistics as stats
import sys
from typing import Any

import torch
from rich.progress import track

from reports.bench.answers import right, top1
from reports.bench.common import FOLDER, append_row, bundled, markdown_table, read_rows, write_report

NAME = "se_resnet20"
KEPT = (0.5, 0.3)
SEEDS = (0, 1, 2)
ROWS = FOLDER / "full_finetune.jsonl"
STATES = FOLDER.parent / "runs" / "full_finetune"
#: A quarter of the 32 epochs of `recipes/fashion_se_resnet20.toml`. Chosen by the agreement with the dense network on
#: 8,000 training images held out from four epochs of fine-tuning: features are distilled strongly, the rate is low, and
#: images are flipped but neither shifted nor erased, which the dense network was trained to take in its stride.
SETTINGS: dict[str, Any] = {
    "epochs": 8,
    "batch_size": 128,
    "lr": 0.02,
    "weight_decay": 5e-4,
    "label_smoothing": 0.0,
    "ema_decay": 0.998,
    "crop_padding": 0,
    "distill_features": 20.0,
    "amp": "bf16",
}


def run_job(kept: float, seed: int) -> dict[str, Any]:
    """Cut and repair on the whole training set, then fine-tune; which test images were right after each."""
    from se_prune import artifact
    from se_prune.checkpoint import open_model
    from se_prune.data import open_data
    from se_prune.pipeline import apply_plan, finetune, plan, structure
    from se_prune.recipe import train_settings
    from se_prune.records import Budget

    device, data, dense = torch.device("cpu"), open_data(os.environ["FASHION_MNIST"]), bundled(NAME)
    state = STATES / f"{kept}-{seed}"
    state.mkdir(parents=True, exist_ok=True)
    cut = state / "cut.safetensors"
    if not cut.exists():
        found, common = structure(dense), {"device": device, "data": data, "seed": seed}
        budget = Budget(kind="macs", value=kept)
        chosen = plan(dense, found, budget, criterion="excitation", **common)  # type: ignore[arg-type]
        artifact.save(cut, apply_plan(dense, found, chosen, **common).network)  # type: ignore[arg-type]
    small = open_model(str(cut))
    assert small.header.plan is not None
    settings = train_settings(None, "finetune", **SETTINGS)
    tuned = finetune(
        small, data, settings, device=device, teacher=dense, seed=seed, resume=state / "training"
    )
    return {
        "kept": kept,
        "seed": seed,
        "images": len(data.train),
        "macs": small.header.plan.macs_after / small.header.plan.macs_before,
        "dense": right(dense, data),
        "repaired": right(small, data),
        "finetuned": right(tuned, data),
    }


def main() -> None:
    """Make the rows that are missing, then write `reports/full_finetune.md`."""
    if "FASHION_MNIST" not in os.environ:
        sys.exit("set FASHION_MNIST to the folder of the four idx files of the whole data set.")
    torch.set_num_threads(1)
    done = {(row["kept"], row["seed"]) for row in read_rows(ROWS)}
    jobs = [(kept, seed) for seed, kept in itertools.product(SEEDS, KEPT)]
    for kept, seed in track([job for job in jobs if job not in done], "full fine-tune"):
        append_row(ROWS, run_job(kept, seed))
        report()
    report()


def report() -> None:
    """Write `reports/full_finetune.md` from the rows that are there."""
    rows = read_rows(ROWS)
    body = (
        "# A full fine-tune after the cut\n\n"
        f"zoo:{NAME} cut by `excitation`, repaired without labels, then trained for {SETTINGS['epochs']} epochs, a "
        "quarter of those that made it, on the whole training set, distilled from the dense network, logits and "
        "features. Top-1 on the "
        "10,000 test images, mean ± deviation over seeds; the drop is from the dense network, in points.\n\n"
    )
    lines = []
    for kept in KEPT:
        mine = [row for row in rows if row["kept"] == kept]
        if not mine:
            continue
        tuned = [100 * top1(row["finetuned"]) for row in mine]
        spread = f" ± {stats.stdev(tuned):.2f}" if len(tuned) > 1 else ""
        dense = 100 * top1(mine[0]["dense"])
        lines.append(
            [
                f"{100 * stats.mean(row['macs'] for row in mine):.1f} %",
                f"{dense:.2f}",
                f"{stats.mean(100 * top1(row['repaired']) for row in mine):.2f}",
                f"{stats.mean(tuned):.2f}{spread} ({len(tuned)})",
                f"{dense - stats.mean(tuned):.2f}",
            ]
        )
    body += markdown_table(["MACs kept", "dense", "repaired", "fine-tuned (seeds)", "drop"], lines)
    stages = ("dense", "repaired", "finetuned")
    summary = [{key: top1(value) if key in stages else value for key, value in row.items()} for row in rows]
    write_report("full_finetune", "FASHION_MNIST=… python -m reports.bench full_finetune", body, summary)
