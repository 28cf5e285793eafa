"""The paper's figures of gates: by channel and class (Figure 5), their spread within classes, and against depth."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from se_prune.report.plot import Axis, Band, Dot, Key, Line, Mark, Plot, color_of, dash_of, nice, scale
from se_prune.results import GateProfile, SiteSummary

MEAN = "mean of all classes"
#: More lines than this in one gate profile cannot be told apart.
MAX_LINES = 12
#: Classes of one file of within-class spreads.
WITHIN = 4
#: Characters of the page that one gate of a line takes, amply, and what its spread adds.
CHARS_PER_GATE, CHARS_PER_SPREAD = 5.5, 1.4


def class_keys(chosen: Sequence[str]) -> tuple[Key, ...]:
    """Return the legend of `gate_profile` for its classes."""
    return tuple(Key(name=name, color=color_of(i), mark=dash_of(i)) for i, name in enumerate(chosen))


def mean_key() -> Key:
    """Return the legend of the bold line of `gate_profile`."""
    return Key(name=MEAN, color="ink", mark="bold")


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


def _gate_axes(profile: GateProfile, dense: int) -> tuple[Axis, Axis]:
    values = np.concatenate([np.asarray(profile.mean), *(np.asarray(g) for g in profile.per_class.values())])
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    x = Axis(low=-0.5, high=dense - 0.5, ticks=nice(0, dense - 1, 8), title="channel index")
    return x, scale(min(0.0, low), max(1.02, high), title="gate", grid=True)


def gate_profile(
    profile: GateProfile, chosen: Sequence[str], *, dense: int | None = None, subtitle: str = ""
) -> Plot:
    """Return one site's gate by channel, a line a class and the bold mean over all classes (Figure 5 of the paper).

    The pale band is the mean plus and minus one standard deviation over images.

    Args:
        profile: The gate.
        chosen: Names of classes.
        dense: Channels that the site has in the dense network, where this is a cut one.
        subtitle: Which network it is.
    """
    x, y = _gate_axes(profile, dense or len(profile.mean))
    xs = tuple(float(i) for i in (profile.channels or range(len(profile.mean))))
    width = 2.5 if len(xs) <= 128 else 2.0 if len(xs) <= 512 else 1.5
    low, high = (_edge(profile.mean, profile.std, sign, y) for sign in (-1, 1))
    lines = [
        Line(
            xs=xs,
            ys=profile.per_class[name],
            name=name,
            color=color_of(i),
            dash=dash_of(i),
            width=0.5 * width,
            choice=i,
            spread=profile.per_class_std.get(name, ()),
        )
        for i, name in enumerate(chosen)
        if name in profile.per_class
    ]
    band = _band(xs, low, high)
    mean = Line(xs=xs, ys=profile.mean, name=MEAN, color="ink", width=width)
    return Plot(
        height=320,
        x=x,
        y=y,
        marks=(*band, *lines, mean),
        zoom="x",
        unit=("channel", "gate"),
        subtitle=subtitle,
    )


def _edge(gates: Sequence[float], std: Sequence[float], sign: int, y: Axis) -> tuple[float, ...]:
    """Return one edge of a band of one standard deviation, within the axis."""
    return tuple(min(y.high, max(y.low, g + sign * s)) for g, s in zip(gates, std, strict=True))


def _band(xs: tuple[float, ...], low: tuple[float, ...], high: tuple[float, ...]) -> tuple[Band, ...]:
    """Return a band without the points that are no numbers."""
    kept = [i for i in range(len(xs)) if math.isfinite(low[i]) and math.isfinite(high[i])]
    if not kept:
        return ()
    return (
        Band(
            xs=tuple(xs[i] for i in kept), low=tuple(low[i] for i in kept), high=tuple(high[i] for i in kept)
        ),
    )


def within(profile: GateProfile, chosen: Sequence[str], *, dense: int | None = None) -> tuple[Plot, ...]:
    """Return the mean and spread of one site's gate within each class, a plot a class."""
    x, y = _gate_axes(profile, dense or len(profile.mean))
    xs = tuple(float(i) for i in (profile.channels or range(len(profile.mean))))
    plots = []
    for i, name in enumerate(chosen[:WITHIN]):
        if name not in profile.per_class_std:
            continue
        gates, std = profile.per_class[name], profile.per_class_std[name]
        low, high = (_edge(gates, std, sign, y) for sign in (-1, 1))
        line = Line(xs=xs, ys=gates, name=name, color=color_of(i))
        plots.append(Plot(height=150, x=x, y=y, marks=(*_band(xs, low, high), line), subtitle=name))
    return tuple(plots)


def depth(before: Sequence[SiteSummary], after: Sequence[SiteSummary], what: str) -> Plot:
    """Return a property of every gate site against its depth: the dense network, and dashed the pruned one.

    Args:
        before: Sites of the dense network, in their order.
        after: Those of the pruned network; folded ones are missing.
        what: `class_specificity` or `saturated`.
    """
    place = {site.name: float(i) for i, site in enumerate(before)}
    title = {"class_specificity": "class specificity, %", "saturated": "saturated gates, %"}[what]
    marks: list[Mark] = []
    for name, sites, color in (("dense", before, "blue"), ("pruned", after, "vermillion")):
        known = [site for site in sites if site.name in place]
        xs, ys = tuple(place[s.name] for s in known), tuple(100 * float(getattr(s, what)) for s in known)
        if known:
            marks.append(
                Line(xs=xs, ys=ys, name=name, color=color, dash="dashed" if name == "pruned" else "solid")
            )
            marks += [
                Dot(x=x, y=y, color=color, open=name == "pruned", tip=f"{site.name}, {name}: {y:.1f} %")
                for x, y, site in zip(xs, ys, known, strict=True)
            ]
    step = max(1, math.ceil(len(before) / 16))
    ticks = tuple((float(i), site.name) for i, site in enumerate(before) if i % step == 0)
    top = max(1.0, *(mark.y for mark in marks if isinstance(mark, Dot)))
    return Plot(
        height=220,
        x=Axis(low=-0.5, high=len(before) - 0.5, ticks=ticks),
        y=scale(0, min(105.0, 1.15 * top), title=title, grid=True),
        marks=tuple(marks),
        grain=0.01,
    )


def depth_keys(after: Sequence[SiteSummary]) -> tuple[Key, ...]:
    """Return the legend of `depth`."""
    dense = Key(name="dense", color="blue", mark="solid")
    return (dense, Key(name="pruned", color="vermillion", mark="dashed")) if after else (dense,)
