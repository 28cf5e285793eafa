"""`se-prune demo`: the main job on the bundled network and data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from se_prune_cli.output import Device, Json, Output
from se_prune_cli.training import Resume
from se_prune_cli.whole import run_and_show


def command(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for all files.")] = Path("demo-out"),
    seed: Annotated[int | None, typer.Option(help="Overrides the recipe's.")] = None,
    resume: Resume = True,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Cut a trained SE-ResNet-20 to half its MACs and report on it; needs no download, takes minutes on a CPU."""
    run_and_show(
        Path("demo"), output, "se-prune demo", Output(as_json), device=device, seed=seed, resume=resume
    )
