"""`se-prune finetune`: bring accuracy back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from se_prune_cli.output import (
    Arch,
    Data,
    Device,
    Ema,
    InputSize,
    Json,
    MaxBadImages,
    Mean,
    Model,
    Output,
    Pretrained,
    Progressed,
    Seed,
    Std,
    Workers,
    model_options,
)
from se_prune_cli.tables import accuracy
from se_prune_cli.training import Resume, State, Track, forget, trained


def command(
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option("-o", "--output", help="The artifact to write.")],
    teacher: Annotated[
        str | None, typer.Option(help="The dense network to distil from; without, labels alone.")
    ] = None,
    teacher_pretrained: Annotated[
        bool, typer.Option("--teacher-pretrained", help="Load the library's weights for the teacher.")
    ] = False,
    recipe: Annotated[Path | None, typer.Option(help="TOML file with a \\[finetune] table.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Overrides the recipe.")] = None,
    lr: Annotated[float | None, typer.Option(help="Overrides the recipe.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Overrides the recipe.")] = None,
    resume: Resume = True,
    state: State = None,
    track: Track = None,
    arch: Arch = None,
    pretrained: Pretrained = False,
    ema: Ema = False,
    input_size: InputSize = None,
    mean: Mean = None,
    std: Std = None,
    seed: Seed = 0,
    workers: Workers = None,
    max_bad_images: MaxBadImages = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Train a pruned network on training images, distilling from the dense one."""
    from se_prune import artifact, pipeline
    from se_prune.checkpoint import open_model
    from se_prune.data import open_data
    from se_prune.device import choose_device
    from se_prune.files import require_writable
    from se_prune.recipe import find_recipe, train_settings

    out, show = Output(as_json), Progressed()
    file = None if recipe is None else find_recipe(recipe)
    settings = train_settings(file, "finetune", epochs=epochs, lr=lr, batch_size=batch_size, track=track)
    require_writable(output)
    target, source = choose_device(device), open_data(data, workers=workers, max_bad_images=max_bad_images)
    network = open_model(model, **model_options(arch, pretrained, input_size, mean, std, ema))
    dense = None if teacher is None else open_model(teacher, pretrained=teacher_pretrained)
    title = f"fine-tune, {settings.epochs} epochs"
    with trained(title, output, settings, state=state, resume=resume) as options:
        tuned = pipeline.finetune(
            network,
            source,
            settings,
            device=target,
            teacher=dense,
            seed=seed,
            **options,
        )
    tuned, result = pipeline.assess(tuned, source, device=target, reporter=show)
    artifact.save(output, tuned)
    forget(output, state)
    out.table(str(output), *accuracy([("fine-tuned", result)]))
    out.document(
        {"n": result.n, "top1": result.top1, "top1_ci95": list(result.top1_ci95), "output": str(output)}
    )
