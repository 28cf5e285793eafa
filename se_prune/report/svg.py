"""Plots as SVG: inline in a page, whose width they take, or as files of a fixed size.

Inline, places are percentages of the area between the axes, which the page's script moves when the reader zooms;
lines are paths in whole steps of `STEPS` along y, which the script reads back as numbers. Text of records is escaped.
"""

from __future__ import annotations

import base64
import math
import textwrap
from collections.abc import Iterator, Sequence
from html import escape
from typing import Protocol

from markupsafe import Markup

from se_prune.report.plot import (
    CHAR,
    LONGEST,
    PALETTE,
    Band,
    Bar,
    Cell,
    Dot,
    Key,
    Line,
    Mark,
    Plot,
    shortened,
)

#: Steps of a line along the y axis.
STEPS = 1000
TOP, BOTTOM = 24, 46
#: The size of a file: pixels across, and the height of its title and of each row of its legend.
WIDTH, TITLE, ROW = 900, 22, 22
TITLE_LINE = 100
FONT = "system-ui, 'DejaVu Sans', Arial, sans-serif"
DASHED = {"solid": "", "dotted": "2 3", "dashed": "7 4"}


class Frame(Protocol):
    """Where things are: along x and y as fractions of the area between the axes, from the left and the top."""

    def x(self, fraction: float) -> str:
        """Return a place along x."""
        ...

    def y(self, fraction: float) -> str:
        """Return a place along y."""
        ...

    def across(self, fraction: float) -> str:
        """Return a length along x."""
        ...

    def down(self, fraction: float) -> str:
        """Return a length along y."""
        ...

    def color(self, name: str) -> str:
        """Return a colour of the palette."""
        ...

    def path(self, plot: Plot, xs: Sequence[float], ys: Sequence[float]) -> str:
        """Return the `d` of a line."""
        ...


class Inline:
    """The frame of a plot in the page."""

    def x(self, fraction: float) -> str:
        """Return percent of the width."""
        return f"{100 * fraction:.2f}%"

    y = across = down = x

    def color(self, name: str) -> str:
        """Return the page's variable, which knows light from dark."""
        return f"var(--{name})"

    def path(self, plot: Plot, xs: Sequence[float], ys: Sequence[float]) -> str:
        """Return a path in units of x and `STEPS` of y, its points relative to the one before."""
        return _relative([(round(x / plot.grain), _step(plot, y)) for x, y in zip(xs, ys, strict=True)])


def _step(plot: Plot, y: float) -> int | None:
    return round(STEPS * (1 - plot.y.place(y))) if math.isfinite(y) else None


def _relative(points: Sequence[tuple[int, int | None]]) -> str:
    """Return a path whose points are relative to the one before; a missing y is a gap."""
    parts: list[str] = []
    x0 = y0 = 0
    command = "M"
    for x, y in points:
        if y is None:
            command = "m" if parts else "M"
            continue
        dy = y - y0
        parts.append(f"{command}{x - x0}{'' if dy < 0 else ' '}{dy}")
        command = "l" if command in "Mm" else ","
        x0, y0 = x, y
    return "".join(parts)


class Fixed:
    """The frame of a plot in a file: pixels, and the light colours."""

    def __init__(self, left: float, top: float, width: float, height: float) -> None:
        self.left, self.top, self.width, self.height = left, top, width, height

    def x(self, fraction: float) -> str:
        """Return pixels from the left."""
        return f"{self.left + fraction * self.width:.1f}"

    def y(self, fraction: float) -> str:
        """Return pixels from the top."""
        return f"{self.top + fraction * self.height:.1f}"

    def across(self, fraction: float) -> str:
        """Return pixels."""
        return f"{fraction * self.width:.1f}"

    def down(self, fraction: float) -> str:
        """Return pixels."""
        return f"{fraction * self.height:.1f}"

    def color(self, name: str) -> str:
        """Return the light colour."""
        return PALETTE[name][0]

    def path(self, plot: Plot, xs: Sequence[float], ys: Sequence[float]) -> str:
        """Return a path in pixels."""
        parts, pen = [], "M"
        for x, y in zip(xs, ys, strict=True):
            if not math.isfinite(y):
                pen = "M"
                continue
            parts.append(f"{pen}{self.x(plot.x.place(x))} {self.y(1 - plot.y.place(y))}")
            pen = "L"
        return "".join(parts)


def inline(plot: Plot, description: str) -> Markup:
    """Return a plot for the page: a box with its margins, and in it an SVG that takes the width there is."""
    frame = Inline()
    x, y = plot.x, plot.y
    lines = "".join(_curve(plot, frame, mark) for mark in plot.marks if isinstance(mark, Line | Band))
    marks = "".join(_mark(plot, frame, mark) for mark in plot.marks if not isinstance(mark, Line | Band))
    view = f"{x.low / plot.grain:g} 0 {(x.high - x.low) / plot.grain:g} {STEPS}"
    data = f' data-zoom="{plot.zoom}" data-grain="{plot.grain:g}" data-x="{x.low:g} {x.high:g}"'
    data += f' data-y="{y.low:.6g} {y.high:.6g}"'
    units = f' data-units="{escape(plot.unit[0])}|{escape(plot.unit[1])}"'
    subtitle = f'<p class="subtitle">{escape(plot.subtitle)}</p>' if plot.subtitle else ""
    return Markup(  # noqa: S704 - every text in it is escaped
        f'{subtitle}<div class="plot" style="padding:{_top(plot)}px {plot.right}px {_bottom(plot)}px {plot.left}px">'
        f'<svg class="figure" style="height:{plot.height}px" tabindex="0" role="img" '
        f'aria-label="{escape(description)}"{data}{units}><g class="axes">{_axes(plot, frame)}</g>'
        f'<svg class="lines" viewBox="{view}" preserveAspectRatio="none" width="100%" height="100%">{lines}</svg>'
        f'<svg class="marks" width="100%" height="100%">{marks}</svg></svg></div>'
    )


def standalone(plots: Sequence[Plot], title: str, keys: Sequence[Key] = ()) -> str:
    """Return a file with plots below each other, a title and a legend."""
    legend, rows = _legend(keys)
    lines = textwrap.wrap(title, TITLE_LINE)
    shift = TITLE * (len(lines) - 1)
    top = 12.0 + TITLE * len(lines) + ROW * rows
    body = [
        f'<text x="16" y="{26 + TITLE * i}" font-size="15" font-weight="600">{escape(line)}</text>'
        for i, line in enumerate(lines)
    ]
    body.append(f'<g transform="translate(0 {shift})">{legend}</g>')
    for plot in plots:
        if plot.subtitle:
            body.append(f'<text x="16" y="{top + 14:.0f}" font-weight="600">{escape(plot.subtitle)}</text>')
            top += ROW
        frame = Fixed(plot.left + 12, top + _top(plot), WIDTH - plot.left - plot.right - 24, plot.height)
        body.append(_axes(plot, frame))
        body += [
            _curve(plot, frame, mark) if isinstance(mark, Line | Band) else _mark(plot, frame, mark)
            for mark in plot.marks
        ]
        top += _top(plot) + plot.height + _bottom(plot) + 8
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{top:.0f}" viewBox="0 0 {WIDTH} {top:.0f}" '
        f'font-family="{FONT}" font-size="12" fill="{PALETTE["ink"][0]}">'
        f'<rect width="100%" height="100%" fill="{PALETTE["bg"][0]}"/>{"".join(body)}</svg>\n'
    )


def _top(plot: Plot) -> int:
    return TOP if plot.y.title else 10


def _bottom(plot: Plot) -> int:
    if not plot.x.ticks:
        return 8
    return BOTTOM + 24 * _is_tilted(plot) if plot.x.title or _is_tilted(plot) else 26


def _is_tilted(plot: Plot) -> bool:
    """Say whether the names along x are too many to stand level."""
    return sum(len(name) for _, name in plot.x.ticks) > 36


def _legend(keys: Sequence[Key]) -> tuple[str, int]:
    """Return the legend of a file, and its rows."""
    parts, x, row = [], 16.0, 0
    for key in keys:
        width = 40 + CHAR * len(key.name)
        if x > 16 and x + width > WIDTH - 16:
            x, row = 16.0, row + 1
        y, color = TITLE + 14 + ROW * row, PALETTE[key.color][0]
        if key.mark in {"box", "dot", "ring"}:
            parts.append(f'<rect x="{x:.0f}" y="{y - 6}" width="12" height="12" rx="{0 if key.mark == "box" else 6}" '
                         f'fill="{"none" if key.mark == "ring" else color}" stroke="{color}"/>')  # fmt: skip
        else:
            dash = DASHED.get(key.mark, "")
            parts.append(f'<path d="M{x:.0f} {y}h20" stroke="{color}" stroke-width="{4 if key.mark == "bold" else 2}" '
                         f'stroke-dasharray="{dash or "none"}"/>')  # fmt: skip
        parts.append(f'<text x="{x + 26:.0f}" y="{y + 4}">{escape(key.name)}</text>')
        x += width
    return "".join(parts), row + 1 if keys else 0


def _axes(plot: Plot, frame: Frame) -> str:
    """Return ticks (the page's script writes those of a part that is looked at closer), levels and titles."""
    muted = f'style="fill:{frame.color("muted")}"'
    titles = ""
    if plot.y.title:
        titles += (
            f'<text x="{frame.x(0)}" y="{frame.y(0)}" dy="-9" dx="{-min(plot.left, 40)}" {muted}>'
            f"{escape(plot.y.title)}</text>"
        )
    if plot.x.title:
        titles += (
            f'<text x="{frame.x(0.5)}" y="{frame.y(1)}" dy="{38 + 24 * _is_tilted(plot)}" text-anchor="middle" '
            f"{muted}>{escape(plot.x.title)}</text>"
        )
    ticks = "".join(
        f'<g class="ticks-{name}">{"".join(found)}</g>'
        for name, found in (("y", _along_y(plot, frame)), ("x", _along_x(plot, frame)))
    )
    levels = "".join(_across(frame, 1 - plot.y.place(value), "muted", "2 3") for value in plot.levels)
    edge = _across(frame, 1, "rule") if plot.x.ticks else ""
    return f"{ticks}{levels}{edge}{titles}"


def _across(frame: Frame, fraction: float, color: str, dash: str = "") -> str:
    at = frame.y(fraction)
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<line x1="{frame.x(0)}" x2="{frame.x(1)}" y1="{at}" y2="{at}"{dashes} '
        f'style="stroke:{frame.color(color)}"/>'
    )


def _along_y(plot: Plot, frame: Frame) -> Iterator[str]:
    for value, name in plot.y.ticks:
        fraction = 1 - plot.y.place(value)
        if plot.y.grid:
            yield _across(frame, fraction, "rule")
        yield (
            f'<text x="{frame.x(0)}" y="{frame.y(fraction)}" dx="-8" dy=".32em" text-anchor="end">'
            f"{escape(shortened(name))}{_whole(name)}</text>"
        )


def _whole(name: str) -> str:
    return f"<title>{escape(name)}</title>" if len(name) > LONGEST else ""


def _along_x(plot: Plot, frame: Frame) -> Iterator[str]:
    bottom = frame.y(1)
    for value, name in plot.x.ticks:
        at = frame.x(plot.x.place(value))
        if plot.x.grid:
            yield (
                f'<line x1="{at}" x2="{at}" y1="{frame.y(0)}" y2="{bottom}" style="stroke:{frame.color("rule")}"/>'
            )
        place = f'x="{at}" y="{bottom}"'
        if _is_tilted(plot):
            yield (
                f'<svg {place} overflow="visible"><text transform="rotate(-32)" dy="14" dx="-4" text-anchor="end">'
                f"{escape(shortened(name))}{_whole(name)}</text></svg>"
            )
        else:
            yield f'<text {place} dy="1.4em" text-anchor="middle">{escape(name)}</text>'


def _curve(plot: Plot, frame: Frame, mark: Line | Band) -> str:
    if isinstance(mark, Band):
        edges = frame.path(plot, (*mark.xs, *reversed(mark.xs)), (*mark.low, *reversed(mark.high)))
        return f'<path class="band" d="{edges}z" style="fill:{frame.color(mark.color)}"/>'
    dash = f' stroke-dasharray="{DASHED[mark.dash]}"' if DASHED[mark.dash] else ""
    own = ""
    if isinstance(frame, Inline):
        own = f' class="curve" data-name="{escape(mark.name)}"'
        if mark.choice is not None:
            own += f' data-class="{mark.choice}"'
        if mark.spread:
            own += f' data-spread="{_bytes(plot, mark.spread)}"'
    return (
        f'<path{own} d="{frame.path(plot, mark.xs, mark.ys)}" fill="none"{dash} '
        f'style="stroke:{frame.color(mark.color)};stroke-width:{mark.width:g}"/>'
    )


def _bytes(plot: Plot, spread: Sequence[float]) -> str:
    """Return lengths along y in base64, a byte each: 255 is half of the axis."""
    half = (plot.y.high - plot.y.low) / 2
    steps = bytes(min(255, round(255 * value / half)) if math.isfinite(value) else 0 for value in spread)
    return base64.b64encode(steps).decode()


def _mark(plot: Plot, frame: Frame, mark: Mark) -> str:
    if isinstance(mark, Dot):
        return _dot(plot, frame, mark)
    if isinstance(mark, Bar):
        return _bar(plot, frame, mark)
    assert isinstance(mark, Cell), mark
    return _cell(plot, frame, mark)


def _tip(frame: Frame, tip: str) -> str:
    return f' data-tip="{escape(tip)}"' if tip and isinstance(frame, Inline) else ""


def _dot(plot: Plot, frame: Frame, mark: Dot) -> str:
    x, y = frame.x(plot.x.place(mark.x)), frame.y(1 - plot.y.place(mark.y))
    color = frame.color(mark.color)
    parts = []
    if mark.low is not None and mark.high is not None:
        ends = [frame.y(1 - plot.y.place(value)) for value in (mark.low, mark.high)]
        parts.append(
            f'<line x1="{x}" x2="{x}" y1="{ends[0]}" y2="{ends[1]}" style="stroke:{color};stroke-width:1.5"/>'
        )
    fill = "none" if mark.open else color
    parts.append(
        f'<circle cx="{x}" cy="{y}" r="5.5" pointer-events="all" style="fill:{fill};stroke:{color};stroke-width:1.8"'
        f"{_tip(frame, mark.tip)}/>"
    )
    if mark.label:
        offset = {"above": 'dy="-12" text-anchor="middle"', "below": 'dy="22" text-anchor="middle"',
                  "right": 'dx="10" dy=".32em"'}[mark.side]  # fmt: skip
        parts.append(f'<text x="{x}" y="{y}" {offset}>{escape(mark.label)}</text>')
    return "".join(parts)


def _bar(plot: Plot, frame: Frame, mark: Bar) -> str:
    first, second = sorted(plot.x.place(value) for value in (mark.start, mark.end))
    middle = 1 - plot.y.place(mark.row)
    height = abs(plot.y.place(mark.row + mark.thickness / 2) - plot.y.place(mark.row - mark.thickness / 2))
    parts = [
        f'<rect x="{frame.x(first)}" y="{frame.y(middle - height / 2)}" width="{frame.across(second - first)}" '
        f'height="{frame.down(height)}" style="fill:{frame.color(mark.color)}"{_tip(frame, mark.tip)}/>'
    ]
    reach = [mark.end]
    if mark.low is not None and mark.high is not None:
        ends = [frame.x(plot.x.place(value)) for value in (mark.low, mark.high)]
        parts.append(
            f'<line x1="{ends[0]}" x2="{ends[1]}" y1="{frame.y(middle)}" y2="{frame.y(middle)}" '
            f'style="stroke:{frame.color("ink")};stroke-width:1.2"/>'
        )
        reach += [mark.low, mark.high]
    if mark.label:
        leftward = mark.end < mark.start
        at = frame.x(plot.x.place(min(reach) if leftward else max(reach)))
        side = 'dx="-7" text-anchor="end"' if leftward else 'dx="7"'
        parts.append(f'<text x="{at}" y="{frame.y(middle)}" {side} dy=".32em">{escape(mark.label)}</text>')
    return "".join(parts)


def _cell(plot: Plot, frame: Frame, mark: Cell) -> str:
    x, y = plot.x.place(mark.x), 1 - plot.y.place(mark.y)
    width, height = (1 / abs(axis.high - axis.low) for axis in (plot.x, plot.y))
    label = ""
    if mark.label:
        label = (
            f'<text class="cell" x="{frame.x(x)}" y="{frame.y(y)}" dy=".32em" text-anchor="middle">'
            f"{escape(mark.label)}</text>"
        )
    return (
        f'<rect x="{frame.x(x - width / 2)}" y="{frame.y(y - height / 2)}" width="{frame.across(width)}" '
        f'height="{frame.down(height)}" style="fill:{frame.color(mark.color)};fill-opacity:{mark.strength:.2f};'
        f'stroke:{frame.color("bg")}"{_tip(frame, mark.tip)}/>{label}'
    )
