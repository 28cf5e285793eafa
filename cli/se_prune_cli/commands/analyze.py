"""`se-prune analyze`: what the gates say on training images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from se_prune_cli.tables import sensitivity_rows, site_rows

if TYPE_CHECKING:
    import torch

    from se_prune.artifact import Network
    from se_prune.data import DataSource
    from se_prune.gates.statistics import Statistics
    from se_prune.results import GroupSensitivity

#: Groups in the table where none were asked for; reports and `--json` have all.
SHOWN = 8


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
    sensitivity: Annotated[
        str | None,
        typer.Option(
            metavar="CRITERION",
            help="List what every channel group is predicted to lose by this criterion; without, the most sensitive by "
            "gate-energy, which takes no further pass over the images.",
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
    from se_prune.pipeline.sensitivity import MEASURED, require_comparable
    from se_prune.report import write_gate_figures, write_gate_report
    from se_prune.results import SENSITIVITY_SHARES
    from se_prune.schema import to_dict

    out = Output(as_json)
    if images is not None and images < 1:
        raise UsageError(f"--images must be at least 1, got {images}.")
    criterion = sensitivity or MEASURED
    require_comparable(criterion)
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
    groups = _sensitivity(network, source, statistics, sensitivity, device=target, seed=seed, out=out)
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
            sensitivity=groups,
            criterion=criterion,
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
            "sensitivity": {
                "criterion": criterion,
                "shares": list(SENSITIVITY_SHARES),
                "groups": [to_dict(group) for group in groups],
            },
            "output": None if output is None else str(output),
            "files": [str(file) for file in files],
        }
    )


def _sensitivity(
    network: Network,
    data: DataSource,
    statistics: Statistics,
    asked: str | None,
    *,
    device: torch.device,
    seed: int,
    out: Output,
) -> tuple[GroupSensitivity, ...]:
    """Print and return what channel groups are predicted to lose; nothing where they cannot be traced."""
    from se_prune import pipeline
    from se_prune.errors import SurgeryError
    from se_prune.pipeline.sensitivity import MEASURED

    criterion = asked or MEASURED
    try:
        groups = pipeline.sensitivities(
            network, data, statistics, criterion=criterion, device=device, seed=seed, reporter=Progressed()
        )
    except SurgeryError as error:
        out.say(f"what channel groups would lose is not known: {error}")
        return ()
    shown = groups if asked else groups[:SHOWN]
    if shown:
        out.table(f"predicted loss of channel groups by {criterion}", *sensitivity_rows(shown))
    if len(shown) < len(groups):
        out.say(
            f"the {len(shown)} most sensitive of {len(groups)} groups, without repair; all, with it: "
            "--sensitivity excitation"
        )
    return groups
