"""The smallest network that keeps a drop: bisection over the MACs, decided on images that no try has seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from se_prune import distributed
from se_prune.data import DataSource
from se_prune.errors import BudgetError, NotKept
from se_prune.evaluate import drop
from se_prune.files import remove_folder
from se_prune.gates.statistics import Statistics
from se_prune.pipeline import measure
from se_prune.pipeline.progress import Progress
from se_prune.pipeline.steps import Course, compress_in_steps
from se_prune.recipe import RunRecipe, with_budget
from se_prune.records import Budget
from se_prune.results import Try
from se_prune.settings import SearchTable
from se_prune.training.stopping import hold_out


def parted(data: DataSource, table: SearchTable, seed: int) -> tuple[DataSource, DataSource]:
    """Return the data of a search, whose test images are those that decide, and the data of what follows it.

    Raises:
        DataError: There are too few images.
    """
    split = data.train if table.images == "train" else data.test
    rest, held = hold_out(split, table.held_out, seed)
    if table.images == "train":
        return replace(data, train=rest, test=held), data
    return replace(data, test=held), replace(data, test=rest)


def smallest(course: Course, table: SearchTable) -> float:
    """Return the smallest fraction of the MACs whose network keeps the drop; the progress holds every try.

    A network of more MACs is taken to lose no more: half of what is left to search goes with every try. A try is a
    whole run of cut, repair and fine-tuning, of as many steps and epochs as the recipe has.

    Args:
        course: Of a run; its test images decide. A search that was stopped goes on at the try that it was in.
        table: What is to be kept, and how near the search goes.

    Raises:
        NotKept: No network that was tried keeps the drop.
        SePruneError: Whatever a stage refuses, but for budgets that cannot be met.
    """
    low, high = table.least, 1.0
    tries = course.progress.record.tries
    while high - low > table.tolerance:
        budget = round((low + high) / 2, 6)
        done = next((t for t in tries if t.budget == budget), None)
        if done is None:
            with course.show.stage(f"try {len(tries) + 1}: {100 * budget:.1f} % of the MACs", None):
                done = _tried(course, table, budget)
            tries = (*tries, done)
            course.progress.note(tries=tries)
        distributed.barrier()  # nobody reads there any more
        remove_folder(_folder(course, budget))
        low, high = (low, budget) if done.keeps else (budget, high)
    if high == 1.0:
        raise NotKept(_nothing(table, tries))
    return high


def _tried(course: Course, table: SearchTable, budget: float) -> Try:
    """Cut, repair and fine-tune to a fraction of the MACs, and decide."""
    folder = _folder(course, budget)
    recipe = of_budget(course.recipe, budget)
    if recipe.finetune is not None:
        recipe = replace(recipe, finetune=replace(recipe.finetune, track=()))
    progress = Progress(folder, recipe, course.dense, course.data, resume=True)
    own = replace(
        course,
        recipe=recipe,
        progress=progress,
        log=folder / "training.csv",
        statistics=course.statistics or _statistics(course),
    )
    dense = own.evaluated("dense", own.dense, 0.0, own.found.cost.macs)
    try:
        done = compress_in_steps(own)
    except BudgetError as error:
        return Try(budget=budget, refused=str(error))
    lost = drop(dense, done.last, own.data.test, table.confidence)
    return Try(
        budget=budget,
        macs=done.cut.after.macs / own.found.cost.macs,
        drop=lost,
        keeps=lost.upper <= table.max_drop / 100,
    )


def of_budget(recipe: RunRecipe, budget: float) -> RunRecipe:
    """Return the recipe of a run to a fraction of the MACs, without search."""
    table = with_budget(recipe.apply, Budget(kind="macs", value=budget))
    return replace(recipe, search=None, apply=table)


def _folder(course: Course, budget: float) -> Path:
    return course.progress.folder / f"try-{budget:.6f}"


def _statistics(course: Course) -> Statistics | None:
    """Return the gates' statistics on the images of the search, measured once for all tries."""
    path = course.progress.folder / "statistics.safetensors"
    if not course.found.sites:
        return None
    if not distributed.from_main(path.exists):
        measure.analyze(
            course.dense, course.data, device=course.device, seed=course.recipe.seed, reporter=course.show
        ).save(path)
        distributed.barrier()  # all are going to read it
    return Statistics.load(path)


def _nothing(table: SearchTable, tries: tuple[Try, ...]) -> str:
    made = [t for t in tries if t.drop is not None and t.macs is not None]
    asked = f"no network that was tried loses at most {table.max_drop:g} points of top-1"
    advice = "allow more, fine-tune longer, or take a lower confidence"
    if not made:
        return f"{asked}: {tries[-1].refused if tries else 'none was tried.'} Take a larger tolerance, or {advice}."
    best = max(made, key=lambda t: t.macs or 0.0)
    assert best.drop is not None
    assert best.macs is not None
    return (
        f"{asked}: with {100 * best.macs:.1f} % of the MACs it is {100 * best.drop.drop:.2f} points on {best.drop.n} "
        f"held-out images, and {100 * best.drop.upper:.2f} at a confidence of {table.confidence:g}; {advice}."
    )
