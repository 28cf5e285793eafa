"""Folding as a part of whole jobs: what it would win, which sites a plan folds, and what the planner then counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from se_prune.artifact import Network
from se_prune.cost import count_cost
from se_prune.data import DataSource
from se_prune.errors import BudgetError, UsageError
from se_prune.folding import FoldRequest, Outlook, Saving, look_ahead, plan_sites
from se_prune.gates.statistics import Statistics
from se_prune.gates.summary import fold_constants, summarise
from se_prune.pipeline.measure import (
    MEASURED_IMAGES,
    Reporter,
    Structure,
    analyze,
    require_statistics,
)
from se_prune.planning import check_budget
from se_prune.preprocessing import example_input
from se_prune.records import (
    Budget,
    Coupling,
    GateSite,
    HiddenPolicy,
    LayerCost,
    LayerSlice,
    Plan,
    SitePlan,
)
from se_prune.surgery.fold import Way, find_ways


def outlook(network: Network, statistics: Statistics) -> Outlook:
    """Say how alive the gates are, and what folding them would win and cost."""
    summaries = summarise(statistics)
    losses = {s.name: s.predicted_loss for s in summaries}
    ways = find_ways(network.module, example_input(network.header.preprocessing), statistics.sites)
    cost = count_cost(network.module, network.header.preprocessing, statistics.sites)
    modules = dict(network.module.named_modules())
    savings = {
        site.name: _saving(site, ways.found[site.name], modules, cost.per_layer, losses[site.name])
        for site in statistics.sites
        if site.name in ways.found
    }
    return look_ahead(summaries, savings, ways.refused)


def _saving(
    site: GateSite, way: Way, modules: Mapping[str, nn.Module], macs: Mapping[str, int], loss: float
) -> Saving:
    if way.kind == "constant":
        layers = [name for name in (way.owner, way.unused) if name is not None]
        return Saving(
            sites=(site.name,),
            params=sum(p.numel() for name in layers for p in modules[name].parameters()) - way.channels,
            macs=sum(macs.get(name, 0) for name in layers),
            operations=way.operations,
            predicted_loss=loss,
        )
    left = way.channels if way.kind == "scale" else 0
    gone = sum(macs.get(layer, 0) for layer in (site.reduce, site.expand) if layer is not None)
    return Saving(
        sites=(site.name,),
        params=sum(p.numel() for p in modules[way.owner].parameters()) - left,
        macs=gone - left * way.positions,
        operations=way.operations - (1 if left else 0),
        predicted_loss=loss,
    )


def gates_of(
    network: Network,
    data: DataSource | None,
    *,
    device: torch.device,
    seed: int,
    reporter: Reporter | None,
) -> Statistics:
    """Measure the gates that are to be folded.

    Raises:
        UsageError: There is no data.
    """
    if data is None:
        raise UsageError(
            "--fold-gates measures the gates: add --data, or --stats of `se-prune analyze`; or leave it out."
        )
    return analyze(network, data, device=device, images=MEASURED_IMAGES, seed=seed, reporter=reporter)


def choose_sites(
    network: Network, found: Structure, statistics: Statistics, request: FoldRequest
) -> tuple[SitePlan, ...]:
    """Choose the sites that are folded, with their constants.

    Raises:
        UsageError: A site is unknown, or more are asked for than there are.
        SurgeryError: A site cannot be folded.
        CheckpointError: The statistics are of another network.
    """
    require_statistics(network, found, statistics)
    ways = find_ways(network.module, found.example, found.sites)
    constants = {name: tuple(fold_constants(sums).tolist()) for name, sums in statistics.sums.items()}
    notes = {name: way.note for name, way in ways.found.items()}
    return plan_sites(request, summarise(statistics), constants, notes, ways.refused)


def without_folded(
    network: Network, found: Structure, costs: Mapping[str, LayerCost], sites: Sequence[SitePlan]
) -> tuple[tuple[Coupling, ...], dict[str, LayerCost]]:
    """Return the channel groups and layer costs of the network without the SE blocks that are folded.

    The hidden groups of these are gone; a depthwise convolution that takes a block's place is counted.
    """
    names = {site.name for site in sites if site.action == "fold"}
    folded = [site for site in found.sites if site.name in names]
    if not folded:
        return found.couplings, dict(costs)
    ways = find_ways(network.module, found.example, folded).found
    owners = tuple(f"{way.owner}." for way in ways.values())
    unused = {way.unused for way in ways.values()}
    left = {n: cost for n, cost in costs.items() if not n.startswith(owners) and n not in unused}
    scales = {
        site.expand: ways[site.name] for site in folded if ways[site.name].kind in {"scale", "constant"}
    }
    for way in scales.values():
        size, multiplies = way.channels, way.kind == "scale"
        left[way.owner] = LayerCost(
            in_channels=size,
            out_channels=size,
            weights=size if multiplies else 0,
            biases=0 if multiplies else size,
            macs=size * way.positions if multiplies else 0,
            channelwise=True,
        )
    hidden = {site.reduce for site in folded}
    groups = []
    for coupling in found.couplings:
        if coupling.group.kind == "hidden" and coupling.group.name in hidden:
            continue
        slices = tuple(_moved(piece, scales) for piece in coupling.slices)
        groups.append(replace(coupling, slices=slices))
    return tuple(groups), left


def _moved(piece: LayerSlice, scales: Mapping[str | None, Way]) -> LayerSlice:
    """Let what takes a block's place, or its last layer's, have the channels that `expand` had."""
    way = scales.get(piece.layer) if piece.role == "out" else None
    return piece if way is None else replace(piece, layer=way.owner, role="channelwise")


def totals(costs: Mapping[str, LayerCost]) -> tuple[int, int]:
    """Return MACs and parameters of all layers."""
    return sum(c.macs for c in costs.values()), sum(c.weights + c.biases for c in costs.values())


def rest_of(budget: Budget, before: Mapping[str, LayerCost], left: Mapping[str, LayerCost]) -> Budget:
    """Return what a budget allows of the network that folding leaves; channels are not counted by their cost.

    Raises:
        BudgetError: Folding leaves nothing to count.
    """
    if budget.kind == "sparsity" or not 0 < budget.value <= 1:
        return budget
    index = 0 if budget.kind == "macs" else 1
    full, rest = totals(before)[index], totals(left)[index]
    if rest < 1:
        raise BudgetError(f"the network has no {budget.kind} to meet a budget of.")
    if rest == full:
        return budget  # and not nearly the same, for what compares them
    return replace(budget, value=min(1.0, budget.value * full / rest))


def check_rest(
    groups: Sequence[Coupling],
    left: Mapping[str, LayerCost],
    budget: Budget,
    rest: Budget,
    *,
    round_to: int,
    min_channels: int,
    hidden: HiddenPolicy,
) -> None:
    """Check that what folding leaves can meet its part `rest` of a budget.

    Raises:
        BudgetError: It cannot; the message says what is reachable.
    """
    try:
        check_budget(groups, left, rest, round_to=round_to, min_channels=min_channels, hidden=hidden)
    except BudgetError as error:
        if rest == budget:
            raise
        raise BudgetError(
            f"{budget.option} is {rest.value:.4g} of what the folded gates leave, and {error}"
        ) from error


def fold_only(
    before: Mapping[str, LayerCost],
    left: Mapping[str, LayerCost],
    sites: tuple[SitePlan, ...],
    *,
    round_to: int,
    min_channels: int,
    hidden: HiddenPolicy,
) -> Plan:
    """Return a plan that cuts no channel."""
    full, rest = totals(before), totals(left)
    return Plan(
        criterion="none",
        budget=Budget(kind="sparsity", value=0.0),
        round_to=round_to,
        min_channels=min_channels,
        groups=(),
        macs_before=full[0],
        macs_after=rest[0],
        params_before=full[1],
        params_after=rest[1],
        hidden=hidden,
        sites=sites,
    )
