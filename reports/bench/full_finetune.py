"""A full fine-tune after the cut: a quarter of the training epochs on the whole training set.

Distilled from the dense network, logits and features. As a control, a network of the same shape with random weights is
trained by the whole recipe of the dense one. The environment's `FASHION_MNIST` names the folder of the four idx files.
Resumable: a run that is killed goes on at its step, and each finished one is a line of
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
from se_prune import artifact
from se_prune.artifact import Network
from se_prune.checkpoint import open_model
from se_prune.data import DataSource, open_data
from se_prune.pipeline import apply_plan, finetune, plan, structure
from se_prune.pipeline.training import new_network
from se_prune.recipe import train_settings
from se_prune.records import Budget

CPU = torch.device("cpu")
NAME = "se_resnet20"
KEPT = (0.5, 0.3)
SEEDS = (0, 1, 2)
STARTS = {"cut": "cut, fine-tuned", "random": "the same shape, random weights, the whole recipe"}
#: (start, fraction of the MACs, seed); the last is the control
JOBS = (*(("cut", kept, seed) for seed, kept in itertools.product(SEEDS, KEPT)), ("random", 0.5, 0))
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
RECIPE = FOLDER.parent / "recipes" / "fashion_se_resnet20.toml"


def cut_network(kept: float, seed: int, data: DataSource) -> Network:
    """Cut and repair on the whole training set, or take what an earlier run has cut."""
    dense, path = bundled(NAME), STATES / f"{kept}-{seed}" / "cut.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        found, budget = structure(dense), Budget(kind="macs", value=kept)
        chosen = plan(dense, found, budget, criterion="excitation", device=CPU, data=data, seed=seed)
        artifact.save(path, apply_plan(dense, found, chosen, device=CPU, data=data, seed=seed).network)
    return open_model(str(path))


def run_job(start: str, kept: float, seed: int) -> dict[str, Any]:
    """Train a cut network, or one of its shape; which test images were right after each step."""
    data, dense = open_data(os.environ["FASHION_MNIST"]), bundled(NAME)
    small = cut_network(kept, seed, data)
    chosen = small.header.plan
    assert chosen is not None
    row = {
        "start": start,
        "kept": kept,
        "seed": seed,
        "images": len(data.train),
        "macs": chosen.macs_after / chosen.macs_before,
        "dense": right(dense, data),
    }
    state = STATES / f"{kept}-{seed}"
    if start == "random":
        fresh = new_network(f"zoo:{NAME}", data, seed)
        small = apply_plan(fresh, structure(fresh), chosen, device=CPU, data=data, repair="none").network
        settings = train_settings(RECIPE, "train", compile=False)
        tuned = finetune(small, data, settings, device=CPU, seed=seed, resume=state / "random", stage="train")
    else:
        row["repaired"] = right(small, data)
        settings = train_settings(None, "finetune", **SETTINGS)
        tuned = finetune(
            small, data, settings, device=CPU, teacher=dense, seed=seed, resume=state / "training"
        )
    return {**row, "finetuned": right(tuned, data)}


def main() -> None:
    """Make the rows that are missing, then write `reports/full_finetune.md`."""
    if "FASHION_MNIST" not in os.environ:
        sys.exit("set FASHION_MNIST to the folder of the four idx files of the whole data set.")
    torch.set_num_threads(1)
    done = {_key(row) for row in read_rows(ROWS)}
    for job in track([job for job in JOBS if job not in done], "full fine-tune"):
        append_row(ROWS, run_job(*job))
        report()
    report()


def _key(row: dict[str, Any]) -> tuple[str, float, int]:
    return row["start"], row["kept"], row["seed"]


def report() -> None:
    """Write `reports/full_finetune.md` from the rows that are there."""
    rows = read_rows(ROWS)
    body = (
        "# A full fine-tune after the cut\n\n"
        f"zoo:{NAME} cut by `excitation`, repaired without labels, then trained for {SETTINGS['epochs']} epochs, a "
        "quarter of those that made it, on the whole training set, distilled from the dense network, logits and "
        "features. Top-1 on the 10,000 test images, mean ± deviation over seeds; the drop is from the dense network, "
        "in points.\n\n"
    )
    missing = set(JOBS) - {_key(row) for row in rows}
    if missing:
        names = (f"{STARTS[start]}, {100 * kept:.0f} %, seed {seed}" for start, kept, seed in sorted(missing))
        body += f"Not there yet: {'; '.join(names)}.\n\n"
    lines = []
    for start, kept in dict.fromkeys(job[:2] for job in JOBS):
        mine = [row for row in rows if (row["start"], row["kept"]) == (start, kept)]
        if not mine:
            continue
        tuned = [100 * top1(row["finetuned"]) for row in mine]
        spread = f" ± {stats.stdev(tuned):.2f}" if len(tuned) > 1 else ""
        dense = 100 * top1(mine[0]["dense"])
        repaired = [100 * top1(row["repaired"]) for row in mine if start == "cut"]
        lines.append(
            [
                f"{100 * stats.mean(row['macs'] for row in mine):.1f} %",
                STARTS[start],
                f"{dense:.2f}",
                f"{stats.mean(repaired):.2f}" if repaired else "",
                f"{stats.mean(tuned):.2f}{spread} ({len(tuned)})",
                f"{dense - stats.mean(tuned):.2f}",
            ]
        )
    body += markdown_table(["MACs kept", "start", "dense", "repaired", "trained (seeds)", "drop"], lines)
    stages = ("dense", "repaired", "finetuned")
    summary = [{key: top1(value) if key in stages else value for key, value in row.items()} for row in rows]
    write_report("full_finetune", "FASHION_MNIST=… python -m reports.bench full_finetune", body, summary)
