"""`se-prune sweep`: accuracy against cost over budgets and criteria."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from se_prune import text
from se_prune.records import RepairMode
from se_prune_cli.output import (
    Arch,
    Data,
    Device,
    Ema,
    Json,
    Model,
    Output,
    Pretrained,
    Progressed,
    Seed,
    command_line,
)
from se_prune_cli.whole import Shape, Steps, given

if TYPE_CHECKING:
    from se_prune.pipeline.sweep import Point
    from se_prune.records import Budget


def command(
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder; finished runs in it are kept.")],
    macs: Annotated[
        str | None, typer.Option(help="Fractions of the MACs to keep, with commas between.")
    ] = None,
    params: Annotated[str | None, typer.Option(help="Fractions of the parameters to keep.")] = None,
    sparsity: Annotated[str | None, typer.Option(help="Shares of the channels to remove.")] = None,
    latency: Annotated[
        str | None, typer.Option(help="Fractions of the dense network's latency to keep.")
    ] = None,
    criterion: Annotated[str, typer.Option(help="Criteria, with commas between.")] = "excitation",
    round_to: Annotated[str, typer.Option(help="Keep multiples of this many channels, or auto.")] = "1",
    fold_gates: Annotated[str, typer.Option(help="As in `apply`.")] = "none",
    repair: Annotated[RepairMode, typer.Option(help="As in `apply`.")] = "refit",
    finetune_epochs: Annotated[int, typer.Option(help="Epochs of distillation after each cut.")] = 0,
    steps: Steps = None,
    shape: Shape = None,
    runtime: Annotated[str, typer.Option(help="Where a latency budget is measured.")] = "onnxruntime",
    threads: Annotated[int, typer.Option(help="CPU threads on which it is measured.")] = 1,
    latency_rounds: Annotated[int, typer.Option(help="Rounds in which each result is timed; 0: none.")] = 50,
    arch: Arch = None,
    pretrained: Pretrained = False,
    ema: Ema = False,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Run several budgets and criteria and compare them: accuracy against MACs and measured latency."""
    from se_prune.pipeline.sweep import pareto, sweep
    from se_prune.recipe import ApplyTable, ModelTable, RunRecipe, parse_round_to, train_settings

    out, show = Output(as_json), Progressed()
    budgets = _budgets(sparsity=sparsity, macs=macs, params=params, latency=latency)
    base = RunRecipe(
        model=ModelTable(ref=model, arch=arch, pretrained=pretrained, ema=ema),
        data=data,
        apply=ApplyTable(
            runtime=runtime,
            threads=threads,
            round_to=parse_round_to(round_to),
            repair=repair,
            fold_gates=fold_gates,
            **given(steps=steps, shape=shape),
        ),
        finetune=train_settings(None, "finetune", epochs=finetune_epochs) if finetune_epochs else None,
        export=("onnx",) if latency_rounds else (),
        seed=seed,
        latency_rounds=latency_rounds,
    )
    found = sweep(
        base,
        budgets,
        [name.strip() for name in criterion.split(",")],
        output,
        command=command_line(data),
        device=device,
        reporter=show,
        on_point=lambda point: out.say(_line(point)),
    )
    fronts = pareto(found.points, lambda p: p.run.cost_after.macs if p.run else 0)
    timed = pareto(found.points, lambda p: 1 / (p.speedup or 1))
    rows = [_row(point, point.folder in fronts, point.folder in timed) for point in found.points]
    out.table("sweep", list(rows[0]), [[str(value) for value in row.values()] for row in rows])
    out.say(f"comparison: {found.files[0]}")
    out.document(
        {
            "points": [_document(p, p.folder in fronts, p.folder in timed) for p in found.points],
            "files": [str(file) for file in found.files],
        }
    )


def _budgets(**lists: str | None) -> list[Budget]:
    """Return the budgets of the one option that was given.

    Raises:
        UsageError: None or several were given, or a value is no number.
    """
    from se_prune.errors import UsageError
    from se_prune.preprocessing import parse_floats
    from se_prune.records import Budget

    given = [(kind, values) for kind, values in lists.items() if values is not None]
    if len(given) != 1:
        raise UsageError(
            "give one list of budgets: --macs, --params, --sparsity or --latency, such as --macs 0.7,0.5,0.3."
        )
    kind, values = given[0]
    kinds: Any = kind
    return [Budget(kind=kinds, value=value) for value in parse_floats(values, f"--{kind}")]


def _line(point: Point) -> str:
    name = f"{point.criterion}, {point.budget.option.removeprefix('--')}"
    if point.run is None:
        return f"{name}: {point.refused}"
    return f"{name}: top-1 {text.percent(point.top1, 2)}" + (", kept from before" if point.kept else "")


def _row(point: Point, front: bool, timed: bool) -> dict[str, str]:
    """Return one line of the table."""
    run = point.run
    if run is None:
        empty = dict.fromkeys(("top-1", "change", "MACs kept", "as fast"), text.MISSING)
        return {
            "criterion": point.criterion,
            "budget": f"{point.budget.value:g}",
            **empty,
            "front": "not reachable",
        }
    dense = run.stages[0].evaluation.top1
    speedup = point.speedup
    fronts = [name for name, on in (("MACs", front), ("latency", timed and speedup is not None)) if on]
    return {
        "criterion": point.criterion,
        "budget": f"{point.budget.value:g}",
        "top-1": text.percent(point.top1, 2),
        "change": text.points(point.top1 - dense),
        "MACs kept": text.share(run.cost_after.macs, run.cost_before.macs),
        "as fast": text.MISSING if speedup is None else f"{speedup:.2f} ×",
        "front": ", ".join(fronts),
    }


def _document(point: Point, front: bool, timed: bool) -> dict[str, Any]:
    """Return one point as JSON values."""
    from se_prune.schema import to_dict

    values: dict[str, Any] = {
        "criterion": point.criterion,
        "budget": to_dict(point.budget),
        "folder": str(point.folder),
        "kept": point.kept,
        "refused": point.refused,
    }
    if point.run is not None:
        values |= {
            "top1_before": point.run.stages[0].evaluation.top1,
            "top1": point.top1,
            "macs": point.run.cost_after.macs / point.run.cost_before.macs,
            "speedup": point.speedup,
            "pareto_macs": front,
            "pareto_latency": timed and point.speedup is not None,
        }
    return values
