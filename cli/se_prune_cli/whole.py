"""Running a recipe and showing what came of it, for `run` and `demo`."""

from __future__ import annotations

from pathlib import Path

from se_prune import text
from se_prune_cli.exported import checked
from se_prune_cli.output import Output, Progressed
from se_prune_cli.tables import accuracy, costs, site_rows


def run_and_show(
    recipe: Path,
    folder: Path,
    command: str,
    out: Output,
    *,
    device: str,
    seed: int | None,
    resume: bool,
    data: str | None = None,
    workers: int | None = None,
) -> None:
    """Run a recipe into a folder and print its tables; options that are given come before its keys."""
    from dataclasses import replace

    from se_prune.data.source import reference_name
    from se_prune.pipeline import run_recipe
    from se_prune.recipe import find_recipe, read_run
    from se_prune.report.sections import verdict

    chosen = read_run(find_recipe(recipe))
    if seed is not None:
        chosen, command = replace(chosen, seed=seed), f"{command} --seed {seed}"
    if data is not None:
        chosen, command = replace(chosen, data=data), f"{command} --data {reference_name(data)}"
    if workers is not None:
        chosen = replace(chosen, workers=workers)
    outcome = run_recipe(chosen, folder, command=command, device=device, reporter=Progressed(), resume=resume)
    run = outcome.run
    if run.sites:
        out.table("gates on training images", *site_rows(run.sites))
    out.table("cost of one image", *costs(run.cost_before, run.cost_after))
    out.table("accuracy on test images", *accuracy([(s.stage, s.evaluation) for s in run.stages]))
    out.console.print(verdict(run), highlight=False)
    if run.latency is not None:
        dense, cut = run.latency
        out.console.print(
            f"latency, {cut.runtime}, batch 1, threads {cut.threads}: {text.milliseconds(dense.median_ms)} → "
            f"{text.milliseconds(cut.median_ms)} ({text.speed(cut.ratio)}, {cut.rounds} interleaved rounds)",
            highlight=False,
        )
    for item in run.exported:
        out.console.print(
            f"{item.target}: {item.output}, {text.file_size(item.bytes)}, {checked(item)}",
            highlight=False,
        )
    out.console.print(f"report: {outcome.files['report']}", highlight=False)
    dense_top1, final = run.stages[0].evaluation.top1, run.stages[-1].evaluation.top1
    out.document(
        {
            "before": {"params": run.cost_before.params, "macs": run.cost_before.macs},
            "after": {"params": run.cost_after.params, "macs": run.cost_after.macs},
            "top1_before": dense_top1,
            "top1_after": final,
            "sites_folded": run.plan.sites_folded,
            "max_abs_diff_masked": run.max_abs_diff_masked,
            "files": {name: str(path) for name, path in outcome.files.items()},
        }
    )
