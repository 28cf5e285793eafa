"""Whole jobs: each function runs several stages, and is what a command calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from se_prune import __version__, artifact
from se_prune.artifact import Network
from se_prune.cost import count_cost
from se_prune.data import DataSource
from se_prune.data.source import Split, balanced_subset
from se_prune.device import inference_batch
from se_prune.evaluate import evaluate
from se_prune.gates.sites import find_sites
from se_prune.gates.statistics import Statistics
from se_prune.layers import layer_costs
from se_prune.pipeline.classes import like
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
from se_prune.planning import check_budget, make_plan
from se_prune.records import (
    ArchSpec,
    ArtifactHeader,
    Budget,
    Cost,
    Evaluation,
    GateSite,
    HiddenPolicy,
    HistoryEntry,
    LayerRefit,
    Plan,
    RepairMode,
    TrainSettings,
)
from se_prune.schema import to_dict
from se_prune.scoring import Evidence, score
from se_prune.scoring.registry import find
from se_prune.surgery.cut import cut, verify
from se_prune.surgery.refit import refit
from se_prune.surgery.repair import recalibrate_bn
from se_prune.training import fit
from se_prune.training.loop import StepLog
from se_prune.zoo import registry

#: Images that least squares is fitted on; BN statistics take all that are measured.
REFIT_IMAGES = 1024
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
    seed: int = 0,
    reporter: Reporter | None = None,
) -> Plan:
    """Score the channels and choose those that leave; `repair` is what will follow the cut.

    Raises:
        UsageError: The criterion is unknown, or measures images and none were given.
        CheckpointError: The statistics are of another network.
        BudgetError: The budget cannot be met.
    """
    needs = find(criterion).wants(repair)
    costs = layer_costs(network.module, found.cost.per_layer)
    widths: dict[str, Any] = {"round_to": round_to, "min_channels": min_channels, "hidden": hidden}
    check_budget(found.couplings, costs, budget, **widths)
    if statistics is not None:
        require_statistics(network, found, statistics)
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
    return make_plan(found.couplings, costs, scores, budget, **widths)


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
    """Cut a network by a plan, prove it against its masked twin, and repair it on training images.

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
        SurgeryError: The cut network differs from its masked twin.
    """
    show = reporter or Silent()
    data = None if data is None else matching(network, data)
    with show.stage("cut", None):
        module = cut(network.module, found.example, chosen)
        images = _proof_images(network, data, seed)
        gap = verify(network.module, module, found.couplings, chosen, images)
        sites = find_sites(module, found.example)
        after = count_cost(module, network.header.preprocessing, sites)
    repaired = artifact.clone(module)
    done: dict[str, Any] = {}
    refits: tuple[LayerRefit, ...] = ()
    started = time.perf_counter()
    if data is not None and repair != "none":
        done, refits = _repair(
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
            "repair": done,
            "seed": seed,
        },
    )
    header = replace(
        network.header,
        plan=chosen,
        geometry={**network.header.geometry, **artifact.changed_geometry(network.module, module)},
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


def _repair(
    dense: Network,
    module: nn.Module,
    found: Structure,
    chosen: Plan,
    *,
    mode: RepairMode,
    subset: Split,
    device: torch.device,
    show: Reporter,
) -> tuple[dict[str, Any], tuple[LayerRefit, ...]]:
    """Repair a cut module in place; return what was done, for the history, and the layers' fits."""
    preprocessing = dense.header.preprocessing
    done: dict[str, Any] = {"images": len(subset)}
    fits: tuple[LayerRefit, ...] = ()
    if mode == "refit":
        fitted = balanced_subset(subset, REFIT_IMAGES, 0)
        with show.stage("repair: least squares", 2 * len(fitted)) as update:
            fits = refit(
                dense.module,
                module,
                found.couplings,
                chosen,
                split=fitted,
                preprocessing=preprocessing,
                device=device,
                on_images=update,
            )
        dense.module.cpu()
        done |= {"refit_images": len(fitted), "refit": [to_dict(fit) for fit in fits]}
    with show.stage("repair: BN statistics", len(subset)) as update:
        done["bn_recalibrated"] = recalibrate_bn(
            module, subset, preprocessing, device=device, on_batch=update
        )
    module.cpu()
    return done, fits


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

    Returns:
        A new network on the CPU; the one given is left as it is.
    """
    if teacher is not None:
        teacher = like(teacher, network, data)
    data = matching(network, data)
    if teacher is not None:
        require_classes(teacher, data)
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
    )
    details = {
        "version": __version__,
        "data": data.name,
        "train_images": len(data.train),
        "seed": seed,
        "settings": to_dict(settings),
        "distilled": teacher is not None,
        "train_top1": result.train_top1,
    }
    header = replace(
        network.header,
        classes=network.header.classes or data.classes,
        history=(*network.header.history, HistoryEntry(stage=stage, details=details)),
    )
    return Network(module=module, header=header)


def new_network(arch: str, data: DataSource, seed: int) -> Network:
    """Build an architecture with random weights, with the class count and channels of a data set."""
    kwargs: dict[str, Any] = {"num_classes": len(data.classes)}
    own = data.preprocessing
    if own is not None and own.input_size[0] != 3:
        kwargs["in_channels"] = own.input_size[0]
    spec: ArchSpec = registry.resolve(arch, **kwargs)
    torch.manual_seed(seed)
    module = registry.build(spec).eval()
    preprocessing = registry.default_preprocessing(spec, module)
    if own is not None and preprocessing.input_size[0] == own.input_size[0]:
        preprocessing = replace(preprocessing, mean=own.mean, std=own.std)
    header = ArtifactHeader(arch=spec, preprocessing=preprocessing, classes=data.classes)
    return Network(module=module, header=header)


def train(
    arch: str,
    data: DataSource,
    settings: TrainSettings,
    *,
    device: torch.device,
    seed: int = 0,
    resume: Path | None = None,
    on_step: Callable[[StepLog], None] | None = None,
) -> tuple[Network, Evaluation]:
    """Train a network from random weights and evaluate it on the test split, which nothing else reads."""
    start = new_network(arch, data, seed)
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
