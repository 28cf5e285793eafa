"""`se-prune apply`: take channels out for real."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from se_prune.records import HiddenPolicy, RepairMode
from se_prune_cli.output import (
    Arch,
    Classes,
    Device,
    Ema,
    InputSize,
    Json,
    MaxBadImages,
    Mean,
    Model,
    OptionalData,
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
from se_prune_cli.tables import costs, fold_rows, latency_line, plan_rows, refit_line, tuned_line

if TYPE_CHECKING:
    from se_prune.pipeline import Applied


def command(
    model: Model,
    sparsity: Annotated[float | None, typer.Option(help="Share of the channels to remove, 0 to 1.")] = None,
    macs: Annotated[float | None, typer.Option(help="Fraction of the MACs to keep, 0 to 1.")] = None,
    params: Annotated[float | None, typer.Option(help="Fraction of the parameters to keep, 0 to 1.")] = None,
    latency: Annotated[
        float | None, typer.Option(help="Fraction of the dense network's latency to keep, 0 to 1; measured.")
    ] = None,
    latency_ms: Annotated[
        float | None, typer.Option(help="Milliseconds that one image may take; measured.")
    ] = None,
    runtime: Annotated[
        str, typer.Option(help="Where latency is measured: onnxruntime, openvino, torch.")
    ] = "onnxruntime",
    threads: Annotated[int, typer.Option(help="CPU threads on which latency is measured.")] = 1,
    data: OptionalData = None,
    stats: Annotated[Path | None, typer.Option(help="Statistics file of `analyze`.")] = None,
    criterion: Annotated[str, typer.Option(help="How channels are scored.")] = "excitation",
    round_to: Annotated[
        str,
        typer.Option(
            help="Keep multiples of this many channels (hidden units aside); auto measures what the runtime likes."
        ),
    ] = "1",
    min_channels: Annotated[int, typer.Option(help="No group keeps fewer.")] = 2,
    hidden: Annotated[
        HiddenPolicy,
        typer.Option(
            help="Hidden units leave by their own scores, tied to the channels they gate, or are kept."
        ),
    ] = "tie",
    fold_gates: Annotated[
        str,
        typer.Option(
            help="Replace gates by constants: none, auto (the cheapest), all, how many, or names "
            "with commas between. Needs no budget."
        ),
    ] = "none",
    fold_tolerance: Annotated[
        float | None,
        typer.Option(
            help="auto folds while the predicted losses add up to less than this share of the logits' energy; "
            "0.005 without."
        ),
    ] = None,
    repair: Annotated[
        RepairMode,
        typer.Option(
            help="After the cut: least squares, BN statistics, then scales and shifts (refit); the same without the "
            "last (layers); BN statistics alone (bn); or none."
        ),
    ] = "refit",
    classes: Classes = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan and prove, write nothing.")] = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The artifact to write.")] = None,
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
    """Remove the channels that matter least until the budget is met, and fold gates; it is checked against its twin."""
    from se_prune import artifact, pipeline
    from se_prune.checkpoint import open_model
    from se_prune.data import open_data
    from se_prune.device import choose_device
    from se_prune.errors import UsageError
    from se_prune.files import require_writable
    from se_prune.folding import parse_request
    from se_prune.gates.statistics import Statistics
    from se_prune.planning import check_ranges
    from se_prune.recipe import budget_of, parse_round_to
    from se_prune.schema import to_dict
    from se_prune.scoring.registry import find

    out, show, folds = Output(as_json), Progressed(), parse_request(fold_gates, fold_tolerance)
    budget = budget_of(
        sparsity, macs, params, latency=latency, latency_ms=latency_ms, folds=folds is not None
    )
    rounding, timing = parse_round_to(round_to), pipeline.Timing(runtime=runtime, threads=threads)
    check_ranges(budget, 1 if rounding == "auto" else rounding, min_channels)
    if output is None and not dry_run:
        raise UsageError(
            "give -o OUT.safetensors for the pruned network, or --dry-run to see the plan alone."
        )
    if classes is not None and data is None:
        raise UsageError("--classes takes its names from the data: add --data.")
    cuts = folds is None or budget.kind != "sparsity" or budget.value > 0
    needs = find(criterion).wants(repair) if cuts else frozenset()
    if output is not None and not dry_run:
        require_writable(output)
    target = choose_device(device)
    source = None if data is None else open_data(data, workers=workers, max_bad_images=max_bad_images)
    statistics = None if stats is None else Statistics.load(stats)
    if source is None:
        _require_no_images(
            criterion, needs, repair=not dry_run and repair != "none", folds=folds is not None, stats=stats
        )
    network = open_model(model, **model_options(arch, pretrained, input_size, mean, std, ema))
    out.say(preprocessing_line(network.header.preprocessing))
    if classes is not None and source is not None:
        network, source = pipeline.for_classes(network, source, class_names(classes))
    with show.stage("gate sites, groups and cost", None):
        found = pipeline.structure(network)
    plan = pipeline.plan(
        network,
        found,
        budget,
        criterion=criterion,
        device=target,
        data=source,
        statistics=statistics,
        round_to=pipeline.resolve_rounding(rounding, network, found, timing, show),
        min_channels=min_channels,
        hidden=hidden,
        repair=repair,
        folds=folds,
        timing=timing,
        seed=seed,
        reporter=show,
    )
    applied = pipeline.apply_plan(
        network,
        found,
        plan,
        device=target,
        data=source,
        repair="none" if dry_run else repair,
        seed=seed,
        reporter=show,
    )
    _show(out, applied)
    if folds is not None and not found.sites:
        out.say("the network has no gate sites, so there is nothing to fold")
    if not dry_run and output is not None:
        artifact.save(output, applied.network)
        out.say(f"pruned network: {output}")
    out.document(
        {
            "before": {"params": applied.before.params, "macs": applied.before.macs},
            "after": {"params": applied.after.params, "macs": applied.after.macs},
            "max_abs_diff_masked": applied.max_abs_diff_masked,
            "refit": [to_dict(fit) for fit in applied.refits],
            "tuned": list(applied.tuned),
            "channels_removed": plan.channels_removed,
            "sites_folded": plan.sites_folded,
            "output": None if dry_run else str(output),
            "plan": to_dict(plan),
        }
    )


def _show(out: Output, applied: Applied) -> None:
    """Print what leaves, what it saves, the proof and the repair."""
    plan = applied.plan
    if plan.groups:
        out.table("channels", *plan_rows(plan))
    if plan.sites:
        out.table("gates", *fold_rows(plan.sites))
    out.table("cost of one image", *costs(applied.before, applied.after))
    if plan.latency is not None:
        out.console.print(latency_line(plan.latency), highlight=False)
    twin = "its masked twin" if not plan.sites_folded else "its masked twin with constant gates"
    out.say(f"equals {twin}: largest difference {applied.max_abs_diff_masked:.1e} in float64")
    if applied.refits:
        out.say(refit_line(applied.refits))
    if applied.tuned:
        out.say(tuned_line(applied.tuned))


def _require_no_images(
    criterion: str, needs: Collection[str], *, repair: bool, folds: bool, stats: Path | None
) -> None:
    """Check that nothing has to be measured on images.

    Raises:
        UsageError: Something has; the message names the way out.
    """
    from se_prune.errors import UsageError

    if repair:
        raise UsageError(
            "the repair after the cut needs training images: add --data, or --repair none to leave it out."
        )
    if set(needs) - {"energies"} or (needs and stats is None):
        raise UsageError(
            f"--criterion {criterion} measures images: add --data; "
            "--criterion gate-energy does with --stats of `se-prune analyze`, l2 without either."
        )
    if folds and stats is None:
        raise UsageError("--fold-gates measures the gates: add --data, or --stats of `se-prune analyze`.")
