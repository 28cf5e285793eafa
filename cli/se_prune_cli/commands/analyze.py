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
    Figures,
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
    command_line,
    figures_note,
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
    report: Annotated[
        Path | None, typer.Option(help="HTML file on the gates; .md and .json go beside it.")
    ] = None,
    figures: Figures = None,
    show: Annotated[
        str | None,
        typer.Option(
            help="Classes that report and figures draw, with commas between; the liveliest without."
        ),
    ] = None,
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
    from se_prune.pipeline.details import gate_report, require_known
    from se_prune.report import write_gate_figures, write_gate_report
    from se_prune.schema import to_dict

    out = Output(as_json)
    if images is not None and images < 1:
        raise UsageError(f"--images must be at least 1, got {images}.")
    for file in (output, report):
        if file is not None:
            require_writable(file)
    target, source = choose_device(device), open_data(data, workers=workers, max_bad_images=max_bad_images)
    network = open_model(model, **model_options(arch, pretrained, input_size, mean, std, ema))
    out.say(preprocessing_line(network.header.preprocessing))
    if classes is not None:
        network, source = pipeline.for_classes(network, source, class_names(classes))
    drawn = require_known(class_names(show or ""), source.classes)
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
    files: list[Path] = []
    if report is not None or figures is not None:
        record = gate_report(
            statistics,
            name=model,
            command=command_line(data),
            data=source.name,
            seed=seed,
            outlook=liveness(outlook),
            device=target,
            classes=drawn,
        )
        files = [] if report is None else write_gate_report(record, report)
        for file in files:
            out.say(str(file))
        drawings = [] if figures is None else write_gate_figures(record, figures)
        figures_note(out, figures, drawings)
        files += drawings
    out.document(
        {
            "n": statistics.n,
            "gates": to_dict(outlook),
            "sites": [to_dict(s) for s in summaries],
            "output": None if output is None else str(output),
            "files": [str(file) for file in files],
        }
    )
