"""A recipe from end to end: analyse, cut, repair, fine-tune, evaluate, export, and the record for the report."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from se_prune import artifact, distributed
from se_prune.artifact import Network
from se_prune.checkpoint import open_model
from se_prune.cost import bytes_of
from se_prune.data import DataSource, open_data
from se_prune.device import choose_device
from se_prune.errors import UsageError
from se_prune.evaluate import drop, paired
from se_prune.export import export, require_target, suffix_of
from se_prune.files import make_folder, require_shared, write_text
from se_prune.folding import parse_request
from se_prune.gates.statistics import Statistics
from se_prune.gates.summary import summarise
from se_prune.latency import measure_latency, torch_runner
from se_prune.layers import layer_costs
from se_prune.pipeline import details, measure
from se_prune.pipeline.classes import for_classes
from se_prune.pipeline.exporting import real_images
from se_prune.pipeline.latency import Timing, first_rounding, resolve_rounding
from se_prune.pipeline.progress import Progress
from se_prune.pipeline.search import of_budget, parted, smallest
from se_prune.pipeline.steps import Course, compress_in_steps
from se_prune.planning import check_budget, check_ranges
from se_prune.recipe import RunRecipe, check_run, table_budget, with_budget
from se_prune.records import Budget
from se_prune.report import card, write_report
from se_prune.results import Evaluation, Exported, Latency, MaxDrop, Run
from se_prune.runtimes.ort import open_file
from se_prune.schema import to_json
from se_prune.scoring.registry import find
from se_prune.settings import SearchTable
from se_prune.zoo.registry import shown

#: Training images on which an export is checked, spread over the classes.
EXPORT_IMAGES = 256


@dataclass(slots=True, kw_only=True)
class RunOutcome:
    """The record of a run, the final network, and the files that were written."""

    run: Run
    network: Network
    files: dict[str, Path]


def run_recipe(
    recipe: RunRecipe,
    folder: Path,
    *,
    command: str,
    device: str = "auto",
    statistics: Path | None = None,
    reporter: measure.Reporter | None = None,
    resume: bool = True,
) -> RunOutcome:
    """Run a recipe and leave artifact, statistics, exports, run record and report in a folder.

    A run that was stopped at any moment goes on at the stage it was in, and ends with the same artifact. Of several
    processes the main one alone writes, exports and times.

    Analysis, scores, repair, fine-tuning and the parity check of exports see training images; test images are
    read by `evaluate` alone, and in the end some of those whose answer changed are shown in the report.

    Args:
        recipe: What to do.
        folder: Where the files go; made where it is missing.
        command: The command line, for the report.
        device: Where to compute.
        statistics: The statistics file of an earlier run of the same model, data and seed; measured where None.
        reporter: Shows progress.
        resume: Go on with a run of the same recipe in this folder; False starts again.

    Raises:
        SePruneError: Whatever a stage refuses; files of finished stages stay.
        NotKept: No network of a search keeps the drop; where the last one fails its proof, the record says so.
        CheckpointError: The folder holds a stopped run of another recipe.
    """
    show = reporter or measure.Silent()
    course = _course(recipe, folder, device=device, resume=resume, show=show)
    search = recipe.search
    if search is not None:
        deciding, rest = parted(course.data, search, recipe.seed)
        recipe = of_budget(recipe, smallest(replace(course, data=deciding), search))
        course = replace(course, recipe=recipe, data=rest)
    dense, found, data, target = course.dense, course.found, course.data, course.device
    first = course.evaluated("dense", dense, 0.0, found.cost.macs)
    course.statistics = gates = _statistics(course, folder, earlier=statistics)
    done = compress_in_steps(course)
    network = done.network
    shown_gates = details.profiles(gates)
    after: dict[str, Any] = {}
    if gates is not None:
        names = tuple(shown_gates[0].per_class)
        after = details.gates_after(
            network, data, found, done.cut.plan, names, device=target, seed=recipe.seed, show=show
        )

    def concluded() -> Run:
        artifact.save(pruned := folder / "pruned.safetensors", network)
        artifact.save(folder / "dense.safetensors", dense)
        exported = _exports(network, recipe, folder, data, show)
        written = [Path(name) for item in exported for name in item.files or (item.output,)]
        latency = _latency(dense, network, data, folder, recipe=recipe, device=target, show=show)
        with show.stage("times of layers", None):
            runtime = "torch" if latency is None else latency[1].runtime
            parts, operations = details.operations(dense, network, found, runtime, folder)
        run = Run(
            name=recipe.name or f"{dense.header.arch.ref} on {data.name}",
            command=command,
            arch=shown(dense.header.arch),
            data=data.name,
            classes=data.classes,
            seed=recipe.seed,
            environment=details.environment(target),
            plan=done.cut.plan,
            cost_before=found.cost,
            cost_after=done.cut.after,
            bytes_before=bytes_of(folder / "dense.safetensors"),
            bytes_after=bytes_of(pruned),
            max_abs_diff_masked=done.max_abs_diff_masked,
            stages=course.progress.record.stages,
            paired=paired(first, done.last, data.test),
            latency=latency,
            sites=() if gates is None else summarise(gates),
            profiles=shown_gates,
            exported=exported,
            labels=tuple(data.test.labels.tolist()),
            parts=parts,
            operations=operations,
            **after,
            max_drop=None if search is None else _proof(course, search, first, done.last),
            changed=details.changed_images(data.test, first, done.last),
            hashes=details.hashes(
                data, (*_checkpoint(recipe), folder / "dense.safetensors", pruned, *written)
            ),
        )
        write_text(folder / "run.json", to_json(run, indent=1))
        write_text(folder / "MODEL_CARD.md", card.render(card.of_run(run, network.header, pruned.name)))
        write_report([run], folder / "report.html")
        course.progress.finish()
        return run

    distributed.barrier()  # the state, which goes in the end, is read by nobody any more
    run = distributed.record_from_main(Run, concluded)
    return RunOutcome(run=run, network=network, files=_files(run, folder))


def _files(run: Run, folder: Path) -> dict[str, Path]:
    """Return the files of a run by what they are."""
    names = {
        "artifact": "pruned.safetensors",
        "run": "run.json",
        "card": "MODEL_CARD.md",
        "report": "report.html",
        "markdown": "report.md",
    }
    return {what: folder / name for what, name in names.items()} | {
        item.target: Path(item.output) for item in run.exported
    }


def _checkpoint(recipe: RunRecipe) -> tuple[Path, ...]:
    """Return the file that the model came from, where it came from one."""
    path = Path(recipe.model.ref)
    return (path,) if path.is_file() else ()


def _course(recipe: RunRecipe, folder: Path, *, device: str, resume: bool, show: measure.Reporter) -> Course:
    """Check a recipe, open what it names, and see how far the run has come; its statistics are not there yet."""
    check_run(recipe, "the recipe")
    table, search = recipe.apply, recipe.search
    folds = parse_request(table.fold_gates, table.fold_tolerance)
    if search is not None:
        table = with_budget(table, Budget(kind="macs", value=search.least))
    budget = table_budget(table, folds=folds is not None)
    check_ranges(budget, first_rounding(table.round_to), table.min_channels)
    timing = Timing(runtime=table.runtime, threads=table.threads)
    _require_known(recipe)
    target = choose_device(device)
    dense, data = _opened(recipe)
    found = measure.structure(dense)
    rounding = resolve_rounding(table.round_to, dense, found, timing, show)
    # what is folded, and so what is left, is known after the analysis
    if folds is None and not budget.timed and search is None:
        costs = layer_costs(dense.module, found.cost.per_layer)
        widths: dict[str, Any] = {"round_to": rounding, "min_channels": table.min_channels}
        check_budget(found.couplings, costs, budget, **widths, hidden=table.hidden)
    make_folder(folder)
    require_shared(folder)
    return Course(
        recipe=recipe,
        dense=dense,
        found=found,
        data=data,
        statistics=None,
        rounding=rounding,
        progress=Progress(folder, recipe, dense, data, resume=resume),
        log=folder / "training.csv",
        device=target,
        show=show,
    )


def _proof(course: Course, search: SearchTable, first: Evaluation, last: Evaluation) -> MaxDrop:
    """Return what a search came to, with the drop on the test images."""
    return MaxDrop(
        max_drop=search.max_drop / 100,
        confidence=search.confidence,
        images=search.images,
        tries=course.progress.record.tries,
        proof=drop(first, last, course.data.test, search.confidence),
    )


def _require_known(recipe: RunRecipe) -> None:
    """Refuse an unknown criterion or target before anything is opened."""
    find(recipe.apply.criterion)
    for name in recipe.export:
        require_target(name)


def _opened(recipe: RunRecipe) -> tuple[Network, DataSource]:
    """Return the dense network and the data, for the classes that the recipe asks for."""
    if recipe.data is None:
        raise UsageError("the recipe names no data: give it with --data, such as --data FOLDER.")
    data = open_data(recipe.data, workers=recipe.workers, max_bad_images=recipe.max_bad_images)
    model = recipe.model
    dense = open_model(model.ref, arch=model.arch, pretrained=model.pretrained, ema=model.ema)
    data = measure.matching(dense, data)
    return for_classes(dense, data, recipe.apply.classes) if recipe.apply.classes else (dense, data)


def _statistics(course: Course, folder: Path, *, earlier: Path | None) -> Statistics | None:
    """Return the statistics: those of an earlier run, or measured; None for a network without gate sites."""
    path = folder / "statistics.safetensors"
    if not course.found.sites:
        return None
    if not course.progress.record.statistics:
        measured = (
            Statistics.load(earlier)
            if earlier is not None
            else measure.analyze(
                course.dense,
                course.data,
                device=course.device,
                seed=course.recipe.seed,
                reporter=course.show,
            )
        )
        measured.save(path)
        course.progress.note(statistics=True)
        distributed.barrier()  # all are going to read it
    return Statistics.load(path)


def _exports(
    network: Network, recipe: RunRecipe, folder: Path, data: DataSource, show: measure.Reporter
) -> tuple[Exported, ...]:
    results = []
    for name in recipe.export:
        images = real_images(data.train, network, EXPORT_IMAGES)
        with show.stage(f"export to {name}", None):
            results.append(export(network, name, folder / f"pruned{suffix_of(name)}", images))
    return tuple(results)


def _latency(
    dense: Network,
    cut: Network,
    data: DataSource,
    folder: Path,
    *,
    recipe: RunRecipe,
    device: torch.device,
    show: measure.Reporter,
) -> tuple[Latency, Latency] | None:
    """Time dense and cut in turn, batch 1: in onnxruntime where the run exports to it, else in torch."""
    if recipe.latency_rounds < 1:
        return None
    image = real_images(data.train, dense, 1)
    with show.stage("latency", None):
        if "onnx" in recipe.export:
            export(dense, "onnx", folder / "dense.onnx", image)
            runtime, where = "onnxruntime", torch.device("cpu")
            runners = [open_file(folder / f"{name}.onnx", image, 1) for name in ("dense", "pruned")]
        else:
            runtime, where = "torch", device
            runners = [torch_runner(network.module, image, device, 1) for network in (dense, cut)]
        first, second = measure_latency(
            [(runtime, runner) for runner in runners],
            rounds=recipe.latency_rounds,
            warmup=10,
            device=where,
            threads=1,
        )
    dense.module.cpu()
    cut.module.cpu()
    return first, second
