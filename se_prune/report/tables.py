"""The tables of a report, as text; the web page and the Markdown show the same ones.

Every number comes from the run record, or is a difference or ratio of two numbers in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from se_prune import text
from se_prune.records import Budget, GroupPlan, Plan
from se_prune.report import changes
from se_prune.report.changes import dense_and_last
from se_prune.results import SENSITIVITY_SHARES, Exported, GroupSensitivity, Latency, Run, SiteSummary

#: Tables longer than this are folded away behind their caption.
LONG = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A caption, column heads and rows of text; `align` has one letter a column, `l` or `r`."""

    caption: str
    head: tuple[str, ...]
    align: str
    rows: tuple[tuple[str, ...], ...]

    @property
    def is_long(self) -> bool:
        """Say whether the table is better folded away."""
        return len(self.rows) > LONG


def before_after(run: Run) -> Table:
    """Return costs, sizes, accuracies and latencies of the dense and the pruned network."""
    rows = [*_cost_rows(run), *_accuracy_rows(run), *_latency_rows(run)]
    return Table(
        caption="Dense and pruned network",
        head=("", "dense", "pruned", "pruned against dense"),
        align="lrrr",
        rows=tuple(rows),
    )


def _cost_rows(run: Run) -> list[tuple[str, ...]]:
    before, after = run.cost_before, run.cost_after
    counts = [
        ("MACs", before.macs, after.macs),
        ("MACs in SE blocks, part of the above", before.macs_se, after.macs_se),
        ("learnable parameters", before.params, after.params),
    ]
    gates = len(run.plan.sites)
    left = gates - run.plan.sites_folded
    folded = [("gate sites", text.count(gates), text.count(left), text.share(left, gates))] if gates else []
    rows = [(name, text.scaled(b), text.scaled(a), text.share(a, b)) for name, b, a in counts]
    sizes = text.file_size(run.bytes_before), text.file_size(run.bytes_after)
    return [*rows, *folded, ("size on disk", *sizes, text.share(run.bytes_after, run.bytes_before))]


def _accuracy_rows(run: Run) -> list[tuple[str, ...]]:
    pair = dense_and_last(run)
    if pair is None:
        return []
    dense, last = pair
    return [
        ("top-1", *(text.percent(e.top1, 2) for e in pair), text.points(last.top1 - dense.top1)),
        ("top-1, 95 % Wilson interval", *(text.interval(e.top1_ci95) for e in pair), ""),
        ("top-5", *(text.percent(e.top5, 2) for e in pair), text.points(last.top5 - dense.top5)),
    ]


def _latency_rows(run: Run) -> list[tuple[str, ...]]:
    if run.latency is None:
        return []
    medians = (text.milliseconds(value.median_ms) for value in run.latency)
    spreads = (f"{text.significant(v.p10_ms)}–{text.milliseconds(v.p90_ms)}" for v in run.latency)
    return [
        (f"latency, batch {run.latency[1].batch_size}, median", *medians, text.speed(run.latency[1].ratio)),
        ("latency, 10th–90th percentile", *spreads, ""),
    ]


def latency_conditions(latency: Latency) -> str:
    """Say how a latency was measured."""
    threads = "1 thread" if latency.threads == 1 else f"{latency.threads} threads"
    return (
        f"{latency.runtime} on {latency.device}, {threads}, batch {latency.batch_size}, "
        f"{text.count(latency.rounds)} interleaved rounds"
    )


def stages(run: Run) -> Table | None:
    """Return the accuracy after each stage, or None without stages."""
    if not run.stages:
        return None
    dense = run.stages[0].evaluation
    rows = []
    for result in run.stages:
        value = result.evaluation
        change = text.MISSING if value is dense else text.points(value.top1 - dense.top1)
        rows.append(
            (
                result.label,
                text.percent(value.top1, 2),
                text.interval(value.top1_ci95),
                change,
                text.percent(value.top5, 2),
                f"{value.loss:.4f}",
                text.count(value.n),
                text.duration(result.seconds),
            )
        )
    return Table(
        caption="Accuracy after each stage",
        head=(
            "stage",
            "top-1",
            "95 % interval",
            f"against {run.stages[0].stage}",
            "top-5",
            "cross-entropy",
            "images",
            "stage took",
        ),
        align="lrrrrrrr",
        rows=tuple(rows),
    )


def groups(run: Run) -> Table | None:
    """Return the channels of each group before and after, with the planner's notes."""
    if not run.plan.groups:
        return None
    return Table(
        caption="Channels of each group, in the order of the network; those that cannot be cut come last",
        head=("group", "kind", "before", "after", "kept", "why no more leave"),
        align="llrrrl",
        rows=tuple(_group_row(group) for group in (*run.plan.groups, *run.plan.refused)),
    )


def _group_row(group: GroupPlan) -> tuple[str, ...]:
    kept = kept_channels(group)
    kept_share = text.share(kept, group.channels)
    return group.name, group.kind, text.count(group.channels), text.count(kept), kept_share, group.note or ""


def kept_channels(group: GroupPlan) -> int:
    """Return how many channels of a group stay."""
    return group.channels - len(group.removed)


def layers(run: Run) -> Table | None:
    """Return the MACs of each layer before and after; a layer that is gone has a dash."""
    before, after = run.cost_before.per_layer, run.cost_after.per_layer
    names = list(dict.fromkeys([*before, *after]))
    rows = tuple(
        (
            name,
            text.scaled(before[name]) if name in before else text.MISSING,
            text.scaled(after[name]) if name in after else text.MISSING,
            text.share(after[name], before[name]) if name in before and name in after else text.MISSING,
        )
        for name in names
    )
    if not rows:
        return None
    return Table(
        caption="MACs of each layer", head=("layer", "dense", "pruned", "kept"), align="lrrr", rows=rows
    )


def sites(
    found: Sequence[SiteSummary], plan: Plan | None, *, caption: str = "Gate sites of the dense network"
) -> Table | None:
    """Return how alive each gate is, what folding it would lose, and, where the plan folds any, what was done."""
    if not found:
        return None
    done = {
        site.name: site.note or "" if site.action == "keep" else f"folded {site.note}"
        for site in (() if plan is None else plan.sites)
    }
    moved = any(site.logit_shift is not None for site in found)
    return Table(
        caption=caption,
        head=(
            "gate site",
            "channels",
            "hidden units",
            "mean gate",
            "std over images",
            "class specificity",
            "saturated",
            "fold loss",
            *(("logit shift",) if moved else ()),
            "advice",
            *(("done",) if done else ()),
        ),
        align=f"lrrrrrrr{'r' * moved}l{'l' * bool(done)}",
        rows=tuple(
            (*_site_row(site, moved=moved), *((done.get(site.name) or "kept",) if done else ()))
            for site in found
        ),
    )


def sensitivity(found: Sequence[GroupSensitivity]) -> Table:
    """Return what channel groups are predicted to lose with some of their channels, and how many those are."""
    return Table(
        caption="Predicted loss by channels removed",
        head=(
            "group",
            "kind",
            "channels",
            *(f"without {text.percent(share, 0)}" for share in SENSITIVITY_SHARES),
        ),
        align="llrrrr",
        rows=tuple(
            (g.name, g.kind, text.count(g.channels), *map(text.loss, g.predicted_loss)) for g in found
        ),
    )


def _site_row(site: SiteSummary, *, moved: bool) -> tuple[str, ...]:
    shift = text.MISSING if site.logit_shift is None else text.percent(site.logit_shift, 2)
    return (
        site.name,
        text.count(site.channels),
        text.count(site.hidden),
        f"{site.mean:.3f}",
        f"{site.std_images:.4f}",
        text.percent(site.class_specificity),
        text.percent(site.saturated),
        text.percent(site.fold_loss, 2),
        *((shift,) if moved else ()),
        site.advice,
    )


def parts(run: Run) -> Table | None:
    """Return what each part of the network takes before and after: MACs, and milliseconds where they were measured."""
    columns = [(unit, changes.part_sums(run, unit)) for unit in ("MACs", "ms")]
    known = [(unit, sums) for unit, sums in columns if sums is not None]
    if not known:
        return None
    order = list(dict.fromkeys(name for _, sums in known for name in sums))
    write = {"MACs": text.scaled, "ms": text.milliseconds}
    head, rows = ["part"], [[name] for name in [*order, "all"]]
    for unit, sums in known:
        title = "MACs" if unit == "MACs" else "time"
        head += [f"{title}, dense", f"{title}, pruned", f"{title} kept"]
        whole = tuple(sum(pair[side] for pair in sums.values()) for side in (0, 1))
        for row in rows:
            before, after = whole if row[0] == "all" else sums.get(row[0], (0.0, 0.0))
            row += [write[unit](before), write[unit](after), text.share(after, before)]
    return Table(
        caption="Where the cost is",
        head=tuple(head),
        align=f"l{'rrr' * len(known)}",
        rows=tuple(tuple(row) for row in rows),
    )


def exported(run: Run) -> Table | None:
    """Return the exported files with their parity and latency."""
    if not run.exported:
        return None
    return Table(
        caption="Exported files, checked against the torch network on real images",
        head=(
            "target",
            "file",
            "size",
            "latency, batch 1",
            "largest logit difference",
            "same top-1",
            "images checked",
        ),
        align="llrrrrr",
        rows=tuple(_exported_row(item) for item in run.exported),
    )


def _exported_row(item: Exported) -> tuple[str, ...]:
    return (
        item.target,
        item.output,
        text.file_size(item.bytes),
        text.MISSING if item.latency_ms is None else text.milliseconds(item.latency_ms),
        text.MISSING if item.max_abs_diff is None else text.tiny(item.max_abs_diff),
        text.MISSING if item.top1_agreement is None else text.percent(item.top1_agreement, 2),
        text.count(item.images_checked),
    )


def uncounted(run: Run) -> Table:
    """Return what the MACs leave out: the gates' own arithmetic, and the operations that ran uncounted."""
    before, after = run.cost_before, run.cost_after
    gate = ("gates: squeeze, activation, multiply (operations)", text.scaled(before.macs_gate))
    rows = [(*gate, text.scaled(after.macs_gate))]
    rows += [
        (
            f"{name} (calls)",
            text.count(before.uncounted.get(name, 0)),
            text.count(after.uncounted.get(name, 0)),
        )
        for name in dict.fromkeys([*before.uncounted, *after.uncounted])
    ]
    return Table(
        caption="What ran and is not in the MACs",
        head=("operation", "dense", "pruned"),
        align="lrr",
        rows=tuple(rows),
    )


def environment(versions: dict[str, str], hashes: dict[str, str]) -> tuple[Table, ...]:
    """Return the versions and hardware that something was made with, and the hashes of files and data."""
    found = []
    if versions:
        rows = tuple(sorted(versions.items()))
        found.append(Table(caption="Environment", head=("what", "version"), align="ll", rows=rows))
    if hashes:
        rows = tuple(hashes.items())
        found.append(Table(caption="SHA-256", head=("what", "hash"), align="ll", rows=rows))
    return tuple(found)


def comparison(runs: Sequence[Run]) -> Table:
    """Return one numbered row a run; columns that no run has a value for are left out."""
    columns: list[tuple[str, str, list[str]]] = [
        ("no.", "l", [str(i) for i, _ in enumerate(runs, start=1)]),
        ("run", "l", [run.name for run in runs]),
        ("criterion", "l", [run.plan.criterion for run in runs]),
        ("budget", "l", [budget(run.plan.budget) for run in runs]),
        ("MACs", "r", [text.scaled(run.cost_after.macs) for run in runs]),
        ("MACs kept", "r", [text.share(run.cost_after.macs, run.cost_before.macs) for run in runs]),
        ("parameters kept", "r", [text.share(run.cost_after.params, run.cost_before.params) for run in runs]),
        (
            "top-1",
            "r",
            [text.percent(run.stages[-1].evaluation.top1, 2) if run.stages else "" for run in runs],
        ),
        (
            "95 % interval",
            "r",
            [text.interval(r.stages[-1].evaluation.top1_ci95) if r.stages else "" for r in runs],
        ),
        ("against dense, points", "r", [_difference(run) for run in runs]),
        ("p", "r", [text.p_value(r.paired.p_value).removeprefix("= ") if r.paired else "" for r in runs]),
        ("speed", "r", [f"{run.latency[1].ratio:.2f}×" if run.latency else "" for run in runs]),
    ]
    used = [column for column in columns if any(column[2])]
    cells = [[cell or text.MISSING for cell in values] for _, _, values in used]
    return Table(
        caption="All runs",
        head=tuple(name for name, _, _ in used),
        align="".join(letter for _, letter, _ in used),
        rows=tuple(zip(*cells, strict=True)),
    )


def _difference(run: Run) -> str:
    pair = dense_and_last(run)
    return "" if pair is None else text.points(pair[1].top1 - pair[0].top1).removesuffix(" points")


def budget(value: Budget) -> str:
    """Say what a plan had to meet."""
    if value.kind == "sparsity" and value.value == 0:
        return "no channel removed"
    if value.kind == "sparsity":
        return f"{text.percent(value.value)} of channels removed"
    return f"{text.percent(value.value)} of {'MACs' if value.kind == 'macs' else 'parameters'} kept"
