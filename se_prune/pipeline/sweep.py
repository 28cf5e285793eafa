"""Budgets times criteria: one run each in a folder of its own; finished ones are kept; all are compared on one page."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from se_prune.errors import BudgetError, SePruneError, UsageError
from se_prune.files import make_folder, write_text
from se_prune.pipeline.latency import first_rounding
from se_prune.pipeline.measure import Reporter, Silent
from se_prune.pipeline.run import run_recipe
from se_prune.planning import check_ranges
from se_prune.recipe import ApplyTable, RunRecipe
from se_prune.records import Budget
from se_prune.report import load_run, write_report
from se_prune.results import Run
from se_prune.schema import from_json, to_json
from se_prune.scoring.registry import find

RECIPE, RECORD, STATISTICS = "recipe.json", "run.json", "statistics.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One run of a sweep, or the sentence that says why there is none; `kept` where it was finished before."""

    criterion: str
    budget: Budget
    folder: Path
    run: Run | None = None
    refused: str | None = None
    kept: bool = False

    @property
    def top1(self) -> float:
        """Accuracy at the end of the run."""
        assert self.run is not None, "a refused point has no accuracy"
        return self.run.stages[-1].evaluation.top1

    @property
    def speedup(self) -> float | None:
        """How much faster than the dense network, where it was measured."""
        return None if self.run is None or self.run.latency is None else self.run.latency[1].ratio


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """All points, in the order of budgets and criteria, and the files of the comparison."""

    points: tuple[Point, ...]
    files: tuple[Path, ...]


def sweep(
    base: RunRecipe,
    budgets: Sequence[Budget],
    criteria: Sequence[str],
    folder: Path,
    *,
    command: str,
    device: str = "auto",
    reporter: Reporter | None = None,
    on_point: Callable[[Point], None] | None = None,
) -> Sweep:
    """Run every budget with every criterion, but those that are finished, and write `report.html` over all of them.

    The statistics pass is made once; later runs read that of the first.

    Args:
        base: What all runs share; its own budget and criterion are left aside.
        budgets: Of one kind or several.
        criteria: Names of criteria.
        folder: A run goes to `CRITERION-KIND-VALUE` in it.
        command: The command line, for the report.
        device: Where to compute.
        reporter: Shows progress.
        on_point: Called with each point when it is there.

    Raises:
        UsageError: No budget or criterion, one that is out of range or unknown, or a folder that holds other settings.
        BudgetError: No budget can be met; the message is the last one's.
    """
    points = [
        _point(base, budget, criterion, folder) for budget, criterion in itertools.product(budgets, criteria)
    ]
    if not points:
        raise UsageError(
            "a sweep needs at least one budget and one criterion, such as --macs 0.7,0.5 --criterion l1."
        )
    kept = {point.folder: _finished(point, recipe) for point, recipe in points}
    make_folder(folder)
    done: list[Point] = []
    for number, (point, recipe) in enumerate(points):
        run = kept[point.folder]
        if run is not None:
            done.append(replace(point, run=run, kept=True))
        else:
            with (reporter or Silent()).stage(f"run {number + 1} of {len(points)}: {recipe.name}", None):
                done.append(
                    _run(
                        point, recipe, _statistics(points), command=command, device=device, reporter=reporter
                    )
                )
        if on_point is not None:
            on_point(done[-1])
    runs = [point.run for point in done if point.run is not None]
    if not runs:
        raise BudgetError(str(done[-1].refused))
    return Sweep(points=tuple(done), files=tuple(write_report(runs, folder / "report.html")))


def _point(base: RunRecipe, budget: Budget, criterion: str, folder: Path) -> tuple[Point, RunRecipe]:
    find(criterion)
    check_ranges(budget, first_rounding(base.apply.round_to), base.apply.min_channels)
    name = f"{criterion}-{budget.kind}-{budget.value:g}"
    others: dict[str, Any] = dict.fromkeys(("sparsity", "macs", "params", "latency", "latency_ms"))
    table: ApplyTable = replace(base.apply, **{**others, budget.kind: budget.value, "criterion": criterion})
    recipe = replace(base, apply=table, name=f"{criterion}, {budget.kind.replace('_', ' ')} {budget.value:g}")
    return Point(criterion=criterion, budget=budget, folder=folder / name), recipe


def _finished(point: Point, recipe: RunRecipe) -> Run | None:
    """Return the record of a run that is finished; None where it has yet to be made.

    Raises:
        UsageError: The folder holds a run of other settings.
    """
    settings, record = point.folder / RECIPE, point.folder / RECORD
    if not record.is_file():
        return None
    try:
        same = from_json(RunRecipe, settings.read_bytes()) == recipe
        run = load_run(record)
    except (OSError, SePruneError):
        same = False
    if not same:
        raise UsageError(
            f"{point.folder} holds a run of other settings, or a damaged one; choose another folder with -o, or "
            "remove it to run it again."
        )
    return run


def _statistics(points: Sequence[tuple[Point, RunRecipe]]) -> Path | None:
    """Return the statistics of any finished run of this sweep."""
    files = (point.folder / STATISTICS for point, _ in points if (point.folder / RECORD).is_file())
    return next((file for file in files if file.is_file()), None)


def _run(
    point: Point,
    recipe: RunRecipe,
    statistics: Path | None,
    *,
    command: str,
    device: str,
    reporter: Reporter | None,
) -> Point:
    make_folder(point.folder)
    write_text(point.folder / RECIPE, to_json(recipe))
    try:
        outcome = run_recipe(
            recipe, point.folder, command=command, device=device, statistics=statistics, reporter=reporter
        )
    except BudgetError as error:
        return replace(point, refused=str(error))
    return replace(point, run=outcome.run)


def pareto(points: Sequence[Point], cost: Callable[[Point], float]) -> set[Path]:
    """Return the folders of the points that no other beats: no dearer, no less accurate, and better in one."""
    there = [point for point in points if point.run is not None]
    return {
        p.folder
        for p in there
        if not any(
            cost(q) <= cost(p) and q.top1 >= p.top1 and (cost(q) < cost(p) or q.top1 > p.top1) for q in there
        )
    }
