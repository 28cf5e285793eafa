"""`se-prune analyze`: what the gates say on training images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from se_prune_cli.output import (
    Arch,
    Classes,
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
    class_names,
    model_options,
    preprocessing_line,
)
from se_prune_cli.tables import site_rows


def command(
    model: Model,
    data: Data,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Statistics file to write, for `apply --stats`.")
    ] = None,
    images: Annotated[int | None, typer.Option(help="Training images to look at; all without.")] = None,
    classes: Classes = None,
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
    """Measure every gate on training images: how alive it is, for which classes, and what folding it would lose."""
    from se_prune import pipeline
    from se_prune.checkpoint import open_model
    from se_prune.data import open_data
    from se_prune.device import choose_device
    from se_prune.errors import UsageError
    from se_prune.files import require_writable
    from se_prune.folding import liveness
    from se_prune.gates.summary import summarise
    from se_prune.schema import to_dict

    out = Output(as_json)
    if images is not None and images < 1:
        raise UsageError(f"--images must be at least 1, got {images}.")
    if output is not None:
        require_writable(output)
    target, source = choose_device(device), open_data(data, workers=workers, max_bad_images=max_bad_images)
    network = open_model(model, **model_options(arch, pretrained, input_size, mean, std, ema))
    out.say(preprocessing_line(network.header.preprocessing))
    if classes is not None:
        network, source = pipeline.for_classes(network, source, class_names(classes))
    statistics = pipeline.analyze(
        network, source, device=target, images=images, seed=seed, reporter=Progressed()
    )
    summaries, outlook = summarise(statistics), pipeline.outlook(network, statistics)
    out.console.print(liveness(outlook), highlight=False)
    out.table(f"gates on {statistics.n} training images", *site_rows(summaries))
    for name, reason in outlook.refused.items():
        out.say(f"{name} cannot be folded: {reason}")
    if output is not None:
        statistics.save(output)
        out.say(f"statistics: {output}")
    out.document(
        {
            "n": statistics.n,
            "gates": to_dict(outlook),
            "sites": [to_dict(s) for s in summaries],
            "output": None if output is None else str(output),
        }
    )
