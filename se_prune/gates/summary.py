"""What the statistics say: how alive each gate is, and what folding it would lose."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from se_prune.gates.statistics import BINS, SiteSums, Statistics
from se_prune.records import GateSite, SiteSummary
from se_prune.results import GateProfile

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


def profile(statistics: Statistics, site: str, classes: Sequence[str] = ()) -> GateProfile:
    """Return the gate by channel for chosen classes (all where none are given), as in the paper's Figure 5."""
    sums = statistics.sums[site]
    _, total = specificity(sums, statistics.counts)
    chosen = [i for i, name in enumerate(statistics.classes) if not classes or name in classes]
    per_class = {
        statistics.classes[i]: tuple((sums.s[i] / statistics.counts[i].clamp(min=1)).tolist()) for i in chosen
    }
    return GateProfile(
        site=site,
        mean=tuple((sums.s.sum(0) / statistics.n).tolist()),
        std=tuple(total.sqrt().tolist()),
        per_class=per_class,
    )
