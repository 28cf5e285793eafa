"""A recipe from end to end: analyse, cut, repair, fine-tune, evaluate, export, and the record for the report."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from se_prune import __version__, artifact
from se_prune.artifact import Network
from se_prune.checkpoint import open_model
from se_prune.cost import bytes_of
from se_prune.data import DataSource, open_data
from se_prune.device import choose_device, processor
from se_prune.errors import UsageError
from se_prune.evaluate import paired
from se_prune.export import export, require_target, suffix_of
from se_prune.files import make_folder, write_text
from se_prune.folding import parse_request
from se_prune.gates.statistics import Statistics
from se_prune.gates.summary import profile, summarise
from se_prune.latency import measure_latency, torch_runner
from se_prune.layers import layer_costs
from se_prune.pipeline import jobs, measure, training
from se_prune.pipeline.classes import for_classes
from se_prune.pipeline.exporting import real_images
from se_prune.pipeline.latency import Timing, first_rounding, resolve_rounding
from se_prune.pipeline.progress import Progress
from se_prune.pipeline.view import shown as shown_steps
from se_prune.planning import check_budget, check_ranges
from se_prune.recipe import RunRecipe, table_budget
from se_prune.report import write_report
from se_prune.results import Evaluation, Exported, Latency, Run, StageResult
from se_prune.runtimes.ort import open_file
from se_prune.schema import to_json
from se_prune.scoring.registry import find
from se_prune.training.state import trained_seconds
from se_prune.training.tracking import following
from se_prune.zoo.registry import shown

PACKAGES = ("torch", "torchvision", "torch-pruning", "timm", "onnx", "onnxruntime", "numpy")
#: Training images on which an export is checked, spread over the classes.
EXPORT_IMAGES = 256
#: Sites whose gate profiles stand in the report; more make the page too large.
PROFILES = 24


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

    A run that was stopped at any moment goes on at the stage it was in, and ends with the same artifact.

    Analysis, scores, repair, fine-tuning and the parity check of exports see training images; test images are
    read by `evaluate` alone.

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
        CheckpointError: The folder holds a stopped run of another recipe.
    """
    show = reporter or measure.Silent()
    folds = parse_request(recipe.apply.fold_gates, recipe.apply.fold_tolerance)
    budget = table_budget(recipe.apply, folds=folds is not None)
    check_ranges(budget, first_rounding(recipe.apply.round_to), recipe.apply.min_channels)
    timing = Timing(runtime=recipe.apply.runtime, threads=recipe.apply.threads)
    _require_known(recipe)
    target = choose_device(device)
    dense, data = _opened(recipe)
    found = measure.structure(dense)
    rounding = resolve_rounding(recipe.apply.round_to, dense, found, timing, show)
    widths: dict[str, Any] = {"round_to": rounding, "min_channels": recipe.apply.min_channels}
    if folds is None and not budget.timed:  # what is folded, and so what is left, is known after the analysis
        costs = layer_costs(dense.module, found.cost.per_layer)
        check_budget(found.couplings, costs, budget, **widths, hidden=recipe.apply.hidden)
    make_folder(folder)
    progress = Progress(folder, recipe, dense, data, resume=resume)

    def evaluated(stage: str, network: Network, seconds: float) -> Evaluation:
        if stage in progress.stages:
            return progress.stages[stage].evaluation
        _, result = training.assess(network, data, device=target, reporter=show)
        progress.add(StageResult(stage=stage, evaluation=result, seconds=seconds))  # type: ignore[arg-type]
        return result

    first = evaluated("dense", dense, 0.0)
    gates = _statistics(
        dense, found, data, folder, progress, earlier=statistics, recipe=recipe, device=target, show=show
    )
    if progress.record.cut is None:
        clock = time.perf_counter()
        common: dict[str, Any] = {
            "device": target,
            "data": data,
            "repair": recipe.apply.repair,
            "seed": recipe.seed,
            "reporter": show,
        }
        options = {
            **common,
            **widths,
            "statistics": gates,
            "folds": folds,
            "hidden": recipe.apply.hidden,
            "timing": timing,
        }
        chosen = jobs.plan(dense, found, budget, criterion=recipe.apply.criterion, **options)
        applied = jobs.apply_plan(dense, found, chosen, **common)
        seconds = time.perf_counter() - clock - applied.repair_seconds
        evaluated("cut", Network(module=applied.cut, header=applied.network.header), seconds)
        progress.keep(applied)
    # always the network of the file, so that a run which goes on computes with the same memory layout
    network, cut = progress.cut(dense.header.arch.ref)
    last = progress.stages["cut"].evaluation
    if recipe.apply.repair != "none":
        last = evaluated("repaired", network, cut.repair_seconds)
    if recipe.finetune is not None:
        network = _finetuned(network, dense, data, folder, progress, recipe=recipe, device=target, show=show)
        last = evaluated("fine-tuned", network, trained_seconds(progress.folder))
    files = {"artifact": folder / "pruned.safetensors"}
    artifact.save(files["artifact"], network)
    artifact.save(folder / "dense.safetensors", dense)
    exported = _exports(network, recipe, folder, data, show)
    run = Run(
        name=recipe.name or f"{dense.header.arch.ref} on {data.name}",
        command=command,
        arch=shown(dense.header.arch),
        data=data.name,
        classes=data.classes,
        seed=recipe.seed,
        environment=environment(target),
        plan=cut.plan,
        cost_before=found.cost,
        cost_after=cut.after,
        bytes_before=bytes_of(folder / "dense.safetensors"),
        bytes_after=bytes_of(files["artifact"]),
        max_abs_diff_masked=cut.max_abs_diff_masked,
        stages=progress.record.stages,
        paired=paired(first, last, data.test),
        latency=_latency(dense, network, data, folder, recipe=recipe, device=target, show=show),
        sites=() if gates is None else summarise(gates),
        profiles=() if gates is None else tuple(profile(gates, site.name) for site in gates.sites[:PROFILES]),
        exported=exported,
    )
    files["run"] = folder / "run.json"
    write_text(files["run"], to_json(run, indent=1))
    page, markdown, _ = write_report([run], folder / "report.html")
    files |= {"report": page, "markdown": markdown}
    files |= {item.target: Path(item.output) for item in exported}
    progress.finish()
    return RunOutcome(run=run, network=network, files=files)


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


def _statistics(
    dense: Network,
    found: measure.Structure,
    data: DataSource,
    folder: Path,
    progress: Progress,
    *,
    earlier: Path | None,
    recipe: RunRecipe,
    device: torch.device,
    show: measure.Reporter,
) -> Statistics | None:
    """Return the statistics: those of an earlier run, or measured; None for a network without gate sites."""
    path = folder / "statistics.safetensors"
    if not found.sites:
        return None
    if not progress.record.statistics:
        measured = (
            Statistics.load(earlier)
            if earlier is not None
            else measure.analyze(dense, data, device=device, seed=recipe.seed, reporter=show)
        )
        measured.save(path)
        progress.note(statistics=True)
    return Statistics.load(path)


def _finetuned(
    network: Network,
    dense: Network,
    data: DataSource,
    folder: Path,
    progress: Progress,
    *,
    recipe: RunRecipe,
    device: torch.device,
    show: measure.Reporter,
) -> Network:
    settings, log = recipe.finetune, folder / "training.csv"
    assert settings is not None
    name = recipe.name or folder.name
    with (
        show.stage(f"fine-tune, {settings.epochs} epochs", None) as update,
        following(settings, log, name=name, state=progress.folder) as follow,
    ):
        return training.finetune(
            network,
            data,
            settings,
            device=device,
            teacher=dense,
            seed=recipe.seed,
            resume=progress.folder,
            on_step=shown_steps(update, follow),
        )


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


def environment(device: torch.device) -> dict[str, str]:
    """Return versions and hardware, for the report."""
    result = {
        "se-prune": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "threads": str(torch.get_num_threads()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }
    for name in PACKAGES:
        try:
            result[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return result
