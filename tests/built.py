"""Networks with lively random weights and statistics, what they are made of, and plans by random scores."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from se_prune.artifact import NORM_TYPES
from se_prune.channels import couplings
from se_prune.cost import count_cost
from se_prune.gates.sites import find_sites
from se_prune.layers import layer_costs
from se_prune.planning import make_plan
from se_prune.records import (
    ArchSpec,
    Budget,
    Cost,
    Coupling,
    GateSite,
    LayerCost,
    Plan,
    Preprocessing,
    Scores,
)
from se_prune.zoo.registry import build, default_preprocessing
from tests.nets import ALL


@dataclass(frozen=True, kw_only=True)
class Built:
    """A network and its structure."""

    model: nn.Module
    preprocessing: Preprocessing
    example: torch.Tensor
    sites: tuple[GateSite, ...]
    couplings: tuple[Coupling, ...]
    cost: Cost
    layers: dict[str, LayerCost]


@torch.no_grad()
def lively(model: nn.Module, preprocessing: Preprocessing, seed: int = 0) -> nn.Module:
    """Give every BN its own statistics, scale and shift, such that every layer's signal reaches the output.

    Statistics are those of random images, times something random: with independent ones, and torch's initial
    weights, a deep network's output hardly depends on its first layers, and a proof on it would prove little.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = [m for m in model.modules() if isinstance(m, NORM_TYPES)]
    for norm in norms:
        norm.weight.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
        norm.bias.copy_(torch.randn(norm.num_features, generator=generator) * 0.3)
        norm.momentum = 1.0
    model.train()
    model(torch.randn(8, *preprocessing.input_size, generator=generator))
    for norm in norms:
        norm.momentum = 0.1
        norm.running_mean.mul_(torch.rand(norm.num_features, generator=generator) + 0.5)
        norm.running_var.mul_(torch.rand(norm.num_features, generator=generator) + 0.5)
    return model.eval()


@torch.no_grad()
def calm(model: nn.Module, preprocessing: Preprocessing, seed: int = 1) -> nn.Module:
    """Scale every BN such that what it passes on is as large as its scale and shift say.

    Where statistics are not the network's own, a layer's signal is a little larger than the one before, and a hundred
    layers on float32 rounding alone moves the outputs by a thousandth of them.
    """

    def rescale(norm: Any, _: Any, output: torch.Tensor) -> torch.Tensor:
        wanted = norm.weight.square().mean() + norm.bias.square().mean()
        factor = (wanted / output.square().mean()).sqrt()
        norm.weight.mul_(factor)
        norm.bias.mul_(factor)
        return output * factor

    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2, *preprocessing.input_size, generator=generator)
    handles = [m.register_forward_hook(rescale) for m in model.modules() if isinstance(m, NORM_TYPES)]
    model.eval()(images)
    for handle in handles:
        handle.remove()
    return model


def examine(model: nn.Module, preprocessing: Preprocessing) -> Built:
    """Find sites, groups and costs."""
    example = torch.randn(2, *preprocessing.input_size, generator=torch.Generator().manual_seed(1))
    sites = find_sites(model, example)
    cost = count_cost(model, preprocessing, sites)
    return Built(
        model=model,
        preprocessing=preprocessing,
        example=example,
        sites=sites,
        couplings=couplings(model, example, sites),
        cost=cost,
        layers=layer_costs(model, cost.per_layer),
    )


def built(name: str) -> Built:
    """Build a network of tests/nets.py by its short name, or any `LIBRARY:NAME` (64×64 images outside the zoo)."""
    torch.manual_seed(0)
    if name in ALL:
        return examine(lively(ALL[name].build(), ALL[name].preprocessing), ALL[name].preprocessing)
    spec = ArchSpec(ref=name)
    preprocessing = default_preprocessing(spec)
    if not name.startswith("zoo:"):
        preprocessing = Preprocessing(input_size=(3, 64, 64), mean=(0.0,) * 3, std=(1.0,) * 3)
    return examine(lively(build(spec), preprocessing), preprocessing)


def random_scores(found: tuple[Coupling, ...], seed: int = 0, *, comparable: bool = False) -> Scores:
    """Return uniform random scores of every group that can be cut."""
    generator = random.Random(seed)
    groups = {
        c.group.name: tuple(generator.random() for _ in range(c.group.channels))
        for c in found
        if c.group.prunable
    }
    return Scores(criterion="random", comparable=comparable, groups=groups)


def random_plan(network: Built, kind: str, value: float, seed: int = 0, **options: Any) -> Plan:
    """Return a plan by random scores."""
    scores = random_scores(network.couplings, seed)
    budget = Budget(kind=kind, value=value)  # type: ignore[arg-type]
    return make_plan(network.couplings, network.layers, scores, budget, **options)
