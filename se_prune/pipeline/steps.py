"""Cut, repair and fine-tune, in one step or several: every step measures, scores and proves anew what it cuts."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from se_prune.artifact import Network
from se_prune.data import DataSource
from se_prune.errors import SurgeryError
from se_prune.folding import parse_request
from se_prune.gates.statistics import Statistics
from se_prune.layers import layer_costs
from se_prune.pipeline import jobs, measure, training
from se_prune.pipeline.folds import totals
from se_prune.pipeline.latency import Timing
from se_prune.pipeline.progress import CutRecord, Progress
from se_prune.pipeline.view import shown as shown_steps
from se_prune.recipe import RunRecipe, table_budget
from se_prune.records import Budget, Plan
from se_prune.results import Evaluation, StageResult
from se_prune.schedule import compose, epochs_of, goals, of_what_is_left
from se_prune.settings import TrainSettings
from se_prune.training.state import trained_seconds
from se_prune.training.tracking import following


@dataclass(slots=True, kw_only=True)
class Course:
    """What all steps share: the dense network and its structure, data and recipe, and how far the run has come.

    Images of `data.test` are read by evaluation alone, which decides nothing. `log` is the CSV file of the training.
    """

    recipe: RunRecipe
    dense: Network
    found: measure.Structure
    data: DataSource
    statistics: Statistics | None
    rounding: int
    progress: Progress
    log: Path
    device: torch.device
    show: measure.Reporter

    def evaluated(
        self, stage: str, network: Network, seconds: float, macs: int, step: int | None = None
    ) -> Evaluation:
        """Return the accuracy of a stage on the test images, as it was written down or measured now."""
        known = self.progress.result(stage, step)
        if known is not None:
            return known.evaluation
        _, result = training.assess(network, self.data, device=self.device, reporter=self.show)
        self.progress.add(
            StageResult(stage=stage, evaluation=result, seconds=seconds, step=step, macs=macs)  # type: ignore[arg-type]
        )
        return result


@dataclass(slots=True, kw_only=True)
class Finished:
    """The network after the last step, its accuracy, and what came of the cuts: the last one's plan is of all steps."""

    network: Network
    last: Evaluation
    cut: CutRecord
    max_abs_diff_masked: float


def compress_in_steps(course: Course) -> Finished:
    """Cut, repair and fine-tune by a recipe, going on where the run has come to.

    Raises:
        SePruneError: Whatever a stage refuses.
    """
    recipe, progress = course.recipe, course.progress
    table = recipe.apply
    folds = parse_request(table.fold_gates, table.fold_tolerance)
    budget = table_budget(table, folds=folds is not None)
    network = course.dense
    last: Evaluation | None = None
    for step, goal in enumerate(goals(budget, table.shape, table.steps), start=1):
        named = None if table.steps == 1 else step
        cut = progress.cut(step) or _cut(course, network, goal, budget, step=step, named=named)
        # always the network of the file, so that a run which goes on computes with the same memory layout
        network = progress.repaired(step)
        if table.repair != "none":
            last = course.evaluated("repaired", network, cut.repair_seconds, cut.after.macs, named)
        if recipe.finetune is not None:
            network, seconds = _tuned(course, network, step)
            last = course.evaluated("fine-tuned", network, seconds, cut.after.macs, named)
    if last is None:
        known = progress.result("cut", named)
        assert known is not None, "a cut is evaluated"
        last = known.evaluation
    gaps = [cut.max_abs_diff_masked for cut in progress.record.cuts]
    return Finished(network=network, last=last, cut=cut, max_abs_diff_masked=max(gaps))


def _cut(
    course: Course, network: Network, goal: Budget, budget: Budget, *, step: int, named: int | None
) -> CutRecord:
    """Cut and repair the network that the steps before have left; the record's plan is of the dense network."""
    clock = time.perf_counter()
    table = course.recipe.apply
    first = step == 1
    found = course.found if first else measure.structure(network)
    common: dict[str, Any] = {
        "device": course.device,
        "data": course.data,
        "repair": table.repair,
        "seed": course.recipe.seed,
        "reporter": course.show,
    }
    chosen = jobs.plan(
        network,
        found,
        goal if first else _of_left(goal, course, network, found),
        criterion=table.criterion,
        statistics=course.statistics if first else None,
        round_to=course.rounding,
        min_channels=table.min_channels,
        hidden=table.hidden,
        folds=parse_request(table.fold_gates, table.fold_tolerance) if first else None,
        timing=Timing(runtime=table.runtime, threads=table.threads),
        **common,
    )
    applied = jobs.apply_plan(network, found, chosen, **common)
    if table.steps > 1:
        before = course.progress.cut(step - 1) if step > 1 else None
        whole = compose(None if before is None else before.plan, chosen, budget)
        _require_same_sizes(course, whole, applied.network)
        header = replace(applied.network.header, plan=whole)
        applied = replace(applied, plan=whole, network=replace(applied.network, header=header))
    seconds = time.perf_counter() - clock - applied.repair_seconds
    course.evaluated("cut", replace(applied.network, module=applied.cut), seconds, applied.after.macs, named)
    course.progress.keep(step, applied)
    cut = course.progress.cut(step)
    assert cut is not None, "it was just written down"
    return cut


def _of_left(goal: Budget, course: Course, network: Network, found: measure.Structure) -> Budget:
    """Return a budget of the dense network as one of the network at hand."""
    return of_what_is_left(goal, _counted(goal, course.dense, course.found), _counted(goal, network, found))


def _counted(budget: Budget, network: Network, found: measure.Structure) -> float:
    """Return what a budget counts."""
    if budget.kind == "sparsity":
        groups = (c.group for c in found.couplings)
        return sum(g.channels for g in groups if g.prunable and g.kind != "hidden")
    macs, params = totals(layer_costs(network.module, found.cost.per_layer))
    return macs if budget.kind == "macs" else params


def _require_same_sizes(course: Course, whole: Plan, network: Network) -> None:
    """Check that the plan of all steps leads from the dense network to the one at hand.

    Raises:
        SurgeryError: It does not.
    """
    built = jobs.built(course.dense, course.found, whole).module
    sizes = [{k: v.shape for k, v in m.state_dict().items()} for m in (built, network.module)]
    if sizes[0] != sizes[1]:
        names = sorted(k for k in {*sizes[0], *sizes[1]} if sizes[0].get(k) != sizes[1].get(k))
        raise SurgeryError(
            f"the plans of the steps do not add up to one of the dense network (at {names[0]}); take steps = 1, and "
            "please report the architecture."
        )


def _tuned(course: Course, network: Network, step: int) -> tuple[Network, float]:
    """Return the fine-tuned network of a step, and the seconds that it took where they are still known."""
    recipe, progress = course.recipe, course.progress
    known = progress.tuned(step)
    if known is not None:
        return known, progress.record.tuned_seconds
    assert recipe.finetune is not None
    steps = recipe.apply.steps
    settings: TrainSettings = replace(
        recipe.finetune,
        epochs=epochs_of(recipe.finetune.epochs, steps)[step - 1],
        group_lasso=recipe.finetune.group_lasso if step < steps else 0.0,  # no cut follows the last
    )
    of_step = "" if steps == 1 else f", step {step} of {steps}"
    name = f"{recipe.name or course.log.parent.name}{of_step}"
    log = course.log if steps == 1 else course.log.with_stem(f"{course.log.stem}-{step}")
    state = progress.training(step)
    with (
        course.show.stage(f"fine-tune{of_step}, {settings.epochs} epochs", None) as update,
        following(settings, log, name=name, state=state) as follow,
    ):
        tuned = training.finetune(
            network,
            course.data,
            settings,
            device=course.device,
            teacher=course.dense,
            seed=recipe.seed,
            resume=state,
            on_step=shown_steps(update, follow),
        )
    progress.keep_tuned(step, tuned, trained_seconds(state))
    result = progress.tuned(step)
    assert result is not None, "it was just written down"
    return result, progress.record.tuned_seconds
