"""`se-prune report`: a page from run records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from se_prune_cli.output import Figures, Json, Output, figures_note


def command(
    runs: Annotated[list[Path], typer.Argument(help="Run records (run.json) or the folders that hold them.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The HTML file; .md and .json go beside it.")
    ] = Path("report.html"),
    figures: Figures = None,
    as_json: Json = False,
) -> None:
    """Write the compression report of one or several runs: HTML, Markdown and JSON."""
    from se_prune.report import load_run, write_report

    out = Output(as_json)
    records = [load_run(path / "run.json" if path.is_dir() else path) for path in runs]
    files = write_report(records, output, figures=figures)
    for file in files[:3]:
        out.say(str(file))
    figures_note(out, figures, files[3:])
    out.document({"runs": len(records), "files": [str(file) for file in files]})
