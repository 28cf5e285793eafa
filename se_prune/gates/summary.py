"""What the statistics say: how alive each gate is, and what folding it would lose."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from se_prune.gates.statistics import BINS, SiteSums, Statistics
from se_prune.records import GateSite
from se_prune.results import GateProfile, SiteSummary

#: Sites are advised to be folded, cheapest first, as long as their predicted losses add up to less than this.
FOLD_TOLERANCE = 0.005


def fold_constants(sums: SiteSums) -> torch.Tensor:
    """Return the best constant per channel (C,): a = E[s·u²] / E[u²]; the mean gate where u is always 0."""
    u2 = sums.u2.sum(0)
    mean = sums.s.sum(0) / sums.histogram.sum(1).clamp(min=1)
    return torch.where(u2 > 0, sums.su2.sum(0) / u2.clamp(min=1e-300), mean)


def fold_loss(sums: SiteSums) -> float:
    """Return E[(s-a)²u²] / E[v²] over all channels: the share of energy that the best constants miss."""
    u2, su2, s2u2 = sums.u2.sum(0), sums.su2.sum(0), sums.s2u2.sum(0)
    lost = s2u2 - torch.where(u2 > 0, su2 * su2 / u2.clamp(min=1e-300), torch.zeros_like(u2))
    return float(lost.clamp(min=0).sum() / s2u2.sum().clamp(min=1e-300))


def specificity(sums: SiteSums, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the between-class and the total variance of the gate, each (C,)."""
    n = counts.sum()
    mean = sums.s.sum(0) / n
    total = (sums.s2.sum(0) / n - mean * mean).clamp(min=0)
    seen = counts > 0
    class_mean = sums.s[seen] / counts[seen][:, None]
    between = ((class_mean - mean) ** 2 * (counts[seen] / n)[:, None]).sum(0)
    return between, total


def summarise(statistics: Statistics) -> tuple[SiteSummary, ...]:
    """Return the site table, in the order in which the sites run."""
    rows = [_summary(statistics, site) for site in statistics.sites]
    cheap = cheapest_within({row.name: row.predicted_loss for row in rows}, FOLD_TOLERANCE)
    return tuple(replace(row, advice="fold" if row.name in cheap else "keep") for row in rows)


def cheapest_within(losses: Mapping[str, float], tolerance: float) -> tuple[str, ...]:
    """Return as many names, cheapest first, as together lose less than `tolerance`."""
    order = sorted(losses, key=lambda name: losses[name])
    totals = itertools.accumulate(losses[name] for name in order)
    return tuple(name for name, total in zip(order, totals, strict=True) if total < tolerance)


def _summary(statistics: Statistics, site: GateSite) -> SiteSummary:
    sums = statistics.sums[site.name]
    between, total = specificity(sums, statistics.counts)
    edge = max(1, round(0.05 * BINS))
    shares = sums.histogram.sum(0) / sums.histogram.sum()
    return SiteSummary(
        name=site.name,
        channels=site.channels,
        hidden=site.hidden,
        mean=float(sums.s.sum() / statistics.n / site.channels),
        std_images=float(total.sqrt().mean()),
        class_specificity=float(between.sum() / total.sum()) if float(total.sum()) > 0 else 0.0,
        saturated=float(shares[:edge].sum() + shares[-edge:].sum()),
        fold_loss=fold_loss(sums),
        logit_shift=None if statistics.shifts is None else statistics.shifts[site.name],
        advice="keep",
    )


def liveliest(statistics: Statistics, limit: int) -> tuple[str, ...]:
    """Return at most `limit` classes, in their order: those whose gates lie farthest from the all-class mean."""
    counts = statistics.counts.clamp(min=1)[:, None]
    distance = torch.zeros(len(statistics.classes), dtype=torch.float64)
    for sums in statistics.sums.values():
        distance += ((sums.s / counts - sums.s.sum(0) / statistics.n) ** 2).sum(1)
    distance[statistics.counts == 0] = -1.0
    kept = torch.topk(distance, min(limit, len(distance))).indices.tolist()
    return tuple(statistics.classes[i] for i in sorted(kept))


def profile(
    statistics: Statistics, site: str, classes: Sequence[str] = (), channels: Sequence[int] = ()
) -> GateProfile:
    """Return the gate by channel for chosen classes (all where none are given), as in the paper's Figure 5.

    Values have six digits.

    Args:
        statistics: Of a network.
        site: The name of a gate site.
        classes: Names of classes.
        channels: The dense network's numbers of the channels, where this network was cut.
    """
    sums = statistics.sums[site]
    _, total = specificity(sums, statistics.counts)
    chosen = [i for i, name in enumerate(statistics.classes) if not classes or name in classes]
    means, spreads = {}, {}
    for i in chosen:
        n = statistics.counts[i].clamp(min=1)
        mean = sums.s[i] / n
        means[statistics.classes[i]] = _rounded(mean)
        spreads[statistics.classes[i]] = _rounded((sums.s2[i] / n - mean * mean).clamp(min=0).sqrt())
    return GateProfile(
        site=site,
        mean=_rounded(sums.s.sum(0) / statistics.n),
        std=_rounded(total.sqrt()),
        per_class=means,
        per_class_std=spreads,
        channels=tuple(channels),
    )


def _rounded(values: torch.Tensor) -> tuple[float, ...]:
    """Return values (C,) to six digits: what a picture needs, and a third of the characters."""
    return tuple(round(value, 6) for value in values.tolist())
