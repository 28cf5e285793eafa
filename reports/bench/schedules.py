"""Several steps against one at 20 % of the MACs: the same epochs in all, shared over the steps.

Resumable: each network, way and seed is a line of `schedules.jsonl`.
"""

from __future__ import annotations

import itertools
import statistics as stats
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from reports.bench.answers import bits, gain, top1
from reports.bench.common import FOLDER, NETWORKS, append_row, markdown_table, read_rows, write_report

KEPT = 0.2
SEEDS = (0, 1, 2)
ROWS = FOLDER / "schedules.jsonl"
#: As in `recipes/demo.toml`, but for the epochs.
SETTINGS: dict[str, Any] = {
    "epochs": 6,
    "ema_decay": 0.99,
    "distill_weight": 1.0,
    "crop_padding": 0,
    "label_smoothing": 0.0,
}
#: Of each way, the keys of `[apply]`, and what it changes of the settings.
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one step": ({}, {}),
    "cubic, 3 steps": ({"steps": 3, "shape": "cubic"}, {}),
    "geometric, 3 steps": ({"steps": 3, "shape": "geometric"}, {}),
    "geometric, 3 steps, group lasso 0.01": ({"steps": 3, "shape": "geometric"}, {"group_lasso": 0.01}),
}
FIRST = "one step"
Job = tuple[int, str, str]


def run_job(seed: int, way: str, name: str) -> dict[str, Any]:
    """Run a recipe from end to end; which test images were right at its end, and the accuracy along its stages."""
    from se_prune.data import open_data
    from se_prune.pipeline import run_recipe
    from se_prune.recipe import ApplyTable, ModelTable, RunRecipe, train_settings

    table, changes = WAYS[way]
    recipe = RunRecipe(
        model=ModelTable(ref=f"zoo:{name}", pretrained=True),
        data="fashion-mnist",
        apply=ApplyTable(macs=KEPT, **table),
        finetune=train_settings(None, "finetune", **{**SETTINGS, **changes}),
        seed=seed,
        latency_rounds=0,
    )
    with tempfile.TemporaryDirectory() as folder:
        run = run_recipe(recipe, Path(folder), command="reports.bench schedules", device="cpu").run
    labels = open_data("fashion-mnist").test.labels
    return {
        "network": name,
        "way": way,
        "seed": seed,
        "macs": run.cost_after.macs / run.cost_before.macs,
        "stages": [
            {
                "stage": stage.label,
                "macs": (stage.macs or 0) / run.cost_before.macs,
                "top1": stage.evaluation.top1,
                "seconds": round(stage.seconds, 1),
            }
            for stage in run.stages
        ],
        "right": bits(torch.tensor(run.stages[-1].evaluation.predictions) == labels),
    }


def jobs() -> list[Job]:
    """Return all rows: those of the first seeds first, and the last way behind all others."""
    last = list(WAYS)[-1]
    every = ((seed, way, name) for seed, name, way in itertools.product(SEEDS, NETWORKS, WAYS))
    return sorted(every, key=lambda job: job[1] == last)


def main(limit: int | None = None) -> None:
    """Make the rows that are missing (at most `limit` of them), then write `reports/schedules.md`."""
    torch.set_num_threads(1)
    done = {(row["seed"], row["way"], row["network"]) for row in read_rows(ROWS)}
    todo = [job for job in jobs() if job not in done]
    for job in track(todo[:limit], "schedules"):
        append_row(ROWS, run_job(*job))
    report()


def report() -> None:
    """Write `reports/schedules.md` from the rows that are there."""
    rows = read_rows(ROWS)
    body = [
        "# Cutting in steps against cutting at once\n\n"
        f"The bundled networks cut to {100 * KEPT:.0f} % of their MACs (`excitation`, least squares and BN statistics "
        f"after each cut), and fine-tuned for {SETTINGS['epochs']} epochs in all on the bundled 12,000 training images "
        "with the settings of `recipes/demo.toml`. In 3 steps the epochs are shared 1, 1 and 4. Top-1 on the 10,000 "
        "test images, mean ± standard deviation over seeds; the gain is that over one step with the same seed, in "
        "points, with its 95 % interval over the test images and its standard deviation over seeds; p: paired test "
        "over the test images (the mean over seeds of right or wrong, two-sided normal).\n"
    ]
    missing = [job for job in jobs() if job not in {(r["seed"], r["way"], r["network"]) for r in rows}]
    if missing:
        names = "; ".join(f"{way} of {name}, seed {seed}" for seed, way, name in missing)
        body.append(f"Of {len(jobs())} rows, {len(missing)} are not there yet: {names}.\n")
    for name in NETWORKS:
        mine = [row for row in rows if row["network"] == name]
        if mine:
            body += [f"## zoo:{name}\n", _table(mine)]
    summary = [{**row, "right": top1(row["right"])} for row in rows]
    write_report("schedules", "python -m reports.bench schedules", "\n".join(body), summary)


def _table(rows: Sequence[dict[str, Any]]) -> str:
    of_way = {way: {r["seed"]: r for r in rows if r["way"] == way} for way in WAYS}
    lines = []
    for way, own in of_way.items():
        if not own:
            continue
        values = [100 * top1(row["right"]) for row in own.values()]
        spread = f" ± {stats.stdev(values):.2f}" if len(values) > 1 else ""
        kept = 100 * stats.mean(row["macs"] for row in own.values())
        cells = [way, f"{kept:.1f} %", f"{stats.mean(values):.2f}{spread} ({len(values)})", "", "", ""]
        both = sorted(own.keys() & of_way[FIRST].keys())
        if way != FIRST and both:
            mean, half, seeds, p = gain([(of_way[FIRST][s]["right"], own[s]["right"]) for s in both])
            apart = f"{seeds:.2f}" if len(both) > 1 else "–"
            cells[3:] = [f"{mean:+.2f} ± {half:.2f}", apart, "< 1e-16" if p < 1e-16 else f"{p:.2g}"]
        lines.append(cells)
    columns = ["", "MACs", "top-1, % (seeds)", "gain, points (95 %)", "spread of seeds", "p"]
    return markdown_table(columns, lines) + "\n" + _along(of_way)


def _along(of_way: dict[str, dict[int, dict[str, Any]]]) -> str:
    """Return the accuracy along the stages of every way, the mean over seeds."""
    text = "Along the way (mean of the seeds; in brackets the MACs):\n\n"
    for way, own in of_way.items():
        if own:
            stages = zip(*(row["stages"] for row in own.values()), strict=True)
            told = [
                f"{same[0]['stage']} {100 * stats.mean(s['top1'] for s in same):.2f}"
                f" ({100 * same[0]['macs']:.0f} %)"
                for same in stages
            ]
            text += f"- {way}: {'; '.join(told)}.\n"
    return text
