"""Whole jobs: each function runs several stages, and is what a command calls."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from se_prune import __version__, artifact, distributed
from se_prune.artifact import Network
from se_prune.cost import count_cost
from se_prune.data import DataSource
from se_prune.data.source import Split, balanced_subset
from se_prune.folding import FoldRequest
from se_prune.gates.sites import find_sites
from se_prune.gates.statistics import Statistics
from se_prune.layers import layer_costs
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
    MEASURED_IMAGES,
    Reporter,
    Silent,
    Structure,
    analyze,
    channel_energies,
    evidence_for,
    matching,
    require_statistics,
)
from se_prune.pipeline.repairs import repair_network
from se_prune.planning import check_ranges, make_plan
from se_prune.preprocessing import example_input
from se_prune.records import (
    Budget,
    Cost,
    HiddenPolicy,
    HistoryEntry,
    LayerRefit,
    Plan,
    RepairMode,
    SitePlan,
)
from se_prune.schema import to_dict
from se_prune.scoring import score
from se_prune.scoring.registry import find
from se_prune.surgery.cut import cut, verify
from se_prune.surgery.fold import fold, kept_constants
from se_prune.timing import LatencyModel

#: Images on which a cut network is compared with its masked twin.
PROOF_IMAGES = 8


@dataclass(slots=True, kw_only=True)
class Applied:
    """What `apply` made: the plan and its proof, the network as cut and as repaired.

    `tuned` is the divergence of the outputs on held-out images before and after each step of scales and shifts.
    """

    plan: Plan
    before: Cost
    after: Cost
    max_abs_diff_masked: float
    cut: nn.Module
    network: Network
    repair_seconds: float
    refits: tuple[LayerRefit, ...] = ()
    tuned: tuple[float, ...] = ()


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
    if budget.timed and distributed.is_main():
        watch = stopwatch(network, found, timing or Timing(), round_to, reporter)
        if not sites:
            check_fastest(watch, budget, span)
    elif not budget.timed:
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
    evidence = evidence_for(
        network,
        found,
        subset,
        device=device,
        seed=seed,
        statistics=statistics,
        energies=energies,
        repair=repair,
    )
    with (reporter or Silent()).stage(f"score by {criterion}", None):
        scores = score(criterion, evidence)
    network.module.cpu()
    macs, params = totals(costs)

    def chosen_for(limit: Budget, times: LatencyModel | None = None) -> Plan:
        chosen = make_plan(groups, left, scores, limit, times=times, **widths)
        return replace(chosen, budget=budget, macs_before=macs, params_before=params, sites=sites)

    def decided() -> Plan:
        if watch is None:
            return chosen_for(rest)
        return meet(watch, budget, span, chosen_for, lambda p: built(network, found, p), reporter=reporter)

    return distributed.record_from_main(Plan, decided)


def built(network: Network, found: Structure, chosen: Plan) -> Network:
    """Return a network cut and folded by a plan, without proof and repair."""
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
        repair: `refit`: least squares, BN statistics, then scales and shifts towards the dense outputs; `layers`:
            the same without the last; `bn`: BN statistics alone; `none`.
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
            train=data.train,
            seed=seed,
            device=device,
            show=show,
        )
        distributed.synchronise(repaired)
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
        plain=artifact.made_plain(network, module),
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
        tuned=tuple(done.get("tuned", ())),
    )


def _proof_images(network: Network, data: DataSource | None, seed: int) -> torch.Tensor:
    preprocessing = network.header.preprocessing
    if data is None:
        return example_input(preprocessing, PROOF_IMAGES)
    images, _ = next(
        iter(balanced_subset(data.train, PROOF_IMAGES, seed).batches(PROOF_IMAGES, preprocessing))
    )
    return images
