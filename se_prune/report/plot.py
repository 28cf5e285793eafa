"""What a figure is made of: axes and marks in the units of the data; `svg` draws it.

Colours are names of `PALETTE`, so that the same plot is drawn light, dark, printed, and as a file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

#: Name → (light, dark). Eight colours that colour-blind readers can tell apart, and the page's own.
PALETTE: dict[str, tuple[str, str]] = {
    "bg": ("#ffffff", "#11161d"),
    "panel": ("#f5f7f9", "#1a212b"),
    "ink": ("#1c2430", "#e7ecf2"),
    "muted": ("#5a6675", "#9aa7b6"),
    "rule": ("#d9dfe6", "#303a47"),
    "track": ("#e3e8ee", "#2a3440"),
    "band": ("#dfe2e6", "#2b323c"),
    "link": ("#0b5cad", "#7cb8f5"),
    "blue": ("#0072b2", "#4da3dd"),
    "orange": ("#d98a00", "#f0ad3a"),
    "green": ("#009e73", "#2fc79b"),
    "vermillion": ("#c8500a", "#ff8a52"),
    "purple": ("#b0568b", "#df8fbd"),
    "sky": ("#3a9bd9", "#86cdf5"),
    "yellow": ("#a89a00", "#e6d94d"),
    "grey": ("#6b7280", "#aab4c0"),
}
LINES = ("blue", "orange", "green", "vermillion", "purple", "sky", "yellow", "grey")
Dash = Literal["solid", "dotted", "dashed"]
DASHES: tuple[Dash, ...] = ("solid", "dotted", "dashed")


def color_of(index: int) -> str:
    """Return the colour of the line or point number `index`."""
    return LINES[index % len(LINES)]


def dash_of(index: int) -> Dash:
    """Return the dash of line number `index`; it changes where the colours repeat."""
    return DASHES[index // len(LINES) % len(DASHES)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One entry of a legend: a name, the colour and the mark that stand for it."""

    name: str
    color: str
    mark: Literal["box", "dot", "ring", "solid", "dotted", "dashed", "bold"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A linear axis from `low` (left, bottom) to `high`; `low` may be the larger."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    title: str = ""
    grid: bool = False

    def place(self, value: float) -> float:
        """Return where a value lies: 0 at `low`, 1 at `high`."""
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line through (xs, ys), broken where a y is no number.

    `choice` is the number of the class that it stands for, where the reader may bring it forward; `spread` (one per
    point) is drawn as a band around it then.
    """

    xs: tuple[float, ...]
    ys: tuple[float, ...]
    name: str
    color: str
    width: float = 1.5
    dash: Dash = "solid"
    choice: int | None = None
    spread: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """The area between two lines."""

    xs: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    color: str = "band"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """A point with its interval (low, high) in y; `tip` is what hovering says."""

    x: float
    y: float
    color: str
    tip: str
    low: float | None = None
    high: float | None = None
    label: str = ""
    side: Literal["above", "below", "right"] = "right"
    open: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A horizontal bar in a row, with the interval (low, high) of its end."""

    row: float
    start: float
    end: float
    color: str
    tip: str = ""
    label: str = ""
    low: float | None = None
    high: float | None = None
    thickness: float = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A cell of a table of colours, one unit wide and high around (x, y); `strength` 0 to 1 is its opacity."""

    x: float
    y: float
    color: str
    strength: float
    tip: str
    label: str = ""


Mark = Line | Band | Dot | Bar | Cell


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """One picture: `height` pixels between the axes, `left` and `right` beside them.

    `levels` are dotted lines across; `zoom` says along which axes the reader may look closer. `unit` names the values
    of lines (x, y) when they are hovered. Lines are drawn in steps of `grain` along x.
    """

    height: int
    x: Axis
    y: Axis
    marks: tuple[Mark, ...]
    left: int = 48
    right: int = 16
    levels: tuple[float, ...] = ()
    zoom: Literal["", "x", "xy"] = ""
    unit: tuple[str, str] = ("", "")
    subtitle: str = ""
    grain: float = 1.0


def nice(low: float, high: float, count: int = 5) -> tuple[tuple[float, str], ...]:
    """Return about `count` round ticks between two numbers."""
    if not high > low:
        return ((low, f"{low:g}"),)
    raw = (high - low) / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * f for f in (1, 2, 5, 10) if size * f >= raw * 0.95)
    first = math.ceil(low / step - 1e-9)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    values = [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]
    return tuple((value, f"{value:.{digits}f}".replace("-", "−")) for value in values)


def scale(low: float, high: float, *, title: str = "", grid: bool = False, count: int = 5) -> Axis:
    """Return an axis with round ticks."""
    return Axis(low=low, high=high, ticks=nice(low, high, count), title=title, grid=grid)


def names(values: Sequence[str]) -> Axis:
    """Return an axis of names from the top down, at whole numbers from 0."""
    return Axis(low=len(values) - 0.5, high=-0.5, ticks=tuple((float(i), n) for i, n in enumerate(values)))


#: Pixels that a character of a label takes, and the longest label that is written out.
CHAR, LONGEST = 6.7, 22


def margin(values: Sequence[str]) -> int:
    """Return the pixels that names left of an axis need."""
    return 14 + round(CHAR * min(LONGEST, max((len(value) for value in values), default=0)))


def shortened(name: str, limit: int = LONGEST) -> str:
    """Return a name of at most `limit` characters, with its middle left out where it is longer."""
    if len(name) <= limit:
        return name
    kept = limit - 1
    return f"{name[: kept // 2]}…{name[-(kept - kept // 2) :]}"
