"""A report on a terminal: the sentences, tables and figures of the page, as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from se_prune.report import sections
from se_prune.report.plot import PALETTE, Axis, Bar, Cell, Dot, Line, Plot, shortened

if TYPE_CHECKING:
    from se_prune.report.content import Figure, Section
    from se_prune.report.tables import Table as Rows
    from se_prune.results import Run

#: Characters of a bar, and of a figure of points with its rows.
WIDTH, HEIGHT = 48, 14
LEVELS = "▁▂▃▄▅▆▇█"


def show_report(console: Console, runs: Sequence[Run]) -> None:
    """Print a report of one or several runs."""
    if len(runs) > 1:
        _section(console, sections.compare(runs))
    for run in runs:
        console.rule(Text(run.name, style="bold"))
        console.print(Text(sections.verdict(run), style="bold"))
        for tile in sections.tiles(run):
            console.print(Text(f"  {tile.name}: {tile.value} ({tile.detail})"))
        for section in sections.of_run(run, float("inf")):
            _section(console, section)


def _section(console: Console, section: Section) -> None:
    console.print()
    console.print(Text(section.title, style="bold underline"))
    for paragraph in section.paragraphs:
        console.print(Text(paragraph))
    if section.command is not None:
        console.print(Text(section.command, style="cyan"), soft_wrap=True)
    for figure in section.figures:
        console.print(drawn(figure))
    for picture in section.pictures:
        console.print(Text(f"  {picture.title} ({picture.detail})"))
    for table in section.tables:
        console.print(_table(table))


def _table(rows: Rows) -> Table:
    table = Table(
        title=Text(rows.caption),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        expand=False,
    )
    for name, letter in zip(rows.head, rows.align, strict=True):
        first = not table.columns
        table.add_column(Text(name), justify="right" if letter == "r" else "left", no_wrap=first)
    for row in rows.rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def drawn(figure: Figure) -> RenderableType:
    """Return a figure as text: the panel that the page shows first."""
    parts: list[RenderableType] = [Text(f"\n{figure.caption}", style="italic")]
    if len(figure.panels) > 1:
        parts.append(Text(f"{figure.choices[figure.first]}, one of {len(figure.panels)}:", style="dim"))
    for plot in figure.panels[figure.first]:
        if plot.subtitle:
            parts.append(Text(plot.subtitle, style="dim"))
        parts += _plot(plot)
    if figure.keys and not any(isinstance(mark, Line) and plot.zoom == "x" for mark in plot.marks):
        legend = Text("  ")
        for key in figure.keys:
            legend.append("■ ", style=PALETTE[key.color][0]).append(f"{key.name}  ")
        parts.append(legend)
    return Group(*parts)


def _plot(plot: Plot) -> Iterator[Text]:
    if plot.zoom == "x":
        yield from _profiles(plot)
    elif plot.zoom == "xy":
        yield from _points(plot)
    elif any(isinstance(mark, Cell) for mark in plot.marks):
        yield from _cells(plot)
    elif any(isinstance(mark, Bar) for mark in plot.marks):
        yield from _bars(plot)
    else:
        yield from _levels(plot)


def _name(name: str, width: int) -> str:
    return f"  {shortened(name):>{width}} "


def _names(axis: Axis) -> int:
    return max(len(shortened(name)) for _, name in axis.ticks)


def _bars(plot: Plot) -> Iterator[Text]:
    """Yield a line a row: bars from the left, or from the middle where they go both ways."""
    width = _names(plot.y)
    for value, name in plot.y.ticks:
        line = Text(_name(name, width))
        cells: list[tuple[str, str]] = [(" ", "")] * WIDTH
        labels = []
        for bar in (mark for mark in plot.marks if isinstance(mark, Bar) and mark.row == value):
            first, last = sorted(plot.x.place(end) * WIDTH for end in (bar.start, bar.end))
            color = PALETTE[bar.color][0]
            block = "░" if bar.color == "track" else "█"
            for i in range(round(first), round(last)):
                cells[i] = (block, color)
            if block == "█" and round(first) == round(last) and last > first:
                cells[min(WIDTH - 1, round(first))] = ("▏", color)
            labels += [bar.label] if bar.label else []
        for character, color in cells:
            line.append(character, style=color)
        yield line.append(f" {', '.join(labels)}")


def _levels(plot: Plot) -> Iterator[Text]:
    """Yield a line a name along x, with its points and their intervals from left (low) to right (high)."""
    width = _names(plot.x)
    dots = [mark for mark in plot.marks if isinstance(mark, Dot)]
    known = {value: name for value, name in plot.x.ticks}  # noqa: C416 - ticks are pairs of floats and names
    for value in dict.fromkeys(dot.x for dot in dots):
        line = Text(_name(known.get(value, ""), width))
        cells: list[tuple[str, str]] = [("·", "dim")] * WIDTH
        said = []
        for dot in (dot for dot in dots if dot.x == value):
            color = PALETTE[dot.color][0]
            if dot.low is not None and dot.high is not None:
                for i in range(_column(plot.y, dot.low), _column(plot.y, dot.high) + 1):
                    cells[i] = ("─", color)
            cells[_column(plot.y, dot.y)] = ("○" if dot.open else "●", color)
            said.append(dot.label or dot.tip.rpartition(": ")[2])
        for character, color in cells:
            line.append(character, style=color)
        yield line.append(f" {', '.join(said)}")
    low, high = (f"{plot.y.low + f * (plot.y.high - plot.y.low):.4g}" for f in (0, 1))
    yield Text(f"{'':{width + 3}}{low}{plot.y.title:^{WIDTH - len(low) - len(high)}}{high}", style="dim")


def _column(axis: Axis, value: float) -> int:
    return min(WIDTH - 1, max(0, int(axis.place(value) * WIDTH)))


def _points(plot: Plot) -> Iterator[Text]:
    """Yield a picture of points with their numbers, and what each is."""
    grid: list[list[tuple[str, str]]] = [[(" ", "")] * WIDTH for _ in range(HEIGHT)]
    dots = [mark for mark in plot.marks if isinstance(mark, Dot)]
    for dot in dots:
        row = min(HEIGHT - 1, int((1 - plot.y.place(dot.y)) * HEIGHT))
        for i, character in enumerate(dot.label or "○"):
            grid[row][min(WIDTH - 1, _column(plot.x, dot.x) + i)] = (character, PALETTE[dot.color][0])
    for number, cells in enumerate(grid):
        edge = {0: f"{plot.y.high:.2f}", HEIGHT - 1: f"{plot.y.low:.2f}"}.get(number, "")
        line = Text(f"  {edge:>7} │")
        for character, color in cells:
            line.append(character, style=color)
        yield line
    low, high = f"{plot.x.low:.4g}", f"{plot.x.high:.4g}"
    yield Text(f"{'':10}└{'─' * WIDTH}")
    yield Text(f"{'':11}{low}{plot.x.title:^{WIDTH - len(low) - len(high)}}{high}", style="dim")
    for dot in dots:
        yield Text(f"  {dot.label or '○'} ", style=PALETTE[dot.color][0]).append(dot.tip, style="default")


def _cells(plot: Plot) -> Iterator[Text]:
    """Yield a line a row of a table of colours; columns have numbers, and what they stand for is the row's name."""
    width = _names(plot.y)
    cells = {(mark.y, mark.x): mark for mark in plot.marks if isinstance(mark, Cell)}
    yield Text(f"{'':{width + 3}}" + "".join(f"{i:>5}" for i, _ in enumerate(plot.x.ticks)), style="dim")
    for i, (row, name) in enumerate(plot.y.ticks):
        line = Text(f"{_name(name, width)[:-1]}{i:>3}")
        for column, _ in plot.x.ticks:
            cell = cells.get((row, column))
            color = PALETTE[cell.color][0] if cell is not None else ""
            line.append(f"{cell.label if cell is not None else '':>5}", style=color)
        yield line


def _profiles(plot: Plot) -> Iterator[Text]:
    """Yield a line a class: the gate by channel as heights, channels side by side summed up where they are many."""
    lines = [mark for mark in plot.marks if isinstance(mark, Line)]
    width = max(len(shortened(line.name)) for line in lines)
    for line in lines:
        steps = min(len(line.ys), 2 * WIDTH)
        parts = [line.ys[i * len(line.ys) // steps : (i + 1) * len(line.ys) // steps] for i in range(steps)]
        means = [sum(part) / len(part) for part in parts]
        heights = (max(0.0, min(1.0, plot.y.place(mean))) if mean == mean else 0.0 for mean in means)  # noqa: PLR0124
        text = "".join(LEVELS[min(7, int(8 * height))] for height in heights)
        yield Text(_name(line.name, width)).append(
            text, style=PALETTE[line.color][0] if line.color != "ink" else ""
        )
    yield Text(
        f"{'':{width + 3}}channel 0 to {plot.x.high - 0.5:.0f}, gate 0 to {plot.y.high:.2f}", style="dim"
    )
