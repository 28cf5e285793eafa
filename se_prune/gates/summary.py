"""What the statistics say: how alive each gate is, and what folding it would lose."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from se_prune.gates.statistics import BINS, SiteSums, Statistics
from se_prune.records import GateProfile, SiteSummary

#: A site whose best constant loses less than this share of its recalibrated energy is advised to be folded.
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
    return tuple(_summary(statistics, index) for index in range(len(statistics.sites)))


def _summary(statistics: Statistics, index: int) -> SiteSummary:
    site = statistics.sites[index]
    sums = statistics.sums[site.name]
    between, total = specificity(sums, statistics.counts)
    edge = max(1, round(0.05 * BINS))
    shares = sums.histogram.sum(0) / sums.histogram.sum()
    loss = fold_loss(sums)
    return SiteSummary(
        name=site.name,
        channels=site.channels,
        hidden=site.hidden,
        mean=float(sums.s.sum() / statistics.n / site.channels),
        std_images=float(total.sqrt().mean()),
        class_specificity=float(between.sum() / total.sum()) if float(total.sum()) > 0 else 0.0,
        saturated=float(shares[:edge].sum() + shares[-edge:].sum()),
        fold_loss=loss,
        advice="fold" if loss < FOLD_TOLERANCE else "keep",
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


def liveness(summaries: Sequence[SiteSummary]) -> str:
    """Return one sentence on how alive the gates are, for the first line of `analyze`."""
    if not summaries:
        return "This network has no gate sites."
    dead = [s for s in summaries if s.advice == "fold"]
    std = sum(s.std_images for s in summaries) / len(summaries)
    spec = sum(s.class_specificity for s in summaries) / len(summaries)
    head = f"mean deviation over images {std:.3f}, mean class specificity {spec:.2f}"
    if len(dead) == len(summaries):
        return f"All {len(summaries)} gates are dead ({head}): fold them all, it costs nothing."
    if dead:
        return f"{len(summaries) - len(dead)} of {len(summaries)} gates are alive ({head}); {len(dead)} can be folded."
    return f"All {len(summaries)} gates are alive ({head})."
