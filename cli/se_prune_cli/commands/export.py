"""`se-prune export`: the network as a file of an edge runtime, checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from se_prune import text
from se_prune_cli.output import (
    Arch,
    Data,
    Ema,
    InputSize,
    Json,
    MaxBadImages,
    Mean,
    Model,
    Output,
    Pretrained,
    Progressed,
    Std,
    Workers,
    model_options,
)


def command(
    model: Model,
    data: Data,
    to: Annotated[str, typer.Option("--to", help="onnx")] = "onnx",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The file to write; MODEL with the target's suffix.")
    ] = None,
    images: Annotated[int, typer.Option(help="Training images to check the file on.")] = 256,
    arch: Arch = None,
    pretrained: Pretrained = False,
    ema: Ema = False,
    input_size: InputSize = None,
    mean: Mean = None,
    std: Std = None,
    workers: Workers = None,
    max_bad_images: MaxBadImages = None,
    as_json: Json = False,
) -> None:
    """Write a network for a runtime and check it against torch on real images."""
    from se_prune import pipeline
    from se_prune.checkpoint import open_model
    from se_prune.data import open_data
    from se_prune.errors import UsageError
    from se_prune.export import export
    from se_prune.pipeline.run import real_images
    from se_prune.schema import to_dict

    out = Output(as_json)
    if images < 1:
        raise UsageError(f"--images must be at least 1, got {images}.")
    source = open_data(data, workers=workers, max_bad_images=max_bad_images)
    network = open_model(model, **model_options(arch, pretrained, input_size, mean, std, ema))
    source = pipeline.matching(network, source)
    target = output or Path(f"{Path(model.rpartition(':')[2]).stem}.{to}")
    if target.exists() and target.resolve() == Path(model).resolve():
        raise UsageError(f"{target} is MODEL itself; give another file with -o.")
    with Progressed().stage(f"export to {to}", None):
        result = export(network, to, target, real_images(source.train, network, images))
    out.table(
        f"{to}, checked on {result.images_checked} training images",
        ["file", "bytes", "largest difference", "same top-1", "latency, batch 1, 1 thread"],
        [
            [
                result.output,
                text.file_size(result.bytes),
                f"{result.max_abs_diff:.1e}",
                text.percent(result.top1_agreement),
                f"{result.latency_ms:.2f} ms",
            ]
        ],
    )
    out.document(to_dict(result))
