"""The figures of accuracy, channels and cost, as plots in the units of the record."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from se_prune import text
from se_prune.records import GroupPlan
from se_prune.report import changes
from se_prune.report.plot import (
    Axis,
    Bar,
    Cell,
    Dot,
    Key,
    Line,
    Mark,
    Plot,
    color_of,
    margin,
    names,
    nice,
    scale,
)
from se_prune.report.tables import kept_channels
from se_prune.results import Evaluation, Run

GAIN, LOSS = "blue", "vermillion"
KIND_COLORS = {"stream": "blue", "inner": "green", "gated": "orange", "hidden": "purple"}
#: Of more classes than this, a figure of classes shows both ends of the ranking.
CLASS_BARS = 30
#: With more classes than this there is no picture of the confusions, and more than that has no numbers in it.
CONFUSED, NUMBERED = 24, 12


def group_keys(groups: Sequence[GroupPlan]) -> tuple[Key, ...]:
    """Return the legend of `channels`."""
    kinds = [kind for kind in KIND_COLORS if any(group.kind == kind for group in groups)]
    after = [Key(name=f"{kind}, after", color=KIND_COLORS[kind], mark="box") for kind in kinds]
    return (Key(name="before", color="track", mark="box"), *after)


def tradeoff_keys(runs: Sequence[Run]) -> tuple[Key, ...]:
    """Return the legend of `tradeoff`."""
    archs = dict.fromkeys(run.arch.ref for run in runs if run.stages)
    return tuple(
        key
        for i, arch in enumerate(archs)
        for key in (
            Key(name=f"{arch}, dense", color=color_of(i), mark="ring"),
            Key(name=f"{arch}, pruned", color=color_of(i), mark="dot"),
        )
    )


def stages(run: Run) -> Plot:
    """Return top-1 after each stage with its 95 % interval; the dense network's level runs through."""
    values = [result.evaluation for result in run.stages]
    top1 = [100 * value.top1 for value in values]
    dots = tuple(
        Dot(
            x=i,
            y=top1[i],
            low=100 * value.top1_ci95[0],
            high=100 * value.top1_ci95[1],
            color=GAIN,
            label=text.percent(value.top1, 2) if len(values) <= 8 else "",
            side="above" if top1[i] >= top1[0] else "below",
            tip=f"{run.stages[i].label}: top-1 {text.percent(value.top1, 2)}, 95 % interval "
            f"{text.interval(value.top1_ci95)}",
        )
        for i, value in enumerate(values)
    )
    line = Line(xs=tuple(float(i) for i in range(len(values))), ys=tuple(top1), name="top-1", color="muted")
    last = len(values) - 0.5
    return Plot(
        height=280,
        x=Axis(low=-0.5, high=last, ticks=tuple((float(i), r.label) for i, r in enumerate(run.stages))),
        y=scale(*_padded(min(top1), max(top1)), title="top-1, %", grid=True),
        marks=(line, *dots),
        levels=(top1[0],),
        grain=0.01,
    )


def _padded(low: float, high: float) -> tuple[float, float]:
    space = max(0.4, 0.2 * (high - low))
    return max(0.0, low - space), high + space


def channels(groups: Sequence[GroupPlan]) -> Plot:
    """Return one bar a group: the dense width as a pale track, what is kept in the colour of its kind."""
    bars: list[Mark] = []
    for row, group in enumerate(groups):
        kept = kept_channels(group)
        tip = f"{group.name} ({group.kind}): {kept} of {group.channels} channels kept"
        tip += f"; {group.note}" if group.note else ""
        bars += [
            Bar(row=row, start=0, end=100, color="track", tip=tip, label=f"{kept} of {group.channels}"),
            Bar(row=row, start=0, end=100 * kept / group.channels, color=KIND_COLORS[group.kind], tip=tip),
        ]
    rows = [group.name for group in groups]
    return Plot(
        height=(22 if len(groups) <= 40 else 16) * len(groups),
        x=Axis(low=0, high=100, ticks=nice(0, 100, 4), title="channels kept, %"),
        y=names(rows),
        marks=tuple(bars),
        left=margin(rows),
        right=84,
    )


def parts(run: Run, unit: str) -> Plot | None:
    """Return one bar for the dense and one for the pruned network, in pieces: where the MACs or the time go.

    Args:
        run: The record.
        unit: `MACs` or `ms`.
    """
    both = changes.part_sums(run, unit)
    if both is None:
        return None
    order, sums = list(both), list(zip(*both.values(), strict=True))
    whole = sum(sums[0])
    bars: list[Bar] = []
    for row, (name, values) in enumerate(zip(("dense", "pruned"), sums, strict=True)):
        start = 0.0
        for i, value in enumerate(values):
            shown = text.milliseconds(value) if unit == "ms" else f"{text.scaled(value)} MACs"
            bars.append(
                Bar(
                    row=row,
                    start=start,
                    end=start + value,
                    color=color_of(i),
                    tip=f"{name}, {order[i]}: {shown}, {text.share(value, sum(values))}",
                )
            )
            start += value
        total = text.milliseconds(start) if unit == "ms" else text.scaled(start)
        bars[-1] = replace(bars[-1], label=total)
    factor, title = (1.0, "milliseconds") if unit == "ms" else _macs_unit(whole)
    ticks = tuple((value * factor, label) for value, label in nice(0, 1.02 * whole / factor))
    high = 1.02 * max(sum(values) for values in sums)
    return Plot(
        height=90,
        x=Axis(low=0, high=high, ticks=ticks, title=title),
        y=names(("dense", "pruned")),
        marks=tuple(bars),
        left=64,
        right=84,
    )


def part_keys(run: Run, unit: str) -> tuple[Key, ...]:
    """Return the legend of `parts`."""
    return tuple(
        Key(name=name, color=color_of(i), mark="box")
        for i, name in enumerate(changes.part_sums(run, unit) or ())
    )


def _macs_unit(macs: float) -> tuple[float, str]:
    return (1e9, "MACs, billions") if macs >= 1e9 else (1e6, "MACs, millions")


def classes(run: Run) -> Plot:
    """Return one bar a class: the change of its accuracy from dense to the last stage, in points."""
    found = changes.class_changes(run)
    if len(found) > CLASS_BARS:
        found = found[: CLASS_BARS // 2] + found[-(CLASS_BARS // 2) :]
    bars = []
    for row, change in enumerate(found):
        points = text.points(change.difference, 1)
        interval = None if change.interval is None else [100 * end for end in change.interval]
        tip = f"{change.name}: {text.percent(change.dense)} → {text.percent(change.last)}, {points}"
        if interval is not None and change.interval is not None:
            tip += f" (95 % interval {text.points_interval(change.interval)}, {change.n} images)"
        bars.append(
            Bar(
                row=row,
                start=0,
                end=100 * change.difference,
                low=None if interval is None else interval[0],
                high=None if interval is None else interval[1],
                color=LOSS if change.difference < 0 else GAIN,
                label=points.removesuffix(" points"),
                tip=tip,
            )
        )
    ends = [abs(v) for bar in bars for v in (bar.end, bar.low, bar.high) if v is not None]
    reach = 1.5 * max(0.5, *ends)
    rows = [change.name for change in found]
    return Plot(
        height=24 * len(found),
        x=scale(-reach, reach, title="change of accuracy, points", grid=True),
        y=names(rows),
        marks=tuple(bars),
        left=margin(rows),
    )


def confusion(run: Run) -> Plot | None:
    """Return a table of colours: how many more images of a class (row) get an answer (column) than before.

    What is worse (fewer right answers, more of a wrong one) has the colour of a loss. None for many classes.
    """
    found = changes.confusions(run)
    if not found or len(run.classes) > CONFUSED:
        return None
    most = max(1, *(abs(item.last - item.dense) for item in found))
    cells = []
    for item in found:
        change = item.last - item.dense
        worse = change > 0 if item.label != item.answer else change < 0
        label, answer = (changes.class_name(run, number) for number in (item.label, item.answer))
        cells.append(
            Cell(
                x=item.answer,
                y=item.label,
                color=LOSS if worse else GAIN,
                strength=0.65 * math.sqrt(abs(change) / most),
                label=f"{change:+d}".replace("-", "−") if change and len(run.classes) <= NUMBERED else "",
                tip=f"{label}, answered {answer}: {text.count(item.dense)} → {text.count(item.last)} images",
            )
        )
    x = names(run.classes)
    return Plot(
        height=30 * len(run.classes),
        x=Axis(low=x.high, high=x.low, ticks=x.ticks, title="answer"),
        y=replace(x, title="label"),
        marks=tuple(cells),
        left=margin(run.classes),
    )


def tradeoff(runs: Sequence[Run], unit: str) -> Plot | None:
    """Return top-1 against MACs or latency: a dot with its number for each run, an open one for each dense network.

    A line joins the points that no other one beats in both. A latency is the lowest median of the dense network over
    the runs, over how much faster a run's network was than it in the same rounds: what else the machine did cancels
    out.

    Args:
        runs: The records.
        unit: `MACs` or `ms`.
    """
    points = _tradeoff_points(runs, unit)
    if not points:
        return None
    largest = max(dot.x for dot in points)
    factor, title = (1.0, "latency, ms") if unit == "ms" else _macs_unit(largest)
    points = [replace(dot, x=dot.x / factor) for dot in points]
    ys = [value for dot in points for value in (dot.low, dot.high) if value is not None]
    front = _front(points)
    high = 1.08 * largest / factor
    line = Line(
        xs=tuple(d.x for d in front), ys=tuple(d.y for d in front), name="front", color="rule", width=1.5
    )
    return Plot(
        height=340,
        x=scale(0, high, title=title),
        y=scale(*_padded(min(ys), max(ys)), title="top-1, %", grid=True),
        marks=(line, *points),
        zoom="xy",
        grain=high / 2000,
    )


def _front(points: Sequence[Dot]) -> list[Dot]:
    """Return the points that are best for what they cost, cheapest first."""
    best: list[Dot] = []
    for dot in sorted(points, key=lambda dot: (dot.x, -dot.y)):
        if not best or dot.y > best[-1].y:
            best.append(dot)
    return best


def _tradeoff_points(runs: Sequence[Run], unit: str) -> list[Dot]:
    numbered = [(i, run) for i, run in enumerate(runs, start=1) if run.stages]
    if unit == "ms":
        conditions = timed_alike(runs)
        numbered = [(i, run) for i, run in numbered if conditions and conditions_of(run) == conditions]
    points: list[Dot] = []
    for i, arch in enumerate(dict.fromkeys(run.arch.ref for _, run in numbered)):
        own = [(number, run) for number, run in numbered if run.arch.ref == arch]
        base = min((run.latency[0].median_ms for _, run in own if run.latency), default=0.0)
        dense: dict[tuple[float, float], Dot] = {}
        for number, run in own:
            first, last = run.stages[0].evaluation, run.stages[-1].evaluation
            if unit == "ms":
                assert run.latency is not None, "only timed runs are shown"
                costs = base, base / run.latency[1].ratio
            else:
                costs = float(run.cost_before.macs), float(run.cost_after.macs)
            style: dict[str, Any] = {"color": color_of(i), "unit": unit}
            dense.setdefault((costs[0], first.top1), _point(f"{arch}, dense", first, costs[0], **style))
            points.append(_point(run.name, last, costs[1], **style, number=number))
        points += dense.values()
    return points


def conditions_of(run: Run) -> tuple[str, str, int, int] | None:
    """Return where and how the pruned network of a run was timed."""
    if run.latency is None:
        return None
    value = run.latency[1]
    return value.runtime, value.device, value.threads, value.batch_size


def timed_alike(runs: Sequence[Run]) -> tuple[str, str, int, int] | None:
    """Return the conditions under which most runs were timed; only those compare."""
    known = [conditions for run in runs if (conditions := conditions_of(run)) is not None and run.stages]
    return max(known, key=known.count) if known else None


def _point(
    name: str, value: Evaluation, cost: float, *, color: str, unit: str, number: int | None = None
) -> Dot:
    shown = text.milliseconds(cost) if unit == "ms" else f"{text.scaled(cost)} MACs"
    return Dot(
        x=cost,
        y=100 * value.top1,
        low=100 * value.top1_ci95[0],
        high=100 * value.top1_ci95[1],
        color=color,
        label="" if number is None else str(number),
        open=number is None,
        tip=f"{name}: {shown}, top-1 {text.percent(value.top1, 2)} ({text.interval(value.top1_ci95)})",
    )
