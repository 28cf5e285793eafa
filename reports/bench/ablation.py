"""Do the gates help? `excitation` and the repair with their weights by gates, and the same without these.

A layer whose outputs a gate scales is worth what the gate lets through: the score multiplies its outputs by E[s²], and
least squares weights each of them, image by image, by s². Here either is left out. What a layer reads is measured
behind the gate in any case. So this tells nothing of gates that scale what the next layer reads, as in MobileNetV3 and
in PaddleOCR's network: there the score has no such weights, and is the same. Nothing is trained, and scales and shifts
are not tuned, since that would know the gates again. PaddleOCR's text-direction network takes part where the
environment's `LINES_ONNX` names its file (`ch_ppocr_mobile_v2.0_cls_infer.onnx` of rapidocr-onnxruntime), on rendered
lines of text. Resumable.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import statistics as stats
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich.progress import track

from reports.bench.answers import gain, right, top1
from reports.bench.common import FOLDER, NETWORKS, append_row, markdown_table, read_rows, write_report
from reports.bench.criteria import opened, trained
from reports.bench.onnx_in import CASES
from reports.bench.rendered import rendered
from reports.bench.scores import evidence_of
from se_prune.artifact import Network, clone
from se_prune.checkpoint import open_model
from se_prune.data import DataSource, open_data
from se_prune.layers import layer_costs
from se_prune.pipeline import apply_plan, structure
from se_prune.pipeline.measure import Silent
from se_prune.pipeline.repairs import repair_network
from se_prune.planning import make_plan
from se_prune.records import Budget
from se_prune.scoring import score

CPU = torch.device("cpu")
KEPT = (0.5, 0.3)
SEEDS = (0, 1, 2)
#: (the score has the weights, the repair has them)
VARIANTS = ((True, True), (False, True), (False, False))
LINES, TRAIN_LINES, TEST_LINES = CASES[0], 4096, 4000
ROWS = FOLDER / "ablation.jsonl"
Key = tuple[str, float, int, bool, bool]


def networks() -> tuple[str, ...]:
    """Return the networks that are there, with their images."""
    lines = (LINES.name,) if LINES.variable in os.environ else ()
    return (*NETWORKS, *(name for name in trained() if not name.endswith("_mnist")), *lines)


def pair(name: str) -> tuple[Network, DataSource]:
    """Open a network and its images."""
    if name != LINES.name:
        return opened(name), open_data("fashion-mnist")
    network = open_model(os.environ[LINES.variable], **LINES.options)
    return network, rendered(LINES.name, LINES.render, LINES.classes, TRAIN_LINES, TEST_LINES)


def main() -> None:
    """Make the rows that are missing, then write `reports/ablation.md`."""
    torch.set_num_threads(1)
    for name, seed in track(list(itertools.product(networks(), SEEDS)), "ablation"):
        done = {_key(row) for row in read_rows(ROWS)}
        cases = [(k, *v) for k, v in itertools.product(KEPT, VARIANTS) if (name, k, seed, *v) not in done]
        for row in _rows(name, seed, cases) if cases else ():
            append_row(ROWS, row)
        report()
    report()


def _key(row: dict[str, Any]) -> Key:
    return row["network"], row["kept"], row["seed"], row["score"], row["repair"]


def _rows(name: str, seed: int, cases: Sequence[tuple[float, bool, bool]]) -> Iterator[dict[str, Any]]:
    network, data = pair(name)
    found = structure(network)
    evidence = evidence_of(network, data, found, CPU, seed)
    blind = dataclasses.replace(evidence, statistics=None)
    wanted = {case[1] for case in cases}
    scores = {gates: score("excitation", evidence if gates else blind) for gates in wanted}
    costs = layer_costs(network.module.cpu(), found.cost.per_layer)
    dense = right(network, data)
    for kept, in_score, in_repair in cases:
        plan = make_plan(found.couplings, costs, scores[in_score], Budget(kind="macs", value=kept))
        applied = apply_plan(network, found, plan, device=CPU, data=data, repair="none", seed=seed)
        module = clone(applied.cut)
        repair_network(
            network,
            module,
            found if in_repair else dataclasses.replace(found, sites=()),
            plan,
            mode="layers",
            train=data.train,
            seed=seed,
            device=CPU,
            show=Silent(),
        )
        yield {
            "network": name,
            "kept": kept,
            "seed": seed,
            "score": in_score,
            "repair": in_repair,
            "macs": applied.after.macs / applied.before.macs,
            "dense": dense,
            "top1": right(Network(module=module, header=applied.network.header), data),
        }


def report() -> None:
    """Write `reports/ablation.md` from the rows that are there."""
    rows = read_rows(ROWS)
    body = "# What weighting by gates adds\n\n" + __doc__.partition("\n\n")[2].strip() + "\n\n"
    body += (
        "Top-1 on the test images, mean ± deviation over seeds (which choose the images that are measured); the gain "
        "of the weights in points with half its 95 % interval over the test images, and p (paired over the test "
        "images, seeds averaged over; two-sided normal).\n\n"
    )
    names = sorted({r["network"] for r in rows}, key=lambda n: (n not in NETWORKS, n))
    columns = ["network", "MACs kept", "dense", "weights in both", "in the repair alone", "in neither"]
    lines = [_line(rows, name, kept) for name, kept in itertools.product(names, KEPT)]
    body += markdown_table(
        [*columns, "gain of those in the score", "p", "gain of both", "p"], [line for line in lines if line]
    )
    summary = [{k: top1(v) if k in {"dense", "top1"} else v for k, v in row.items()} for row in rows]
    write_report("ablation", "LINES_ONNX=… python -m reports.bench ablation", body, summary)


def _line(rows: Sequence[dict[str, Any]], name: str, kept: float) -> list[str]:
    mine = [r for r in rows if (r["network"], r["kept"]) == (name, kept)]
    answers = {v: {r["seed"]: r["top1"] for r in mine if (r["score"], r["repair"]) == v} for v in VARIANTS}
    seeds = sorted(set.intersection(*(set(a) for a in answers.values())))
    if not seeds:
        return []
    cells = []
    for own in answers.values():
        values = [100 * top1(own[s]) for s in seeds]
        spread = f" ± {stats.stdev(values):.2f}" if len(values) > 1 else ""
        cells.append(f"{stats.mean(values):.2f}{spread} ({len(values)})")
    best = answers[VARIANTS[0]]
    for variant in VARIANTS[1:]:
        mean, half, _, p = gain([(answers[variant][s], best[s]) for s in seeds])
        cells += [f"{mean:+.2f} ± {half:.2f}", f"{p:.2g}"]
    return [name, f"{100 * kept:.0f} %", f"{100 * top1(mine[0]['dense']):.2f}", *cells]
