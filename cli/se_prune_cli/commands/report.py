"""`se-prune report`: a page from run records, or the same on the terminal."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from se_prune_cli.output import Figures, Json, Output, figures_note


class Schema(StrEnum):
    """The records whose JSON Schema is published."""

    run = "run"
    gates = "gates"


def _schema(name: Schema | None) -> None:
    if name is not None:
        from se_prune.results import GateReport, Run
        from se_prune.schema import json_schema

        cls = {Schema.run: Run, Schema.gates: GateReport}[name]
        typer.echo(json.dumps(json_schema(cls), indent=2))
        raise typer.Exit


def command(
    runs: Annotated[list[Path], typer.Argument(help="Run records (run.json) or the folders that hold them.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="The HTML file, report.html without; .md and .json go beside it."
        ),
    ] = None,
    figures: Figures = None,
    terminal: Annotated[
        bool,
        typer.Option("--terminal", help="Print tables and figures as text; no file is written without -o."),
    ] = False,
    schema: Annotated[
        Schema | None,
        typer.Option(
            callback=_schema, is_eager=True, help="Print the JSON Schema of a record: a run, or gates."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the compression report of one or several runs: HTML, Markdown and JSON; or print it."""
    from se_prune.report import load_run, write_figures_of, write_report

    del schema
    out = Output(as_json)
    records = [load_run(path / "run.json" if path.is_dir() else path) for path in runs]
    if terminal:
        from se_prune_cli.terminal import show_report

        show_report(out.console, records)
    files: list[Path] = []
    if output is not None or not terminal:
        files += write_report(records, output or Path("report.html"))
        for file in files:
            out.say(str(file))
    if figures is not None:
        drawings = write_figures_of(records, figures)
        figures_note(out, figures, drawings)
        files += drawings
    out.document({"runs": len(records), "files": [str(file) for file in files]})
