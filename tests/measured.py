"""Gate statistics to test with: measured on a small network, or of gates made by hand.

Shapes: N images, K classes, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from se_prune.data.batches import TensorImages
from se_prune.gates.energies import collect_energies
from se_prune.gates.sites import find_sites
from se_prune.gates.statistics import Collector, Statistics, collect
from se_prune.records import GateSite
from tests.nets import Facts

CPU = torch.device("cpu")
CLASSES = ("ant", "bee", "cow", "never seen")
N = 23


def images(facts: Facts, n: int = N) -> TensorImages:
    """Return ever brighter images whose classes come in uneven numbers; the last of `CLASSES` has none."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.rand(n, *facts.input_size, generator=generator) * torch.linspace(20, 255, n).view(
        -1, 1, 1, 1
    )
    return TensorImages(images=pixels.to(torch.uint8), labels=torch.tensor([0, 1, 1, 2, 1, 0, 1] * n)[:n])


def network(facts: Facts) -> tuple[nn.Module, tuple[GateSite, ...]]:
    """Return a network whose gates are alive, in eval mode, with its sites."""
    torch.manual_seed(0)
    model = facts.build().eval()
    sites = find_sites(model, facts.images())
    with torch.no_grad():
        for site in sites:
            reduce = model.get_submodule(site.reduce)
            reduce.weight.abs_().mul_(20)  # no hidden unit is dead, for features of either sign
            if reduce.bias is not None:
                reduce.bias.fill_(1)
            model.get_submodule(site.expand).weight.mul_(6)
    return model, sites


def measured(
    facts: Facts, batch_size: int = 8
) -> tuple[nn.Module, tuple[GateSite, ...], TensorImages, Statistics]:
    """Return a network, its sites, the images, and the statistics and energies measured on them."""
    model, sites = network(facts)
    split = images(facts)
    options = {"device": CPU, "batch_size": batch_size}
    statistics = collect(model, sites, split, facts.preprocessing, classes=CLASSES, **options)
    statistics.energies = collect_energies(model, split, facts.preprocessing, classes=4, **options)
    return model, sites, split, statistics


def made(
    gates: Sequence[torch.Tensor], labels: Sequence[int], u: torch.Tensor | None = None, classes: int = 2
) -> Statistics:
    """Return the statistics of one site per table of gates (N, C); features (N, C, 2, 2) are 1 unless given."""
    sites = [_site(f"site{i}", table.shape[1]) for i, table in enumerate(gates)]
    collector = Collector(sites, classes, CPU)
    collector.begin(torch.tensor(labels))
    for own, table in zip(sites, gates, strict=True):
        features = torch.ones(*table.shape, 2, 2) if u is None else u
        collector.on_gate(own, features, table[:, :, None, None])
    return Statistics(
        classes=tuple(map(str, range(classes))),
        counts=collector.counts,
        sites=tuple(sites),
        sums=collector.result(),
    )


def _site(name: str, channels: int) -> GateSite:
    return GateSite(
        name=name, owner=name, channels=channels, hidden=1, reduce=f"{name}.a", expand=f"{name}.b"
    )


def column(*values: float) -> torch.Tensor:
    """Return the gates (N, 1) of one channel."""
    return torch.tensor(values)[:, None]
