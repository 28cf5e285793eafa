"""`se-prune export`: the network as a file of an edge runtime, checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from se_prune_cli.exported import exported_rows, int8_rows, noise_rows
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

TARGETS = "onnx, openvino, executorch, litert, ncnn, coreml, torch"


def command(
    model: Model,
    data: Data,
    to: Annotated[str, typer.Option("--to", help=TARGETS)] = "onnx",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The file to write; MODEL with the target's suffix.")
    ] = None,
    images: Annotated[int, typer.Option(help="Training images to check the file on.")] = 256,
    int8: Annotated[
        bool,
        typer.Option("--int8", help="Whole numbers of 8 bits; compared with float on all test images."),
    ] = False,
    calibration: Annotated[int, typer.Option(help="Other training images, for the ranges of int8.")] = 256,
    max_drop: Annotated[
        float | None,
        typer.Option(help="Top-1 that int8 may lose, 0.005 for half a point; above, exit code 3, no file."),
    ] = None,
    with_preprocessing: Annotated[
        bool, typer.Option("--with-preprocessing", help="Bytes of images in, probabilities out.")
    ] = False,
    layout: Annotated[str, typer.Option(help="Of these bytes: nhwc or nchw.")] = "nhwc",
    runner: Annotated[
        bool,
        typer.Option("--runner", help="Write predict.py beside it, which needs numpy and the runtime alone."),
    ] = False,
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
    from se_prune.export import require_target, suffix_of
    from se_prune.export.base import Pixels
    from se_prune.schema import to_dict

    out = Output(as_json)
    if layout not in {"nhwc", "nchw"}:
        raise UsageError(f"--layout takes nhwc or nchw, got '{layout}'.")
    pixels = cast("Pixels", layout) if with_preprocessing else None
    require_target(to, quantised=int8, pixels=pixels)
    source = open_data(data, workers=workers, max_bad_images=max_bad_images)
    network = open_model(model, **model_options(arch, pretrained, input_size, mean, std, ema))
    target = output or Path(f"{Path(model.rpartition(':')[2]).stem}{suffix_of(to)}")
    if target.exists() and target.resolve() == Path(model).resolve():
        raise UsageError(f"{target} is MODEL itself; give another file with -o.")
    with Progressed().stage(f"export to {to}", None):
        result = pipeline.export_network(
            network,
            to,
            target,
            source,
            images=images,
            int8=int8,
            calibration=calibration,
            max_drop=max_drop,
            pixels=pixels,
            with_runner=runner,
        )
    out.table(f"{to}, checked on {result.images_checked} training images", *exported_rows(result))
    if result.note:
        out.say(result.note)
    if result.int8 is not None:
        out.table(f"int8 and float, {result.int8.n} test images", *int8_rows(result, result.int8))
        if result.int8.layers:
            out.table("noise of int8, layer by layer", *noise_rows(result.int8.layers))
    if runner:
        out.say(f"python {target.with_name('predict.py')} {target} IMAGES… names the classes of images")
    out.document(to_dict(result))
