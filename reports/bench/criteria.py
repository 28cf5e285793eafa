"""Every criterion at equal MACs: accuracy after each repair, and after the same short fine-tune.

Beside them torch-pruning's own pruner, as its users run it: one ratio for every layer (local) or one threshold for all
(global), found by bisection so that the MACs agree, and the same fine-tune. Resumable: each finished row is a line of
`criteria.jsonl`; two processes of one thread each share the work. Networks that do not come with the package are
opened from `reports/trained/`, where the recipes `fashion_*.toml` and `mnist_*.toml` left them; those of MNIST run
where the environment's `MNIST` names the folder of its four idx files, and are fine-tuned on 12,000 of its training
images. Rows that keep 30 % of the MACs are repaired and fine-tuned; of those that keep half, `excitation`
alone is repaired, since that is most of a row's time.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import multiprocessing as mp
import os
import statistics as stats
from collections.abc import Sequence
from typing import Any

from rich.progress import track

from reports.bench.answers import images, paired_p, right, top1
from reports.bench.common import (
    FOLDER,
    NETWORKS,
    append_row,
    bundled,
    markdown_table,
    read_rows,
    write_report,
)
from se_prune.files import write_text
from se_prune.report.content import Figure, Section
from se_prune.report.html import render_study
from se_prune.report.plot import Bar, Plot, margin, scale
from se_prune.report.plot import names as names_axis
from se_prune.report.tables import Table

TRAINED = FOLDER / "trained"
#: How the names of networks that saw MNIST end, and how many of its training images the study takes.
ON_MNIST, MNIST_IMAGES = "_mnist", 12_000
CRITERIA = ("excitation", "random", "l1", "l2", "bn-scale", "fpgm", "lamp", "taylor", "hessian")
PRUNERS = ("torch-pruning, local", "torch-pruning, global")
#: Stands for a criterion in the row of the network as it was.
DENSE = "dense"
KEPT = (0.5, 0.3)
FINETUNED = (0.3,)
SEEDS = (0, 1, 2)
ROWS = FOLDER / "criteria.jsonl"
SETTINGS: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 128,
    "lr": 0.02,
    "ema_decay": 0.99,
    "label_smoothing": 0.0,
}
PHASES = {
    "none": "nothing after the cut",
    "bn": "BN recalibrated, no training",
    "refit": "repaired (least squares, BN, scales and shifts), no training",
    "finetuned": "the same, then fine-tuned",
}
#: How near the pruner's MACs have to come to the budget.
MACS_TOLERANCE = 0.005
TITLE = "Criteria at equal MACs"
COMMAND = "MNIST=… python -m reports.bench criteria"
Job = tuple[str, str, float, int]


def trained() -> tuple[str, ...]:
    """Return the names of the networks that were trained for this study and are there, with their images."""
    names = sorted(path.stem for path in TRAINED.glob("*.safetensors"))
    return tuple(name for name in names if "MNIST" in os.environ or not name.endswith(ON_MNIST))


def images_of(name: str) -> Any:
    """Return the images that a network was trained on, 12,000 for training."""
    from se_prune.data import open_data
    from se_prune.data.source import balanced_subset

    if not name.endswith(ON_MNIST):
        return open_data("fashion-mnist")
    data = open_data(os.environ["MNIST"])
    return dataclasses.replace(data, train=balanced_subset(data.train, MNIST_IMAGES, 0))


def opened(name: str) -> Any:
    """Open a bundled network, or one of `reports/trained/`."""
    from se_prune.checkpoint import open_model

    return bundled(name) if name in NETWORKS else open_model(str(TRAINED / f"{name}.safetensors"))


def run_job(job: Job) -> dict[str, Any]:
    """Make one row: a criterion of ours, or torch-pruning's own pruner."""
    import torch

    torch.set_num_threads(1)
    name, criterion, kept, seed = job
    if criterion == DENSE:
        accuracy = right(opened(name), images_of(name))
        return {"network": name, "criterion": criterion, "kept": kept, "seed": seed, DENSE: accuracy}
    return _by_pruner(job) if criterion in PRUNERS else _by_criterion(job)


def _by_criterion(job: Job) -> dict[str, Any]:
    """Cut and repair in each way, then fine-tune what least squares left."""
    import torch

    from se_prune.artifact import Network
    from se_prune.pipeline import apply_plan, plan, structure
    from se_prune.records import Budget, RepairMode

    name, criterion, kept, seed = job
    device, data, network = torch.device("cpu"), images_of(name), opened(name)
    found = structure(network)
    row: dict[str, Any] = {"network": name, "criterion": criterion, "kept": kept, "seed": seed}
    repairs: tuple[RepairMode, ...] = (
        ("bn", "refit") if kept in FINETUNED or criterion == CRITERIA[0] else ("bn",)
    )
    for repair in repairs:  # a criterion may count on the repair that follows
        chosen = plan(
            network,
            found,
            Budget(kind="macs", value=kept),
            criterion=criterion,
            device=device,
            data=data,
            repair=repair,
            seed=seed,
        )
        applied = apply_plan(network, found, chosen, device=device, data=data, repair=repair, seed=seed)
        if repair == "bn":
            row["none"] = right(Network(module=applied.cut, header=applied.network.header), data)
        row[repair] = right(applied.network, data)
        row["macs"] = applied.after.macs / applied.before.macs
    if kept in FINETUNED:
        row["finetuned"] = right(finetuned(applied.network, network, data, seed), data)
    return row


def finetuned(cut: Any, dense: Any, data: Any, seed: int = 0, **changes: Any) -> Any:
    """Return a cut network after the fine-tune of the study, distilled from the dense one, with changed settings."""
    import torch

    from se_prune.pipeline import finetune
    from se_prune.recipe import train_settings

    settings = train_settings(None, "finetune", **{**SETTINGS, **changes})
    return finetune(cut, data, settings, device=torch.device("cpu"), teacher=dense, seed=seed)


def _by_pruner(job: Job) -> dict[str, Any]:
    """Let torch-pruning cut to the same MACs; recalibrate; fine-tune what the pruner left."""
    import torch

    from se_prune.artifact import Network, clone
    from se_prune.data.source import balanced_subset
    from se_prune.pipeline.measure import MEASURED_IMAGES
    from se_prune.surgery.repair import recalibrate_bn

    name, pruner, kept, seed = job
    data, dense = images_of(name), opened(name)
    module, macs = _pruned(dense, kept, whole=pruner.endswith("global"))
    cut = Network(module=module, header=dense.header)
    row: dict[str, Any] = {"network": name, "criterion": pruner, "kept": kept, "seed": seed, "macs": macs}
    row["none"] = right(cut, data)
    if kept in FINETUNED:
        row["finetuned"] = right(finetuned(cut, dense, data, seed), data)
    recalibrated = Network(module=clone(module), header=dense.header)
    subset = balanced_subset(data.train, MEASURED_IMAGES, seed)
    recalibrate_bn(recalibrated.module, subset, dense.header.preprocessing, device=torch.device("cpu"))
    row["bn"] = right(recalibrated, data)
    return row


def _pruned(dense: Any, kept: float, *, whole: bool) -> tuple[Any, float]:
    """Return the network that torch-pruning's pruner leaves at a share of the MACs, and that share."""
    from se_prune.artifact import clone
    from se_prune.cost import count_cost
    from se_prune.gates.sites import find_sites
    from se_prune.pipeline import example_input

    preprocessing = dense.header.preprocessing
    example = example_input(preprocessing)

    def macs(model: Any) -> int:
        return count_cost(model, preprocessing, find_sites(model, example)).macs

    before, low, high = macs(dense.module), 0.0, 1.0
    best: tuple[float, Any, float] = (math.inf, None, 1.0)
    for _ in range(14):
        ratio = (low + high) / 2
        model = clone(dense.module).requires_grad_(True)
        _step(model, example, ratio, whole=whole)
        share = macs(model) / before
        best = min(best, (abs(share - kept), model, share), key=lambda b: b[0])
        if best[0] < MACS_TOLERANCE:
            break
        low, high = (ratio, high) if share > kept else (low, ratio)
    return best[1].eval(), best[2]


def _step(model: Any, example: Any, ratio: float, *, whole: bool) -> None:
    """Prune as torch-pruning's examples do: L2 norms of groups, the classifier ignored."""
    import torch
    import torch_pruning as tp

    outputs = model(example).shape[1]
    ignored = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == outputs]
    tp.pruner.MagnitudePruner(
        model,
        example,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        global_pruning=whole,
        ignored_layers=ignored,
    ).step()


def _key(row: dict[str, Any]) -> Job:
    return row["network"], row["criterion"], row["kept"], row["seed"]


def main() -> None:
    """Run what is missing, then write `reports/criteria.md`."""
    done = {_key(row) for row in read_rows(ROWS)}
    names = (*NETWORKS, *trained())
    jobs = [(name, DENSE, 1.0, 0) for name in names]
    jobs += [
        (name, criterion, kept, seed)
        for seed, kept, criterion, name in itertools.product(SEEDS, KEPT, (*CRITERIA, *PRUNERS), names)
    ]
    todo = [job for job in jobs if job not in done]
    with mp.get_context("spawn").Pool(2) as pool:
        for row in track(pool.imap_unordered(run_job, todo), "criteria", total=len(todo)):
            append_row(ROWS, row)
    report()


def report() -> None:
    """Write `reports/criteria.md`, `.json` and `.html` from the rows that are there."""
    rows = read_rows(ROWS)
    names = sorted({r["network"] for r in rows}, key=lambda n: (n not in NETWORKS, n))
    dense = {r["network"]: 100 * top1(r[DENSE]) for r in rows if r["criterion"] == DENSE}
    body, sections = [f"# {TITLE}\n\n{_head()}\n"], []
    for name in names:
        level = f"Dense: {dense[name]:.2f} %." if name in dense else ""
        tables = []
        for phase, title in PHASES.items():
            mine = [r for r in rows if r["network"] == name and phase in r]
            columns, lines = _table(mine, phase)
            body.append(f"## {name}, {title}\n")
            body.append(f"{level}\n\n{markdown_table(columns, lines)}".lstrip())
            tables.append(Table(caption=f"Top-1, {title}", head=columns, align="lrrrr", rows=lines))
        sections.append(
            Section(
                key=name,
                title=name,
                paragraphs=(level,) if level else (),
                figures=_figures([r for r in rows if r["network"] == name], name, dense.get(name)),
                tables=tuple(tables),
            )
        )
    body.append("In brackets: how many seeds.\n")
    summary = [{k: top1(v) if k in {*PHASES, DENSE} else v for k, v in row.items()} for row in rows]
    write_report("criteria", COMMAND, "\n".join(body), summary)
    said = f"{_head()} In brackets: how many seeds. Made by {COMMAND}.".replace("`", "")
    page = render_study(TITLE, said, sections)
    write_text(FOLDER / "criteria.html", page)


def _figures(rows: Sequence[dict[str, Any]], name: str, dense: float | None) -> tuple[Figure, ...]:
    """Return what each criterion loses at the smaller budget, without training and with it."""
    if dense is None:
        return ()
    plots = []
    for phase in ("refit", "finetuned"):
        bars: list[Bar] = []
        shown = [c for c in (*CRITERIA, *PRUNERS) if _values(rows, c, KEPT[-1], phase)]
        for row, criterion in enumerate(shown):
            losses = [value - dense for value in _values(rows, criterion, KEPT[-1], phase)]
            mean, spread = stats.mean(losses), stats.stdev(losses) if len(losses) > 1 else 0.0
            said = f"{mean:+.2f}".replace("-", "−")
            bars.append(
                Bar(
                    row=row,
                    start=0,
                    end=mean,
                    color="blue" if criterion == CRITERIA[0] else "grey",
                    tip=f"{criterion}: {said} points, {len(losses)} seeds",
                    label=said,
                    low=mean - spread if spread else None,
                    high=mean + spread if spread else None,
                )
            )
        if bars:
            low = 1.15 * min(bar.end if bar.low is None else bar.low for bar in bars)
            plots.append(
                Plot(
                    height=22 * len(shown),
                    x=scale(min(low, -0.5), 0.0, title="points of top-1 against the dense network"),
                    y=names_axis(shown),
                    marks=tuple(bars),
                    left=margin(shown),
                    subtitle=PHASES[phase],
                )
            )
    figure = Figure(
        key=f"lost-{name}",
        caption=f"What is lost at {100 * KEPT[-1]:.0f} % of the MACs; whiskers: one standard deviation over seeds",
        description="Bars of the accuracy lost with each criterion; the tables below have the same numbers.",
        panels=(tuple(plots),),
    )
    return (figure,) if plots else ()


def _values(rows: Sequence[dict[str, Any]], criterion: str, kept: float, phase: str) -> list[float]:
    return [
        100 * top1(r[phase]) for r in rows if (r["criterion"], r["kept"]) == (criterion, kept) and phase in r
    ]


def _head() -> str:
    missing = {"mobilenetv3_small", "se_resnext29"} - set(trained())
    text = (
        "Top-1 on the 10,000 test images, mean ± standard deviation over seeds (which choose the training images that "
        "are measured, and the order of fine-tuning). Same plan solver, same repair (least squares and BN on 2,048 "
        f"images, scales and shifts on up to 8,192), same fine-tune ({SETTINGS['epochs']} epochs on 12,000 images, "
        "distilled from the dense network). torch-pruning: its `MagnitudePruner` with group L2 norms, one ratio in "
        "every layer (local) or one threshold (global), at the ratio that leaves as many MACs; it has no repair, and "
        "is fine-tuned as it is. p: paired test over the test images (the mean over seeds of right or wrong, against "
        "`excitation`; two-sided normal)."
    )
    if missing:
        text += f" Not trained yet, and so not in the table: {', '.join(sorted(missing))}."
    return text


def _table(rows: Sequence[dict[str, Any]], phase: str) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Return the columns and lines of a table."""

    def pick(criterion: str, kept: float) -> dict[int, str]:
        return {r["seed"]: r[phase] for r in rows if (r["criterion"], r["kept"]) == (criterion, kept)}

    lines = []
    for criterion in (*CRITERIA, *PRUNERS):
        cells = []
        for kept in KEPT:
            own, best = pick(criterion, kept), pick(CRITERIA[0], kept)
            values = [100 * top1(bits) for bits in own.values()]
            spread = f" ± {stats.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{stats.mean(values):.2f}{spread} ({len(values)})" if values else "–")
            cells.append(_p_text(own, best) if criterion != CRITERIA[0] else "")
        lines.append((criterion, *cells))
    columns: list[str] = []
    for kept in KEPT:
        columns += [f"{100 * kept:.0f} % of MACs", "p"]
    return ("criterion", *columns), tuple(lines)


def _p_text(first: dict[int, str], second: dict[int, str]) -> str:
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return "–"
    p = paired_p([images(first[s]) - images(second[s]) for s in seeds])
    return "< 1e-16" if p < 1e-16 else f"{p:.2g}"
