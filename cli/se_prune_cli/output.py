"""What every command shares: options, tables on stdout, progress and messages on stderr, one JSON document."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, all else on stderr.")]
Device = Annotated[str, typer.Option("--device", help="auto, cuda, mps or cpu.")]
Seed = Annotated[int, typer.Option("--seed", help="Fixes every random choice.")]
Model = Annotated[str, typer.Argument(help="An artifact, a checkpoint file, or an architecture reference.")]
Arch = Annotated[str | None, typer.Option("--arch", help="Architecture of a checkpoint, as `archs` names it.")]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="Load the library's own weights.")]
Data = Annotated[str, typer.Option("--data", help="fashion-mnist, a folder, or a timm scheme.")]
OptionalData = Annotated[str | None, typer.Option("--data", help="fashion-mnist, a folder, or a timm scheme.")]
InputSize = Annotated[str | None, typer.Option("--input-size", help="C,H,W or H,W; overrides the model's own.")]
Mean = Annotated[str | None, typer.Option("--mean", help="Comma-separated channel means; overrides.")]
Std = Annotated[str | None, typer.Option("--std", help="Comma-separated channel deviations; overrides.")]

ERR = Console(stderr=True)


class Output:
    """Where a command's words go: `say` to stderr, `table` to stdout unless `--json` was given."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.console = Console(stderr=as_json)

    def say(self, text: str) -> None:
        """Print a message on stderr."""
        ERR.print(text, highlight=False)

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """Print a table; the first column is left-aligned, the others right-aligned."""
        table = Table(title=title, title_justify="left", header_style="bold")
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        self.console.print(table)

    def document(self, value: dict[str, Any] | list[Any]) -> None:
        """Print the JSON document on stdout if `--json` was given."""
        if self.as_json:
            json.dump(value, sys.stdout, indent=2)
            sys.stdout.write("\n")


@contextlib.contextmanager
def progress(title: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Show a progress bar on stderr; the yielded function takes `advance`, `total` and `note`."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=ERR,
        transient=True,
    )
    with bar:
        task = bar.add_task(title, total=total, note="")

        def update(advance: int = 1, *, total: int | None = None, note: str | None = None) -> None:
            fields = {} if note is None else {"note": note}
            if total is not None:
                bar.update(task, total=total)
            bar.update(task, advance=advance, **fields)  # type: ignore[arg-type]

        yield update


def percent(value: float, digits: int = 2) -> str:
    """Return a fraction as percent."""
    return f"{100 * value:.{digits}f} %"


def millions(value: int) -> str:
    """Return a count in millions, or in thousands below one."""
    return f"{value / 1e6:.2f} M" if value >= 1e6 else f"{value / 1e3:.1f} k"
