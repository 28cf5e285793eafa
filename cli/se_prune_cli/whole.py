"""Running a recipe and showing what came of it, for `run` and `demo`; options that take the place of its keys."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from se_prune import text
from se_prune.schedule import StepShape
from se_prune_cli.exported import checked
from se_prune_cli.output import Output, Progressed
from se_prune_cli.tables import accuracy, costs, site_rows

if TYPE_CHECKING:
    from se_prune.recipe import RunRecipe

Steps = Annotated[
    int | None,
    typer.Option(
        help="Cut, repair and fine-tune in so many steps, measuring anew at each; shares the epochs."
    ),
]
Shape = Annotated[StepShape | None, typer.Option(help="What leaves in each of the steps.")]
MaxDrop = Annotated[
    float | None,
    typer.Option(
        help="Points of top-1: find the smallest network that loses no more, in place of the recipe's budget; exit "
        "code 3 where the last one loses more."
    ),
]


def given(**options: Any) -> dict[str, Any]:
    """Return the options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def run_and_show(
    recipe: Path,
    folder: Path,
    command: str,
    out: Output,
    *,
    device: str,
    seed: int | None,
    resume: bool,
    **options: Any,
) -> None:
    """Run a recipe into a folder and print its tables; options that are given come before its keys."""
    from se_prune.errors import NotKept
    from se_prune.pipeline import run_recipe
    from se_prune.recipe import find_recipe, read_run
    from se_prune.report import search
    from se_prune.report.sections import verdict
    from se_prune.schema import to_dict

    chosen, told = _overridden(read_run(find_recipe(recipe)), given(seed=seed, **options))
    command = f"{command}{told}"
    outcome = run_recipe(chosen, folder, command=command, device=device, reporter=Progressed(), resume=resume)
    run = outcome.run
    if run.sites:
        out.table("gates on training images", *site_rows(run.sites))
    out.table("cost of one image", *costs(run.cost_before, run.cost_after))
    out.table("accuracy on test images", *accuracy([(s.label, s.evaluation) for s in run.stages]))
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
    if run.max_drop is not None:
        found = search.tries(run.max_drop)
        out.table(found.caption, list(found.head), [list(row) for row in found.rows])
        out.console.print(search.sentence(run.max_drop), highlight=False)
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
        | ({} if run.max_drop is None else {"max_drop": to_dict(run.max_drop) | {"kept": run.max_drop.kept}})
    )
    if run.max_drop is not None and not run.max_drop.kept:
        raise NotKept(f"{search.sentence(run.max_drop)}; the files are in {folder}.")


def _overridden(recipe: RunRecipe, options: dict[str, Any]) -> tuple[RunRecipe, str]:
    """Return a recipe with the options in place of its keys, and the options as the report tells them."""
    from dataclasses import replace

    from se_prune.data.source import reference_name
    from se_prune.recipe import with_budget
    from se_prune.settings import SearchTable

    if "max_drop" in options:
        found = recipe.search
        search = (
            SearchTable(max_drop=options["max_drop"])
            if found is None
            else replace(found, max_drop=options["max_drop"])
        )
        recipe = replace(recipe, search=search, apply=with_budget(recipe.apply, None))
    of_apply = {name: options[name] for name in ("steps", "shape") if name in options}
    others = {name: options[name] for name in ("seed", "data", "workers") if name in options}
    shown = {name: value for name, value in options.items() if name != "workers"}
    if "data" in shown:
        shown["data"] = reference_name(shown["data"])
    told = "".join(f" --{name.replace('_', '-')} {value}" for name, value in shown.items())
    return replace(recipe, **others, apply=replace(recipe.apply, **of_apply)), told
