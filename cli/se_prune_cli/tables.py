"""Rows of the tables that several commands print, from records."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from se_prune import text

if TYPE_CHECKING:
    from se_prune.records import Cost, LayerRefit, Plan, PlannedLatency, SitePlan
    from se_prune.results import BenchRow, Evaluation, GroupSensitivity, OperationTime, SiteSummary

Table = tuple[list[str], list[list[str]]]


def accuracy(rows: Iterable[tuple[str, Evaluation]]) -> Table:
    """Return top-1 with its interval, top-5 and loss per network."""
    columns = ["network", "images", "top-1", "95 % interval", "top-5", "loss"]
    return columns, [
        [
            name,
            str(e.n),
            text.percent(e.top1, 2),
            text.interval(e.top1_ci95),
            text.percent(e.top5, 2),
            f"{e.loss:.4f}",
        ]
        for name, e in rows
    ]


def costs(before: Cost, after: Cost) -> Table:
    """Return MACs and parameters before and after, and the fraction kept."""
    rows = [
        ("MACs", before.macs, after.macs),
        ("of which convolutions", before.macs_conv - before.macs_se, after.macs_conv - after.macs_se),
        ("of which SE blocks", before.macs_se, after.macs_se),
        ("parameters", before.params, after.params),
    ]
    return ["", "before", "after", "kept"], [
        [name, text.scaled(a), text.scaled(b), text.share(b, a)] for name, a, b in rows
    ]


def plan_rows(plan: Plan) -> Table:
    """Return channels kept per group, what the scores say is lost with the others, and why no more leave."""
    return ["group", "kind", "channels", "kept", "predicted loss", "why no more leave"], [
        [
            g.name,
            g.kind,
            str(g.channels),
            str(g.channels - len(g.removed)),
            "" if g.predicted_loss is None else text.percent(g.predicted_loss, 2),
            g.note or "",
        ]
        for g in (*plan.groups, *plan.refused)
    ]


def fold_rows(sites: Sequence[SitePlan]) -> Table:
    """Return which gates are folded, at what predicted loss, and where their constants go."""
    return ["gate site", "predicted loss", "action", "note"], [
        [s.name, text.percent(s.loss, 2), s.action, s.note or ""] for s in sites
    ]


def site_rows(sites: Sequence[SiteSummary]) -> Table:
    """Return the site table of `analyze`; `std` is over images, `specific` the between-class share of it.

    The logit shift is what folding the site is predicted to cost; the JSON has the energy that it loses as well.
    """
    head = ["gate site", "channels", "mean", "std", "specific", "saturated", "logit shift", "advice"]
    return head, [
        [
            s.name,
            f"{s.channels}/{s.hidden}" if s.hidden else str(s.channels),
            f"{s.mean:.2f}",
            f"{s.std_images:.3f}",
            f"{s.class_specificity:.2f}",
            text.percent(s.saturated),
            text.MISSING if s.logit_shift is None else text.percent(s.logit_shift, 2),
            s.advice,
        ]
        for s in sites
    ]


def sensitivity_rows(groups: Sequence[GroupSensitivity]) -> Table:
    """Return what channel groups are predicted to lose with some of their channels."""
    from se_prune.results import SENSITIVITY_SHARES

    shares = (f"{text.percent(share, 0)} removed" for share in SENSITIVITY_SHARES)
    return ["group", "kind", "channels", *shares], [
        [g.name, g.kind, str(g.channels), *map(text.loss, g.predicted_loss)] for g in groups
    ]


def bench_rows(rows: Sequence[BenchRow]) -> Table:
    """Return latency, throughput and memory per network and setting; "as fast" is against the last network."""
    head = [
        "network",
        "runtime",
        "batch",
        "threads",
        "median",
        "p95",
        "images/s",
        "peak memory",
        "as fast",
        "95 %",
    ]
    return head, [
        [
            r.network,
            r.runtime if r.device == "cpu" else f"{r.runtime}, {r.device}",
            str(r.batch_size),
            str(r.threads),
            text.milliseconds(r.median_ms),
            text.milliseconds(r.p95_ms),
            text.significant(r.images_per_second),
            text.MISSING if r.peak_bytes is None else text.file_size(r.peak_bytes),
            text.MISSING if r.speedup is None else f"{r.speedup:.2f} ×",
            text.MISSING if r.speedup_ci95 is None else f"{r.speedup_ci95[0]:.2f}–{r.speedup_ci95[1]:.2f}",
        ]
        for r in rows
    ]


def operation_rows(operations: Sequence[OperationTime]) -> Table:
    """Return a profile: layers with their widths, and what is between them summed up by kind."""
    whole = sum(o.ms for o in operations)
    rows = [
        [
            o.layer or o.name,
            o.kind,
            f"{o.into} → {o.out}",
            text.significant(1e3 * o.ms),
            text.share(o.ms, whole),
            text.significant(1e9 * o.ms / o.macs) if o.macs else text.MISSING,
            text.MISSING if o.aligned_ms is None else text.significant(1e3 * o.aligned_ms),
        ]
        for o in operations
        if o.into
    ]
    others: dict[str, list[float]] = {}
    for operation in operations:
        if not operation.into:
            others.setdefault(operation.kind, []).append(operation.ms)
    rows += [
        [
            f"{len(times)} × {kind}",
            kind,
            "",
            text.significant(1e3 * sum(times)),
            text.share(sum(times), whole),
            "",
            "",
        ]
        for kind, times in sorted(others.items(), key=lambda item: -sum(item[1]))
    ]
    return ["layer", "operation", "channels", "µs", "share", "ms per GMAC", "µs at multiples of 8"], rows


def latency_line(latency: PlannedLatency) -> str:
    """Return one sentence on what a latency budget came to."""
    low, high = latency.share_ci95
    reached = "within the tolerance" if latency.within else "faster than asked" if latency.met else "NOT met"
    return (
        f"latency, {latency.runtime}, batch {latency.batch_size}, threads {latency.threads}: target "
        f"{text.milliseconds(latency.target_ms)}, predicted {text.milliseconds(latency.predicted_ms)}, measured "
        f"{text.milliseconds(latency.measured_ms)} ({text.percent(latency.share)} of the dense "
        f"{text.milliseconds(latency.dense_ms)}, 95 % interval {text.percent(low)} to {text.percent(high)}, "
        f"{latency.rounds} interleaved rounds), {reached} of {text.percent(latency.tolerance, 0)} after "
        f"{latency.attempts} plans"
    )


def tuned_line(divergences: Sequence[float]) -> str:
    """Return one sentence on the repair of scales and shifts."""
    steps = len(divergences) - 1
    if not steps:
        return "scales and shifts: left as they are, no step was sure to help on held-out images"
    return (
        f"scales and shifts: {steps} Gauss-Newton {'step' if steps == 1 else 'steps'}; divergence from the dense "
        f"network's class probabilities {divergences[0]:.4f} → {divergences[-1]:.4f} on held-out images"
    )


def refit_line(refits: Sequence[LayerRefit]) -> str:
    """Return one sentence on the least-squares repair."""
    before, after = (
        statistics.median(getattr(fit, name) for fit in refits) for name in ("error_before", "error_after")
    )
    return (
        f"least squares: {sum(fit.kept for fit in refits)} of {len(refits)} layers that lost inputs re-fitted; "
        f"median error "
        f"{text.percent(before, 1)} → {text.percent(after, 1)} of the responses' variance on held-out images"
    )
