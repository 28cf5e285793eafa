"""What every command shares: options, tables on stdout, progress and messages on stderr, one JSON document."""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, all else on stderr.")]
Device = Annotated[str, typer.Option("--device", help="auto, cuda, mps or cpu.")]
Seed = Annotated[int, typer.Option("--seed", help="Fixes every random choice.")]
Model = Annotated[str, typer.Argument(help="An artifact, a checkpoint or ONNX file, or an architecture.")]
Arch = Annotated[
    str | None,
    typer.Option(
        "--arch", help="Architecture of a checkpoint, as `archs` names it; without, told by its tensors."
    ),
]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="Load the library's own weights.")]
Ema = Annotated[
    bool, typer.Option("--ema", help="Take the averaged weights of a checkpoint that holds both.")
]
Data = Annotated[
    str, typer.Option("--data", help="fashion-mnist, a folder of images or shards, torch/NAME, hfds/NAME.")
]
OptionalData = Annotated[
    str | None,
    typer.Option("--data", help="fashion-mnist, a folder of images or shards, torch/NAME, hfds/NAME."),
]
Workers = Annotated[
    int | None,
    typer.Option("--workers", help="Processes that decode images; without, one a core, at most 8."),
]
MaxBadImages = Annotated[
    float | None,
    typer.Option(
        "--max-bad-images",
        help="Unreadable images that are left out before the command stops: a share of a split below 1, "
        "else a number; one in a thousand without.",
    ),
]
Classes = Annotated[
    str | None,
    typer.Option("--classes", help="Comma-separated classes that the deployment needs; all without."),
]
InputSize = Annotated[
    str | None, typer.Option("--input-size", help="C,H,W or H,W; overrides the model's own.")
]
Mean = Annotated[str | None, typer.Option("--mean", help="Comma-separated channel means; overrides.")]
Std = Annotated[str | None, typer.Option("--std", help="Comma-separated channel deviations; overrides.")]

Figures = Annotated[
    Path | None,
    typer.Option("--figures", help="Folder for every figure as SVG, and as PNG with the extra `figures`."),
]

ERR = Console(stderr=True)


def silence() -> None:
    """Show nothing more: of several processes the main one alone speaks."""
    ERR.quiet = True


class Notices(logging.Handler):
    """Prints what the library logs, such as an architecture that it guessed, on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        ERR.print(record.getMessage(), style="yellow", highlight=False, markup=False, soft_wrap=True)


class Output:
    """Where a command's words go: `say` to stderr, `table` to stdout unless `--json` was given."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.console = Console(stderr=as_json, quiet=ERR.quiet)

    def say(self, text: str) -> None:
        """Print a message on stderr."""
        ERR.print(text, highlight=False)

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """Print a table; the first column is left-aligned, the others right-aligned."""
        table = Table(
            title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
        )
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
        for row in rows:
            assert len(row) == len(columns), (title, row)
            table.add_row(*row)
        self.console.print(table)

    def document(self, value: dict[str, Any] | list[Any]) -> None:
        """Print the JSON document on stdout if `--json` was given."""
        if self.as_json and not ERR.quiet:
            json.dump(value, sys.stdout, indent=2)
            sys.stdout.write("\n")


class Progressed:
    """Shows the stages of a job as progress bars on stderr; each leaves one line when it is done."""

    @contextlib.contextmanager
    def stage(self, title: str, total: int | None) -> Iterator[Callable[..., None]]:
        """Open a bar; the yielded function takes the advance, and `total` and `note` where they change."""
        started = time.monotonic()
        if not ERR.is_terminal:
            yield lambda *_, **__: None
        else:
            yield from self._bar(title, total)
        ERR.print(f"[dim]{title}: {time.monotonic() - started:.1f} s[/dim]", highlight=False)

    def _bar(self, title: str, total: int | None) -> Iterator[Callable[..., None]]:
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
                if total is not None:
                    bar.update(task, total=total)
                if note is not None:
                    bar.update(task, note=note)
                bar.update(task, advance=advance)

            yield update


def model_options(
    arch: str | None,
    pretrained: bool,
    input_size: str | None,
    mean: str | None,
    std: str | None,
    ema: bool = False,
) -> dict[str, Any]:
    """Return the options of MODEL as `checkpoint.open_model` takes them."""
    return {
        "arch": arch,
        "pretrained": pretrained,
        "ema": ema,
        **preprocessing_options(input_size, mean, std),
    }


def preprocessing_options(input_size: str | None, mean: str | None, std: str | None) -> dict[str, Any]:
    """Return `--input-size`, `--mean` and `--std` as `preprocessing.with_preprocessing` takes them."""
    from se_prune.preprocessing import parse_floats, parse_size

    return {
        "input_size": None if input_size is None else parse_size(input_size),
        "mean": None if mean is None else parse_floats(mean, "--mean"),
        "std": None if std is None else parse_floats(std, "--std"),
    }


def whole_numbers(numbers: str, option: str) -> list[int]:
    """Return the whole numbers of an option, with commas between.

    Raises:
        UsageError: One is none, or below 1.
    """
    from se_prune.errors import UsageError

    try:
        values = [int(number) for number in numbers.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        raise UsageError(f"{option} takes whole numbers of at least 1, such as 1,8; got '{numbers}'.")
    return values


def command_line(data: str) -> str:
    """Return the command that is running as a report may show it: the path of its data is left out."""
    from se_prune.data.source import reference_name

    return shlex.join(["se-prune", *(reference_name(a) if a == data else a for a in sys.argv[1:])])


def figures_note(out: Output, folder: Path | None, files: Sequence[Path]) -> None:
    """Say where the figures are, and what is missing for PNG."""
    from se_prune.report.files import NO_PNG, can_draw_png

    if folder is None:
        return
    out.say(f"figures: {folder}, {len(files)} files")
    if not can_draw_png():
        out.say(NO_PNG)


def class_names(classes: str) -> list[str]:
    """Return the names of `--classes`."""
    return [name.strip() for name in classes.split(",") if name.strip()]


def preprocessing_line(preprocessing: Any) -> str:
    """Return what is done to the pixels, to be printed."""
    size = "×".join(map(str, preprocessing.input_size))
    mean = ", ".join(f"{m:.4g}" for m in preprocessing.mean)
    std = ", ".join(f"{s:.4g}" for s in preprocessing.std)
    return f"input {size}, mean {mean}, std {std}"
