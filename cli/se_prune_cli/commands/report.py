"""`se-prune report`: a page from run records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from se_prune_cli.output import Json, Output


def command(
    runs: Annotated[list[Path], typer.Argument(help="Run records (run.json) or the folders that hold them.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The HTML file; .md and .json go beside it.")
    ] = Path("report.html"),
    as_json: Json = False,
) -> None:
    """Write the compression report of one or several runs: HTML, Markdown and JSON."""
    from se_prune.report import load_run, write_report

    out = Output(as_json)
    records = [load_run(path / "run.json" if path.is_dir() else path) for path in runs]
    files = write_report(records, output)
    for file in files:
        out.say(str(file))
    out.document({"runs": len(records), "files": [str(file) for file in files]})
