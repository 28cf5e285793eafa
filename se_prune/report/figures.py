"""The figures of a report, as Plotly specs: plain JSON that the page draws.

Colours are the page's CSS variables, which the page's script resolves, so that the same spec is drawn light,
dark and printed. Plotly reads text as a small HTML: every string of a record is escaped with `label`.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go

from se_prune import text
from se_prune.records import GroupPlan
from se_prune.report.tables import class_changes, kept_channels
from se_prune.results import Evaluation, GateProfile, Run

Spec = dict[str, Any]

INK, MUTED, RULE, TRACK, BAND = (f"var(--{name})" for name in ("ink", "muted", "rule", "track", "band"))
GAIN, LOSS = "var(--blue)", "var(--vermillion)"
KIND_COLORS = {
    "stream": "var(--blue)",
    "inner": "var(--green)",
    "gated": "var(--orange)",
    "hidden": "var(--purple)",
}
LINES = ("blue", "orange", "green", "vermillion", "purple", "sky", "yellow", "grey")
DASHES = ("solid", "dot", "dash")
MARKS: dict[str, Literal["solid", "dotted", "dashed"]] = {"solid": "solid", "dot": "dotted", "dash": "dashed"}
MEAN = "mean of all classes"
#: Of more classes than this, a figure of classes shows both ends of the ranking.
CLASS_BARS = 30
#: More lines than this in one gate profile cannot be told apart.
MAX_LINES = 12
#: Of 16-bit gates, the one that means "no value".
NO_VALUE = 65535
#: Base64 characters of one 16-bit gate.
CHARS_PER_GATE = 8 / 3


def label(name: str) -> str:
    """Return a string of a record as Plotly text, with nothing in it that Plotly would read as markup."""
    return html.escape(name, quote=False)


def color_of(index: int) -> str:
    """Return the colour of the line or point number `index`."""
    return f"var(--{LINES[index % len(LINES)]})"


def dash_of(index: int) -> str:
    """Return the dash of line number `index`; it changes where the colours repeat."""
    return DASHES[index // len(LINES) % len(DASHES)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One entry of a legend: a name, the colour and the mark that stand for it."""

    name: str
    color: str
    mark: Literal["box", "dot", "diamond", "solid", "dotted", "dashed", "bold"]


def group_keys(groups: Sequence[GroupPlan]) -> tuple[Key, ...]:
    """Return the legend of `channels`."""
    kinds = [kind for kind in KIND_COLORS if any(group.kind == kind for group in groups)]
    after = [Key(name=f"{kind}, after", color=KIND_COLORS[kind], mark="box") for kind in kinds]
    return (Key(name="before", color=TRACK, mark="box"), *after)


def class_keys(names: Sequence[str]) -> tuple[Key, ...]:
    """Return the legend of `gate_profile` for its classes."""
    return tuple(Key(name=name, color=color_of(i), mark=MARKS[dash_of(i)]) for i, name in enumerate(names))


def mean_key() -> Key:
    """Return the legend of the bold line of `gate_profile`."""
    return Key(name=MEAN, color=INK, mark="bold")


def tradeoff_keys(runs: Sequence[Run]) -> tuple[Key, ...]:
    """Return the legend of `tradeoff`."""
    archs = dict.fromkeys(run.arch.ref for run in runs if run.stages)
    return tuple(
        key
        for i, arch in enumerate(archs)
        for key in (
            Key(name=f"{arch}, dense", color=color_of(i), mark="diamond"),
            Key(name=f"{arch}, pruned", color=color_of(i), mark="dot"),
        )
    )


def stages(run: Run) -> Spec:
    """Return top-1 after each stage with its 95 % interval; the dense network's level runs through."""
    values = [result.evaluation for result in run.stages]
    names = [label(result.label) for result in run.stages]
    top1 = [100 * value.top1 for value in values]
    line = go.Scatter(
        x=names,
        y=top1,
        mode="lines+markers+text",
        text=[text.percent(value.top1, 2) for value in values],
        textposition=["top center" if y >= top1[0] else "bottom center" for y in top1],
        line={"color": MUTED, "width": 1.5},
        marker={"color": GAIN, "size": 10},
        error_y=_error_bars(values, GAIN),
        customdata=[text.interval(value.top1_ci95) for value in values],
        hovertemplate="%{x}<br>top-1 %{text}<br>95 % interval %{customdata}<extra></extra>",
        cliponaxis=False,
    )
    figure = go.Figure(line, layout=_layout(height=340))
    figure.add_hline(y=top1[0], line={"color": MUTED, "width": 1, "dash": "dot"})
    figure.update_xaxes(type="category", range=[-0.5, len(values) - 0.5], showgrid=False)
    figure.update_yaxes(title_text="top-1, %", range=_padded(min(top1), max(top1)))
    return _spec(figure)


def _padded(low: float, high: float) -> list[float]:
    margin = max(0.4, 0.2 * (high - low))
    return [max(0.0, low - margin), high + margin]


def channels(groups: Sequence[GroupPlan]) -> Spec:
    """Return one bar a group: the dense width as a pale track, what is kept in the colour of its kind."""
    names = [label(group.name) for group in groups]
    kept = [kept_channels(group) for group in groups]
    track = go.Bar(
        y=names,
        x=[100] * len(groups),
        text=[f"{k} of {group.channels}" for k, group in zip(kept, groups, strict=True)],
        textposition="outside",
        marker={"color": TRACK, "line": {"width": 0}},
        hoverinfo="skip",
        orientation="h",
        cliponaxis=False,
    )
    figure = go.Figure(track)
    for kind, color in KIND_COLORS.items():
        chosen = [i for i, group in enumerate(groups) if group.kind == kind]
        if chosen:
            figure.add_bar(
                y=[names[i] for i in chosen],
                x=[100 * kept[i] / groups[i].channels for i in chosen],
                marker={"color": color, "line": {"width": 0}},
                customdata=[[track.text[i], _note(groups[i])] for i in chosen],
                hovertemplate=f"%{{y}} ({kind})<br>%{{customdata[0]}} channels kept%{{customdata[1]}}<extra></extra>",
                orientation="h",
            )
    row = 24 if len(groups) <= 40 else 16
    figure.update_layout(_layout(height=row * len(groups) + 120), barmode="overlay", bargap=0.3, margin_r=72)
    figure.update_xaxes(
        range=[0, 100], tickvals=[0, 25, 50, 75, 100], title_text="channels kept, %", showgrid=False
    )
    _name_axis(figure, names)
    return _spec(figure)


def _note(group: GroupPlan) -> str:
    return f"<br>{label(group.note)}" if group.note else ""


def _name_axis(figure: go.Figure, names: Sequence[str]) -> None:
    """List names from the top down, every one of them, however many there are."""
    figure.update_yaxes(
        type="category",
        categoryorder="array",
        categoryarray=list(names),
        autorange="reversed",
        dtick=1,
        showgrid=False,
        ticks="",
        ticklabelstandoff=6,
    )


def classes(run: Run) -> Spec:
    """Return one bar a class: the change of its accuracy from dense to the last stage, in points."""
    changes = class_changes(run)
    if len(changes) > CLASS_BARS:
        changes = changes[: CLASS_BARS // 2] + changes[-(CLASS_BARS // 2) :]
    names = [label(name) for name, _, _ in changes]
    points = [100 * (last - dense) for _, dense, last in changes]
    bars = go.Bar(
        y=names,
        x=points,
        text=[text.points(value / 100, 1).removesuffix(" points") for value in points],
        textposition="outside",
        marker={"color": [LOSS if value < 0 else GAIN for value in points], "line": {"width": 0}},
        customdata=[[text.percent(dense), text.percent(last)] for _, dense, last in changes],
        hovertemplate="%{y}<br>%{customdata[0]} → %{customdata[1]}<br>%{text} points<extra></extra>",
        orientation="h",
        cliponaxis=False,
    )
    figure = go.Figure(bars, layout=_layout(height=24 * len(changes) + 90))
    reach = 1.5 * max(0.5, *(abs(value) for value in points))
    figure.update_xaxes(range=[-reach, reach], title_text="change of accuracy, points", zeroline=True)
    _name_axis(figure, names)
    return _spec(figure)


def lively_site(profiles: Sequence[GateProfile]) -> int:
    """Return the index of the site whose gates differ most between classes (root mean square from their mean)."""
    spreads = [
        np.mean(
            [(np.asarray(gates) - np.asarray(profile.mean)) ** 2 for gates in profile.per_class.values()]
            or [0.0]
        )
        for profile in profiles
    ]
    return int(np.argmax(spreads))


def lively_classes(profiles: Sequence[GateProfile], limit: int) -> list[str]:
    """Return at most `limit` classes in the order of the record: those whose gates differ most from the mean.

    The distance is the root mean square over the channels of all sites, so that every site shows the same
    classes in the same colours.
    """
    squares: dict[str, float] = {}
    for profile in profiles:
        mean = np.asarray(profile.mean)
        for name, gates in profile.per_class.items():
            squares[name] = squares.get(name, 0.0) + float(((np.asarray(gates) - mean) ** 2).sum())
    if len(squares) <= limit:
        return list(squares)
    chosen = set(sorted(squares, key=lambda name: -squares[name])[:limit])
    return [name for name in squares if name in chosen]


def gate_profile(profile: GateProfile, names: Sequence[str]) -> Spec:
    """Return one site's gate by channel, a line a class and the bold mean over all classes (Figure 5 of the paper).

    The pale band is the mean plus and minus one standard deviation over images.
    """
    mean, std = np.asarray(profile.mean), np.asarray(profile.std)
    bold = 3.0 if len(mean) <= 128 else 2.0 if len(mean) <= 512 else 1.5
    edges = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
    traces = [
        go.Scatter(y=mean - std, name="low", **edges),
        go.Scatter(y=mean + std, name="high", fill="tonexty", fillcolor=BAND, **edges),
    ]
    for i, name in enumerate(names):
        if name in profile.per_class:
            style = {
                "color": f"var(--{LINES[i % len(LINES)]})",
                "dash": DASHES[i // len(LINES) % len(DASHES)],
            }
            traces.append(
                _profile_line(np.asarray(profile.per_class[name]), name, {**style, "width": 0.45 * bold})
            )
            traces[-1].meta = {"class": i}
    traces.append(_profile_line(mean, MEAN, {"color": INK, "width": bold}))
    lines = np.concatenate([trace.y for trace in traces[2:]])
    figure = go.Figure(traces, layout=_layout(height=430))
    figure.update_xaxes(title_text="channel index", range=[-0.5, len(mean) - 0.5], showgrid=False)
    figure.update_yaxes(
        title_text="gate", range=[min(0.0, float(lines.min())), max(1.02, float(lines.max()))]
    )
    return _packed(_spec(figure), [np.asarray(trace.y, dtype=np.float64) for trace in traces])


def _profile_line(gates: np.ndarray, name: str, style: dict[str, Any]) -> go.Scatter:
    hover = "channel %{x}<br>%{fullData.name}<br>gate %{y:.3f}<extra></extra>"
    return go.Scatter(y=gates, name=label(name), mode="lines", line=style, hovertemplate=hover)


def _packed(spec: Spec, curves: Sequence[np.ndarray]) -> Spec:
    """Replace each curve by 16-bit steps of its range in base64, which the page's script reads."""
    for trace, curve in zip(spec["data"], curves, strict=True):
        finite = curve[np.isfinite(curve)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
        step = (high - low) / (NO_VALUE - 1) or 1.0
        steps = np.where(np.isfinite(curve), np.round((np.nan_to_num(curve) - low) / step), NO_VALUE)
        trace["y"] = {
            "u16": base64.b64encode(steps.astype("<u2").tobytes()).decode(),
            "low": low,
            "step": step,
        }
    return spec


def tradeoff(runs: Sequence[Run]) -> Spec:
    """Return top-1 against MACs: a dot with its number for each run, an open diamond for each dense network."""
    unit = "billions" if max(run.cost_before.macs for run in runs) >= 1e9 else "millions"
    measured = [(i, run) for i, run in enumerate(runs, start=1) if run.stages]
    figure = go.Figure(layout=_layout(height=420))
    for i, arch in enumerate(dict.fromkeys(run.arch.ref for _, run in measured)):
        own = [(number, run) for number, run in measured if run.arch.ref == arch]
        dense = {(run.cost_before.macs, run.stages[0].evaluation.top1): (number, run) for number, run in own}
        color = color_of(i)
        figure.add_trace(_tradeoff_points(list(dense.values()), unit, color, pruned=False))
        figure.add_trace(_tradeoff_points(own, unit, color, pruned=True))
    reach = 1.08 * max(max(trace.x) for trace in figure.data)
    figure.update_xaxes(title_text=f"MACs, {unit}", range=[0, reach])
    figure.update_yaxes(title_text="top-1, %")
    return _spec(figure)


def _tradeoff_points(runs: Sequence[tuple[int, Run]], unit: str, color: str, *, pruned: bool) -> go.Scatter:
    """Return the points of numbered runs of one architecture."""
    values = [run.stages[-1 if pruned else 0].evaluation for _, run in runs]
    costs = [run.cost_after if pruned else run.cost_before for _, run in runs]
    return go.Scatter(
        x=[cost.macs / (1e9 if unit == "billions" else 1e6) for cost in costs],
        y=[100 * value.top1 for value in values],
        mode="markers+text" if pruned else "markers",
        text=[str(number) for number, _ in runs],
        textposition="middle right",
        marker={"color": color, "size": 11, "symbol": "circle" if pruned else "diamond-open"},
        error_y=_error_bars(values, color),
        customdata=[label(run.name) if pruned else "dense" for _, run in runs],
        hovertemplate=f"%{{customdata}}<br>%{{x:.4g}} {unit} of MACs<br>top-1 %{{y:.2f}} %<extra></extra>",
        cliponaxis=False,
    )


def _error_bars(values: Sequence[Evaluation], color: str) -> dict[str, Any]:
    """Return the 95 % intervals of top-1 as Plotly's asymmetric error bars, in percent."""
    return {
        "array": [100 * (value.top1_ci95[1] - value.top1) for value in values],
        "arrayminus": [100 * (value.top1 - value.top1_ci95[0]) for value in values],
        "color": color,
        "thickness": 1.5,
        "width": 5,
    }


def _layout(*, height: int) -> go.Layout:
    """Return the layout that all figures share: no frame and few grid lines; the page writes the legend."""
    axis = {
        "gridcolor": RULE,
        "zerolinecolor": RULE,
        "linecolor": RULE,
        "zeroline": False,
        "fixedrange": True,
        "automargin": True,
        "title": {"font": {"size": 13, "color": MUTED}},
    }
    return go.Layout(
        template="none",
        height=height,
        margin={"l": 8, "r": 16, "t": 16, "b": 8},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13, "color": INK},
        hoverlabel={"bgcolor": "var(--panel)", "bordercolor": RULE, "font": {"color": INK}},
        showlegend=False,
        hovermode="closest",
        xaxis=axis,
        yaxis=axis,
    )


def _spec(figure: go.Figure) -> Spec:
    """Return plain JSON of a figure; numbers that are not finite become null."""
    return dict(json.loads(figure.to_json()))
