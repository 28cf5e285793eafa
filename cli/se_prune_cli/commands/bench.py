"""`se-prune bench`: latency, throughput and memory, in turn with another network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from se_prune import text
from se_prune_cli.output import (
    Arch,
    Ema,
    InputSize,
    Json,
    Mean,
    Model,
    Output,
    Pretrained,
    Progressed,
    Std,
    model_options,
    whole_numbers,
)
from se_prune_cli.tables import bench_rows, operation_rows

if TYPE_CHECKING:
    from se_prune.runtimes.bench import Setting


def command(
    model: Model,
    against: Annotated[
        str | None,
        typer.Option(help="Another MODEL to run in turn with; without, a cut artifact's own dense network."),
    ] = None,
    batch: Annotated[str, typer.Option(help="Images at once, with commas between.")] = "1",
    threads: Annotated[str, typer.Option(help="CPU threads, with commas between.")] = "1",
    runtime: Annotated[
        str, typer.Option(help="onnxruntime, openvino, torch, with commas between.")
    ] = "onnxruntime",
    rounds: Annotated[int, typer.Option(help="Timed rounds; every network runs once in each.")] = 50,
    memory: Annotated[bool, typer.Option(help="Measure peak memory, each in a process of its own.")] = True,
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="Show where the milliseconds of MODEL go, layer by layer.")
    ] = False,
    arch: Arch = None,
    pretrained: Pretrained = False,
    ema: Ema = False,
    input_size: InputSize = None,
    mean: Mean = None,
    std: Std = None,
    device: Annotated[str, typer.Option(help="Where torch runs: cpu, cuda or mps.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Time a network in one or several runtimes, interleaved with the dense one or another."""
    from se_prune.checkpoint import open_model
    from se_prune.device import choose_device
    from se_prune.runtimes import bench, profiled, require_runtime
    from se_prune.runtimes.bench import Setting, against_dense
    from se_prune.schema import to_dict

    out, show = Output(as_json), Progressed()
    chosen = [require_runtime(name.strip()) for name in runtime.split(",")]
    batches, counts = whole_numbers(batch, "--batch"), whole_numbers(threads, "--threads")
    settings = [Setting(runtime=r, batch=b, threads=t) for r in chosen for b in batches for t in counts]
    target = choose_device(device)
    network = open_model(model, **model_options(arch, pretrained, input_size, mean, std, ema))
    networks = [(model, network)]
    if against is not None:
        networks.append((against, open_model(against, input_size=network.header.preprocessing.input_size)))
    elif (dense := against_dense(network)) is not None:
        networks.append((f"{network.header.arch.ref}, dense", dense))
    with show.stage("bench", len(settings)) as update:
        rows = bench(networks, settings, rounds=rounds, memory=memory, device=target, on_setting=update)
    out.table("milliseconds per batch, interleaved rounds", *bench_rows(rows))
    document: dict[str, Any] = {"rows": [to_dict(row) for row in rows]}
    if per_layer:
        document["per_layer"] = [_layers(out, setting, profiled(network, setting)) for setting in settings]
    out.document(document)


def _layers(out: Output, setting: Setting, operations: Any) -> dict[str, Any]:
    """Print one profile; return it for the document."""
    from se_prune.runtimes.bench import alignment
    from se_prune.schema import to_dict

    title = f"{setting.runtime.name}, batch {setting.batch}, threads {setting.threads}"
    out.table(f"where the milliseconds go: {title}", *operation_rows(operations))
    effect = alignment(operations)
    out.console.print(
        f"{effect.layers} layers with a width that is no multiple of 8 take {text.milliseconds(effect.ms)} of "
        f"{text.milliseconds(effect.whole_ms)}; with multiples of 8 above these widths they would take "
        f"{text.milliseconds(effect.aligned_ms)}",
        highlight=False,
    )
    return {
        "runtime": setting.runtime.name,
        "batch_size": setting.batch,
        "threads": setting.threads,
        "operations": [to_dict(operation) for operation in operations],
        "off_multiples_of_8": {"layers": effect.layers, "ms": effect.ms, "aligned_ms": effect.aligned_ms},
    }
