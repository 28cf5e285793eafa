"""Every criterion at equal MACs: accuracy after each repair, and after the same short fine-tune.

Resumable: each finished row is a line of `criteria.jsonl`; two processes of one thread each share the work.
"""

from __future__ import annotations

import itertools
import multiprocessing as mp
import statistics as stats
from typing import Any

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

CRITERIA = ("excitation", "random", "l1", "l2", "bn-scale", "fpgm", "lamp", "taylor", "hessian")
KEPT = (0.75, 0.5, 0.3)
SEEDS = (0, 1, 2)
ROWS = FOLDER / "criteria.jsonl"
SETTINGS: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 128,
    "lr": 0.02,
    "ema_decay": 0.99,
    "label_smoothing": 0.0,
    "amp": "bf16",
}
PHASES = {
    "bn": "BN recalibrated, no training",
    "refit": "least squares and BN recalibrated, no training",
    "finetuned": "the same, then fine-tuned",
}
Job = tuple[str, str, float, int]


def run_job(job: Job) -> dict[str, Any]:
    """Cut and recalibrate; cut, re-fit and fine-tune; evaluate each."""
    import torch

    from se_prune.data import open_data
    from se_prune.pipeline import apply_plan, assess, finetune, plan, structure
    from se_prune.recipe import FINETUNE_DEFAULTS, train_settings
    from se_prune.records import Budget

    torch.set_num_threads(1)
    name, criterion, kept, seed = job
    device, data, network = torch.device("cpu"), open_data("fashion-mnist"), bundled(name)
    found = structure(network)
    budget = Budget(kind="macs", value=kept)
    row: dict[str, Any] = {"network": name, "criterion": criterion, "kept": kept, "seed": seed}
    for repair in ("bn", "refit"):  # a criterion may count on the repair that follows
        chosen = plan(
            network, found, budget, criterion=criterion, device=device, data=data, repair=repair, seed=seed
        )
        applied = apply_plan(network, found, chosen, device=device, data=data, repair=repair, seed=seed)
        row[repair] = assess(applied.network, data, device=device)[1].top1
        row["macs"] = applied.after.macs / applied.before.macs
    settings = train_settings(None, "finetune", **{**FINETUNE_DEFAULTS, **SETTINGS})
    tuned = finetune(applied.network, data, settings, device=device, teacher=network, seed=seed)
    row["finetuned"] = assess(tuned, data, device=device)[1].top1
    return row


def _key(row: dict[str, Any]) -> Job:
    return row["network"], row["criterion"], row["kept"], row["seed"]


def main() -> None:
    """Run what is missing, then write `reports/criteria.md`."""
    done = {_key(row) for row in read_rows(ROWS)}
    jobs = [
        (name, criterion, kept, seed)
        for criterion, kept, seed, name in itertools.product(CRITERIA, KEPT, SEEDS, NETWORKS)
    ]
    jobs.sort(key=lambda job: job[2] == max(KEPT))  # the mildest cut says least and comes last
    todo = [job for job in jobs if job not in done]
    with mp.get_context("spawn").Pool(2) as pool:
        for row in track(pool.imap_unordered(run_job, todo), "criteria", total=len(todo)):
            append_row(ROWS, row)
    report()


def report() -> None:
    """Write `reports/criteria.md` from the rows that are there."""
    rows = read_rows(ROWS)
    body = ["# Criteria at equal MACs\n"]
    body.append(
        "Top-1 on the 10,000 test images, mean ± standard deviation over seeds (which choose the training images that "
        "are measured, and the order of fine-tuning). Same plan solver, same repair (least squares on 1,024 images, BN "
        f"on 2,048), same fine-tune ({SETTINGS['epochs']} epochs on the bundled 12,000 images, distilled from the "
        "dense network). The rows were made when BN statistics were re-estimated after least squares in any case.\n"
    )
    for name, (phase, title) in itertools.product(NETWORKS, PHASES.items()):
        mine = [r for r in rows if r["network"] == name]
        body.append(f"## zoo:{name}, {title}\n")
        table = []
        for criterion in CRITERIA:
            cells = []
            for kept in KEPT:
                values = [100 * r[phase] for r in mine if r["criterion"] == criterion and r["kept"] == kept]
                spread = stats.stdev(values) if len(values) > 1 else 0.0
                cells.append(f"{stats.mean(values):.2f} ± {spread:.2f} ({len(values)})" if values else "–")
            table.append([criterion, *cells])
        body.append(markdown_table(["criterion", *(f"{100 * k:.0f} % of MACs" for k in KEPT)], table))
    body.append("In brackets: how many seeds.\n")
    write_report("criteria", "python -m reports.bench criteria", "\n".join(body), rows)
