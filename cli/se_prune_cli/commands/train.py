"""`se-prune train`: make a checkpoint where the user has none."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from se_prune_cli.output import (
    Data,
    Device,
    InputSize,
    Json,
    MaxBadImages,
    Mean,
    Output,
    Seed,
    Std,
    Workers,
    preprocessing_options,
)
from se_prune_cli.tables import accuracy
from se_prune_cli.training import Resume, State, Track, forget, trained


def command(
    arch: Annotated[str, typer.Option("--arch", help="Architecture, as `archs` names it.")],
    data: Data,
    output: Annotated[Path, typer.Option("-o", "--output", help="The artifact to write.")],
    recipe: Annotated[Path | None, typer.Option(help="TOML file with a \\[train] table.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Overrides the recipe.")] = None,
    lr: Annotated[float | None, typer.Option(help="Overrides the recipe.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Overrides the recipe.")] = None,
    input_size: InputSize = None,
    mean: Mean = None,
    std: Std = None,
    resume: Resume = True,
    state: State = None,
    track: Track = None,
    seed: Seed = 0,
    workers: Workers = None,
    max_bad_images: MaxBadImages = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Train a network from random weights and write it as an artifact."""
    from se_prune import artifact, pipeline
    from se_prune.data import open_data
    from se_prune.device import choose_device
    from se_prune.files import require_writable
    from se_prune.recipe import find_recipe, train_settings

    out = Output(as_json)
    file = None if recipe is None else find_recipe(recipe)
    settings = train_settings(file, "train", epochs=epochs, lr=lr, batch_size=batch_size, track=track)
    require_writable(output)
    target, source = choose_device(device), open_data(data, workers=workers, max_bad_images=max_bad_images)
    sizes = preprocessing_options(input_size, mean, std)
    with trained(f"train {arch}", output, settings, state=state, resume=resume) as options:
        network, result = pipeline.train(
            arch,
            source,
            settings,
            device=target,
            seed=seed,
            **options,
            **sizes,
        )
    artifact.save(output, network)
    forget(output, state)
    out.table(str(output), *accuracy([(arch, result)]))
    out.document(
        {"n": result.n, "top1": result.top1, "top1_ci95": list(result.top1_ci95), "output": str(output)}
    )
