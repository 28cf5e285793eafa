"""`se-prune run`: the whole pipeline from a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from se_prune_cli.output import Device, Json, OptionalData, Output, Workers
from se_prune_cli.training import Resume
from se_prune_cli.whole import MaxDrop, Shape, Steps, run_and_show


def _keys(show: bool) -> None:
    if show:
        from se_prune.keys import key_reference

        typer.echo(key_reference(), nl=False)
        raise typer.Exit


def command(
    recipe: Annotated[
        Path, typer.Argument(help="A TOML file, or the name of a recipe that ships with se-prune.")
    ],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for all files.")] = None,
    data: OptionalData = None,
    keys: Annotated[
        bool, typer.Option("--keys", callback=_keys, is_eager=True, help="Print every key of a recipe.")
    ] = False,
    workers: Workers = None,
    seed: Annotated[int | None, typer.Option(help="Overrides the recipe's.")] = None,
    steps: Steps = None,
    shape: Shape = None,
    max_drop: MaxDrop = None,
    resume: Resume = True,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Analyse, cut, repair, fine-tune, evaluate, export and report, as a recipe says."""
    folder = output or Path("runs") / recipe.stem
    del keys
    run_and_show(
        recipe,
        folder,
        f"se-prune run {recipe} -o {folder}",
        Output(as_json),
        device=device,
        seed=seed,
        resume=resume,
        data=data,
        workers=workers,
        steps=steps,
        shape=shape,
        max_drop=max_drop,
    )
