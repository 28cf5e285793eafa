"""Whole jobs: each function runs several stages, and is what a command calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from se_prune import __version__, artifact
from se_prune.artifact import Network
from se_prune.checkpoint import with_preprocessing
from se_prune.cost import count_cost
from se_prune.data import DataSource
from se_prune.data.source import Split, balanced_subset
from se_prune.device import inference_batch
from se_prune.evaluate import evaluate
from se_prune.folding import FoldRequest
from se_prune.gates.sites import find_sites
from se_prune.gates.statistics import Statistics
from se_prune.layers import layer_costs
from se_prune.pipeline.classes import like
from se_prune.pipeline.features import match_features
from se_prune.pipeline.folds import (
    check_rest,
    choose_sites,
    fold_only,
    gates_of,
    rest_of,
    totals,
    without_folded,
)
from se_prune.pipeline.latency import Span, Timing, check_fastest, meet, stopwatch
from se_prune.pipeline.measure import (
    BATCH,
    MEASURED_IMAGES,
    Reporter,
    Silent,
    Structure,
    analyze,
    channel_energies,
    example_input,
    matching,
    require_classes,
    require_statistics,
)
from se_prune.pipeline.repairs import repair_network
from se_prune.planning import check_ranges, make_plan
from se_prune.records import (
    ArchSpec,
    ArtifactHeader,
    Budget,
    Cost,
    GateSite,
    HiddenPolicy,
    HistoryEntry,
    LayerRefit,
    Plan,
    RepairMode,
    SitePlan,
    TrainSettings,
)
from se_prune.results import Evaluation
from se_prune.schema import to_dict
from se_prune.scoring import Evidence, score
from se_prune.scoring.registry import find
from se_prune.surgery.cut import cut, verify
from se_prune.surgery.fold import fold, kept_constants
from se_prune.timing import LatencyModel
from se_prune.training import fit
from se_prune.training.loop import StepLog
from se_prune.zoo import registry

#: Images on which a cut network is compared with its masked twin.
PROOF_IMAGES = 8


@dataclass(slots=True, kw_only=True)
class Applied:
    """What `apply` made: the plan and its proof, the network as cut and as repaired."""

    plan: Plan
    before: Cost
    after: Cost
    max_abs_diff_masked: float
    cut: nn.Module
    network: Network
    repair_seconds: float
    refits: tuple[LayerRefit, ...] = ()


def plan(
    network: Network,
    found: Structure,
    budget: Budget,
    *,
    criterion: str,
    device: torch.device,
    data: DataSource | None = None,
    statistics: Statistics | None = None,
    round_to: int = 1,
    min_channels: int = 2,
    hidden: HiddenPolicy = "tie",
    repair: RepairMode = "refit",
    folds: FoldRequest | None = None,
    timing: Timing | None = None,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> Plan:
    """Choose the gates that are folded, score the channels, and choose those that leave.

    Args:
        network: The dense network.
        found: Its structure.
        budget: What the folded and cut network must meet; a sparsity of 0 cuts nothing.
        criterion: How channels are scored.
        device: Where to measure.
        data: Training images, for what has to be measured.
        statistics: Those of `analyze`; measured on `data` where they are needed and None.
        round_to: Cut groups keep a multiple of this many channels.
        min_channels: No group keeps fewer.
        hidden: What hidden units do.
        repair: What will follow the cut.
        folds: Which gates are folded; None for none.
        timing: Where a latency budget is measured; onnxruntime, one thread and one image at once where None.
        seed: Chooses the images.
        reporter: Shows progress.

    Raises:
        UsageError: The criterion is unknown, or images are measured and none were given, or a site is unknown.
        CheckpointError: The statistics are of another network.
        BudgetError: The budget cannot be met.
        SurgeryError: A gate cannot be folded.
    """
    needs = find(criterion).wants(repair)
    costs = layer_costs(network.module, found.cost.per_layer)
    widths: dict[str, Any] = {"round_to": round_to, "min_channels": min_channels, "hidden": hidden}
    check_ranges(budget, round_to, min_channels)
    if statistics is not None:
        require_statistics(network, found, statistics)
    sites: tuple[SitePlan, ...] = ()
    if folds is not None and found.sites:
        if statistics is None:
            statistics = gates_of(network, data, device=device, seed=seed, reporter=reporter)
        sites = choose_sites(network, found, statistics, folds)
    groups, left = without_folded(network, found, costs, sites)
    if folds is not None and budget.kind == "sparsity" and budget.value == 0:
        return fold_only(costs, left, sites, **widths)
    watch, span = None, Span(groups=groups, left=left, dense=(found.couplings, costs), widths=widths)
    if budget.timed:
        watch = stopwatch(network, found, timing or Timing(), round_to, reporter)
        if not sites:
            check_fastest(watch, budget, span)
    else:
        rest = rest_of(budget, costs, left)
        check_rest(groups, left, budget, rest, **widths)
    energies = None if statistics is None else statistics.energies
    subset: Split | None = None
    if data is not None and needs:
        data = matching(network, data)
        subset = balanced_subset(data.train, MEASURED_IMAGES, seed)
        if "energies" in needs and energies is None and found.sites:
            statistics = analyze(
                network, data, device=device, images=MEASURED_IMAGES, seed=seed, reporter=reporter
            )
            energies = statistics.energies
        elif "energies" in needs and energies is None:
            energies = channel_energies(network, data, subset, device=device, seed=seed, reporter=reporter)
    preprocessing = network.header.preprocessing
    evidence = Evidence(
        model=network.module,
        example=found.example,
        sites=found.sites,
        couplings=found.couplings,
        seed=seed,
        device=device,
        statistics=statistics,
        energies=energies,
        batches=None if subset is None else lambda: subset.batches(BATCH, preprocessing),
        repair=repair,
    )
    with (reporter or Silent()).stage(f"score by {criterion}", None):
        scores = score(criterion, evidence)
    network.module.cpu()
    macs, params = totals(costs)

    def chosen_for(limit: Budget, times: LatencyModel | None = None) -> Plan:
        chosen = make_plan(groups, left, scores, limit, times=times, **widths)
        return replace(chosen, budget=budget, macs_before=macs, params_before=params, sites=sites)

    if watch is None:
        return chosen_for(rest)
    return meet(watch, budget, span, chosen_for, lambda plan: _built(network, found, plan), reporter=reporter)


def _built(network: Network, found: Structure, chosen: Plan) -> Network:
    """Return a network cut and folded by a plan, to be timed: without proof and repair."""
    module = cut(network.module, found.example, chosen)
    module, _ = fold(module, found.example, kept_constants(chosen, found.sites, found.couplings))
    return Network(module=module.eval(), header=network.header)


def apply_plan(
    network: Network,
    found: Structure,
    chosen: Plan,
    *,
    device: torch.device,
    data: DataSource | None = None,
    repair: RepairMode = "refit",
    seed: int = 0,
    reporter: Reporter | None = None,
) -> Applied:
    """Cut and fold a network by a plan, prove it against its masked twin, and repair it on training images.

    Args:
        network: The dense network; left as it is.
        found: Its structure.
        chosen: The plan.
        device: Where to repair.
        data: Training images for the proof and the repair; without them the proof takes random images, in
            which less of the network may respond, and nothing is repaired.
        repair: `refit`: least squares, then BN statistics; `bn`: BN statistics alone; `none`.
        seed: Chooses the images.
        reporter: Shows progress.

    Raises:
        SurgeryError: The cut network differs from its masked twin, or a gate cannot be folded.
    """
    show = reporter or Silent()
    data = None if data is None else matching(network, data)
    with show.stage("cut", None):
        module = cut(network.module, found.example, chosen)
        images = _proof_images(network, data, seed)
        gap = verify(network.module, module, found.couplings, chosen, images, sites=found.sites)
        constants = kept_constants(chosen, found.sites, found.couplings)
        module, folded = fold(module, found.example, constants)
        sites = find_sites(module, found.example)
        after = count_cost(module, network.header.preprocessing, sites)
    repaired = artifact.clone(module)
    done: dict[str, Any] = {}
    refits: tuple[LayerRefit, ...] = ()
    started = time.perf_counter()
    if data is not None and repair != "none":
        done, refits = repair_network(
            network,
            repaired,
            found,
            chosen,
            mode=repair,
            subset=balanced_subset(data.train, MEASURED_IMAGES, seed),
            device=device,
            show=show,
        )
    entry = HistoryEntry(
        stage="apply",
        details={
            "version": __version__,
            "criterion": chosen.criterion,
            "budget": to_dict(chosen.budget),
            "macs": [found.cost.macs, after.macs],
            "params": [found.cost.params, after.params],
            "max_abs_diff_masked": gap,
            "sites_folded": list(constants),
            "repair": done,
            "seed": seed,
        },
    )
    header = replace(
        network.header,
        classes=network.header.classes or (() if data is None else data.classes),
        plan=chosen,
        geometry=artifact.merged_geometry(network, module),
        folded={**network.header.folded, **folded},
        history=(*network.header.history, entry),
    )
    return Applied(
        plan=chosen,
        before=found.cost,
        after=after,
        max_abs_diff_masked=gap,
        cut=module,
        network=Network(module=repaired, header=header),
        repair_seconds=time.perf_counter() - started,
        refits=refits,
    )


def _proof_images(network: Network, data: DataSource | None, seed: int) -> torch.Tensor:
    preprocessing = network.header.preprocessing
    if data is None:
        return example_input(preprocessing, PROOF_IMAGES)
    images, _ = next(
        iter(balanced_subset(data.train, PROOF_IMAGES, seed).batches(PROOF_IMAGES, preprocessing))
    )
    return images


def gate_layers(sites: tuple[GateSite, ...]) -> set[str]:
    """Return the names of the FC layers of all sites."""
    return {name for site in sites for name in (site.reduce, site.expand) if name is not None}


def finetune(
    network: Network,
    data: DataSource,
    settings: TrainSettings,
    *,
    device: torch.device,
    teacher: Network | None = None,
    seed: int = 0,
    resume: Path | None = None,
    on_step: Callable[[StepLog], None] | None = None,
    stage: str = "finetune",
) -> Network:
    """Train a network on the training images, distilling from `teacher` where one is given.

    Args:
        network: What is trained.
        data: The data set; test images are not read.
        settings: How to train.
        device: Where to train.
        teacher: The dense network.
        seed: Fixes order, augmentation and dropout.
        resume: A folder that keeps the state; a run found there goes on at its step, to the same weights.
        on_step: Called after every step.
        stage: What the history calls it.

    Raises:
        DataError: The data does not fit the network.
        UsageError: The settings do not fit the networks or the data.
        CheckpointError: `resume` holds another run.
        Interrupted: The user stopped a run that `resume` keeps.

    Returns:
        A new network on the CPU; the one given is left as it is.
    """
    if teacher is not None:
        teacher = like(teacher, network, data)
    data = matching(network, data)
    if teacher is not None:
        require_classes(teacher, data)
    features = None if teacher is None or not settings.distill_features else match_features(network, teacher)
    module = artifact.clone(network.module)
    sites = find_sites(module, example_input(network.header.preprocessing))
    result = fit(
        module,
        data.train,
        settings,
        preprocessing=network.header.preprocessing,
        device=device,
        seed=seed,
        teacher=None if teacher is None else artifact.clone(teacher.module),
        no_decay=gate_layers(sites),
        resume=resume,
        on_step=on_step,
        features=features,
    )
    details: dict[str, Any] = {
        "version": __version__,
        "data": data.name,
        "train_images": len(data.train),
        "seed": seed,
        "settings": to_dict(replace(settings, track=())),
        "distilled": teacher is not None,
        "train_top1": result.train_top1,
    }
    if result.held_out_top1 is not None:
        details |= {"steps": result.steps, "held_out_top1": result.held_out_top1}
        details |= {} if result.best_epoch is None else {"best_epoch": result.best_epoch + 1}
    header = replace(
        network.header,
        classes=network.header.classes or data.classes,
        history=(*network.header.history, HistoryEntry(stage=stage, details=details)),
    )
    return Network(module=module, header=header)


def new_network(
    arch: str,
    data: DataSource,
    seed: int,
    *,
    input_size: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Network:
    """Build an architecture with random weights, with the class count and channels of a data set.

    `input_size`, `mean` and `std` overrule the preprocessing, as in `checkpoint.with_preprocessing`.

    Raises:
        UsageError: The architecture is unknown, or the preprocessing does not go with it.
    """
    kwargs: dict[str, Any] = {"num_classes": len(data.classes)}
    own = data.preprocessing
    spec: ArchSpec = registry.resolve(arch, **kwargs)
    if own is not None and own.input_size[0] != registry.default_preprocessing(spec).input_size[0]:
        spec = replace(spec, kwargs={**kwargs, "in_channels": own.input_size[0]})
    torch.manual_seed(seed)
    module = registry.build(spec).eval()
    preprocessing = registry.default_preprocessing(spec, module)
    if own is not None and preprocessing.input_size[0] == own.input_size[0]:
        preprocessing = replace(preprocessing, mean=own.mean, std=own.std)
    header = ArtifactHeader(arch=spec, preprocessing=preprocessing, classes=data.classes)
    return with_preprocessing(
        Network(module=module, header=header), arch, input_size=input_size, mean=mean, std=std
    )


def train(
    arch: str,
    data: DataSource,
    settings: TrainSettings,
    *,
    device: torch.device,
    seed: int = 0,
    input_size: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    resume: Path | None = None,
    on_step: Callable[[StepLog], None] | None = None,
) -> tuple[Network, Evaluation]:
    """Train a network from random weights and evaluate it on the test split, which nothing else reads."""
    start = new_network(arch, data, seed, input_size=input_size, mean=mean, std=std)
    network = finetune(
        start, data, settings, device=device, seed=seed, resume=resume, on_step=on_step, stage="train"
    )
    return assess(network, data, device=device)


def assess(
    network: Network, data: DataSource, *, device: torch.device, reporter: Reporter | None = None
) -> tuple[Network, Evaluation]:
    """Evaluate a network on the test split and note the accuracy in its history.

    Raises:
        DataError: The data does not fit the network.
    """
    data = matching(network, data)
    with (reporter or Silent()).stage("evaluate", len(data.test)) as update:
        result = evaluate(
            network.module,
            data.test,
            network.header.preprocessing,
            device=device,
            classes=data.classes,
            batch_size=inference_batch(device),
            on_batch=update,
        )
    network.module.cpu()
    entry = HistoryEntry(
        stage="evaluate",
        details={
            "data": data.name,
            "n": result.n,
            "top1": result.top1,
            "top1_ci95": list(result.top1_ci95),
            "loss": result.loss,
        },
    )
    header = replace(network.header, history=(*network.header.history, entry))
    return Network(module=network.module, header=header), result
