"""Do the gates help? `excitation` and the repair with their weights by gates, and the same without these.

A layer whose outputs a gate scales is worth what the gate lets through: the score multiplies its outputs' part of the
signal by E[s²], the gradient that says what they mean to the answer runs through the gate, and least squares weights
each of them, image by image, by s². A layer that reads what a gate has scaled, as in MobileNetV3, is scored on that,
s·u. Without the weights every gate counts as the same number in the score, the root mean square of its site's gates, so
that nothing tells channels or images apart and no layer gains weight against another; least squares has no weights.
Nothing is trained, and scales and shifts are not tuned, since that would know the gates again.
PaddleOCR's text-direction network takes part where the environment's `LINES_ONNX` names its file
(`ch_ppocr_mobile_v2.0_cls_infer.onnx` of rapidocr-onnxruntime), on rendered lines of text. Resumable.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import statistics as stats
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from rich.progress import track
from torch import nn

from reports.bench.answers import gain, right, top1
from reports.bench.common import FOLDER, NETWORKS, append_row, markdown_table, read_rows, write_report
from reports.bench.criteria import opened, trained
from reports.bench.onnx_in import CASES
from reports.bench.rendered import rendered
from reports.bench.scores import evidence_of
from se_prune.artifact import Network, clone
from se_prune.checkpoint import open_model
from se_prune.data import DataSource, open_data
from se_prune.gates.tap import OnGate, tap
from se_prune.gates.trace import trace
from se_prune.layers import layer_costs
from se_prune.pipeline import apply_plan, structure
from se_prune.pipeline.measure import Silent, Structure, channel_energies
from se_prune.pipeline.repairs import repair_network
from se_prune.planning import make_plan
from se_prune.records import Budget, GateSite, Scores
from se_prune.scoring import score
from se_prune.surgery.constants import multiply_of

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
    scores = {gates: _scores(network, data, found, seed, gates) for gates in {case[1] for case in cases}}
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


def _scores(network: Network, data: DataSource, found: Structure, seed: int, gates: bool) -> Scores:
    """Return the scores of `excitation`, with the gates or as if all of a site were the same."""
    evidence = evidence_of(network, data, found, CPU, seed)
    if gates:
        return score("excitation", evidence)
    statistics = evidence.statistics
    assert statistics is not None
    squares = {
        name: sums.s2.sum() / statistics.n / sums.s2.shape[1] for name, sums in statistics.sums.items()
    }
    levels = {name: float(square.sqrt()) for name, square in squares.items()}
    with unscaled(network.module, found, levels):
        energies = channel_energies(network, data, data.train, device=CPU, seed=seed)
        sums = {name: dataclasses.replace(own, s2=_alike(own.s2)) for name, own in statistics.sums.items()}
        alike = dataclasses.replace(statistics, sums=sums)
        with tap(network.module, found.sites, _constant(levels)):
            return score("excitation", dataclasses.replace(evidence, statistics=alike, energies=energies))


def _alike(sums: torch.Tensor) -> torch.Tensor:
    """Return sums per class and channel (K, C) with each class's mean over the channels in every channel."""
    return sums.mean(1, keepdim=True).expand_as(sums)


def _constant(levels: dict[str, float]) -> OnGate:
    """Let the gradient of u pass the multiply as if the gate were its site's level."""

    def replace(site: GateSite, u: torch.Tensor, s: torch.Tensor) -> torch.Tensor | None:
        if not u.requires_grad:
            return None
        fixed = s.detach()
        u.register_hook(lambda gradient: gradient / fixed.clamp_min(1e-12) * levels[site.name])
        return fixed

    return replace


@contextlib.contextmanager
def unscaled(model: nn.Module, found: Structure, levels: dict[str, float]) -> Iterator[None]:
    """While open, show hooks of a layer that reads s·u the features times the level; what it computes stays."""
    features: dict[str, torch.Tensor] = {}
    scaled: dict[str, torch.Tensor] = {}

    def keep(site: GateSite, u: torch.Tensor, _: torch.Tensor) -> None:
        features[site.name] = u / (1 / levels[site.name])  # a multiply would count as one of the network's

    def show(layer: str, site: str) -> Callable[..., tuple[torch.Tensor]]:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            (scaled[layer],) = inputs
            return (features.pop(site),)

        return hook

    def compute(layer: str) -> Callable[..., torch.Tensor]:
        def hook(module: nn.Module, *_: object) -> torch.Tensor:
            output: torch.Tensor = module.forward(scaled.pop(layer))
            return output

        return hook

    modules = dict(model.named_modules())
    with contextlib.ExitStack() as hooks:
        hooks.enter_context(tap(model, found.sites, keep))
        for layer, site in _readers(model, found).items():
            hooks.callback(modules[layer].register_forward_pre_hook(show(layer, site)).remove)
            hooks.callback(modules[layer].register_forward_hook(compute(layer)).remove)
        yield


def _readers(model: nn.Module, found: Structure) -> dict[str, str]:
    """Return the layers that read what a gate has scaled, each with the name of the site."""
    nodes = trace(model, found.example).nodes
    readers = {}
    for site in found.sites:
        index = multiply_of(nodes, site)
        for node in nodes:
            if index in node.inputs and node.op == "convolution":
                readers[node.layers[0]] = site.name
    return readers


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
