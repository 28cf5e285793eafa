"""`se-prune train`: make a checkpoint where the user has none."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from se_prune_cli.output import Data, Device, Json, Output, Seed, percent, progress


def command(
    arch: Annotated[str, typer.Option("--arch", help="Architecture, as `archs` names it.")],
    data: Data,
    output: Annotated[Path, typer.Option("-o", "--output", help="The artifact to write.")],
    recipe: Annotated[Path | None, typer.Option("--recipe", help="TOML file whose [train] table to use.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Overrides the recipe.")] = None,
    lr: Annotated[float | None, typer.Option(help="Overrides the recipe.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Overrides the recipe.")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Folder that keeps the state after every epoch; run again to go on.")
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Train a network from random weights and write it as an artifact."""
    from se_prune import pipeline
    from se_prune.recipe import train_settings
    from se_prune.records import to_dict

    out = Output(as_json)
    settings = train_settings(recipe, "train", epochs=epochs, lr=lr, batch_size=batch_size)
    with progress(f"train {arch}") as update:

        def show(log: pipeline.StepLog) -> None:
            note = f"epoch {log.epoch + 1} loss {log.loss:.3f} top-1 {percent(log.top1)}"
            update(1, total=log.total_steps, note=note)

        result = pipeline.train(
            arch, data, settings, output=output, seed=seed, device=device, resume=resume, on_step=show
        )
    top1, (low, high) = result.top1, result.top1_ci95
    out.table(
        f"{output}",
        ["images", "top-1", "95 % interval", "top-5"],
        [[str(result.n), percent(top1), f"{percent(low)} to {percent(high)}", percent(result.top5)]],
    )
    document = to_dict(result)
    document.pop("predictions")
    out.document({**document, "output": str(output)})
