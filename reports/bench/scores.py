"""Which parts `excitation` is made of, how much MACs count, and what hidden units should do.

Decided without test images: how many of the training images that scores and repair have not seen are answered as by
the dense network. The bundled networks and those of `reports/trained/` (one saw MNIST, whose folder the environment's
`MNIST` names). Resumable.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich.progress import track

from reports.bench.common import FOLDER, NETWORKS, append_row, markdown_table, read_rows, write_report
from reports.bench.criteria import images_of, opened, trained
from se_prune import planning
from se_prune.artifact import Network
from se_prune.data import DataSource
from se_prune.data.batches import TensorImages
from se_prune.data.source import balanced_subset
from se_prune.evaluate import evaluate
from se_prune.layers import layer_costs
from se_prune.pipeline import analyze, apply_plan, structure
from se_prune.pipeline.measure import MEASURED_IMAGES, Structure, evidence_for
from se_prune.records import Budget, HiddenPolicy, Scores
from se_prune.scoring import Evidence, score
from se_prune.scoring.answer import answer_scores
from se_prune.scoring.signal import describe

CPU = torch.device("cpu")
Parts = tuple[str, ...]
Variant = tuple[Parts, float, HiddenPolicy]
#: No re-fit brings it back, as a share of the answer.
ANSWER = "answer-obs"
EXCITATION: Parts = (ANSWER, "gate-energy")
#: What a score is the geometric mean of.
SCORES: tuple[Parts, ...] = (
    EXCITATION,
    (ANSWER,),
    ("gate-obs", "gate-energy"),
    ("gate-obs",),
    ("gate-energy",),
    ("gate-fisher",),
    ("gate-mean",),
)
#: (parts, exponent of the MACs, what hidden units do); the other networks than the bundled are scored alone
PLANNED: tuple[Variant, ...] = (
    *((EXCITATION, power, "tie") for power in (0.0, 0.5, 0.75, 1.25)),
    (EXCITATION, planning.COST_POWER, "prune"),
    (EXCITATION, planning.COST_POWER, "keep"),
)
KEPT = (0.5, 0.3)
IMAGES = 8000
ROWS = FOLDER / "scores.jsonl"


def main() -> None:
    """Write `reports/scores.md`."""
    torch.set_num_threads(1)
    for name in (*NETWORKS, *trained()):
        variants = [(parts, planning.COST_POWER, "tie") for parts in SCORES]
        variants += PLANNED if name in NETWORKS else ()
        done = {(tuple(r["parts"]), r["power"], r["hidden"]) for r in read_rows(ROWS) if r["network"] == name}
        todo = [variant for variant in variants if variant not in done]
        for row in track(_rows(opened(name), images_of(name), todo), name, total=len(todo)):
            append_row(ROWS, {"network": name, **row})
        report()


def _rows(network: Network, data: DataSource, variants: Sequence[Variant]) -> Iterator[dict[str, Any]]:
    if not variants:
        return
    order = balanced_subset(data.train, len(data.train) - 1, 0)  # measured images stand first
    assert isinstance(order, TensorImages)
    unseen = order.take(torch.arange(MEASURED_IMAGES, MEASURED_IMAGES + IMAGES))
    found, full = structure(network), planning.COST_POWER
    evidence = evidence_of(network, data, found, CPU)
    dense = _classes(network, unseen)
    for parts, power, hidden in variants:
        scores, alike = _scores(parts, evidence), {}
        network.module.cpu()
        costs = layer_costs(network.module, found.cost.per_layer)
        for kept in KEPT:
            planning.COST_POWER = power
            chosen = planning.make_plan(
                found.couplings, costs, scores, Budget(kind="macs", value=kept), hidden=hidden
            )
            planning.COST_POWER = full
            applied = apply_plan(network, found, chosen, device=CPU, data=data, repair="layers")
            own = _classes(applied.network, unseen)
            alike[str(kept)] = sum(map(operator.eq, own, dense)) / len(dense)
        yield {"parts": parts, "power": power, "hidden": hidden, "alike": alike}


def _classes(network: Network, images: TensorImages) -> tuple[int, ...]:
    return evaluate(network.module, images, network.header.preprocessing, device=CPU).predictions


def _scores(parts: Parts, evidence: Evidence) -> Scores:
    """Return the geometric mean of scores."""
    found = [score(part, evidence) if part != ANSWER else _answer(evidence) for part in parts]
    groups = {
        name: tuple(
            math.prod(max(v, 0.0) for v in values) ** (1 / len(parts))
            for values in zip(*columns, strict=True)
        )
        for name in found[0].groups
        if (columns := [own.groups[name] for own in found])
    }
    return Scores(criterion=" × ".join(parts), comparable=all(own.comparable for own in found), groups=groups)


def _answer(evidence: Evidence) -> Scores:
    wanted = [c for c in evidence.couplings if c.group.prunable]
    return Scores(
        criterion=ANSWER, comparable=True, groups=answer_scores(evidence, describe(evidence), wanted)
    )


def evidence_of(
    network: Network, data: DataSource, found: Structure, device: torch.device, seed: int = 0
) -> Evidence:
    """Return what criteria may read, measured as `apply` measures it."""
    statistics = analyze(network, data, device=device, images=MEASURED_IMAGES, seed=seed)
    subset = balanced_subset(data.train, MEASURED_IMAGES, seed)
    return evidence_for(
        network,
        found,
        subset,
        device=device,
        seed=seed,
        statistics=statistics,
        energies=statistics.energies,
    )


def report() -> None:
    """Write `reports/scores.md` from the rows that are there."""
    rows = read_rows(ROWS)
    body = "# What `excitation` is made of, and how much MACs count\n\n"
    body += (
        f"Share of {IMAGES:,} training images, which neither scores nor repair have seen, that are answered as by the "
        "dense network, after a cut to 50 % and to 30 % of the MACs and least squares (`--repair layers`), no "
        "training, one choice of measured images. A score of several parts is their geometric mean; `excitation` is "
        f"that of {' and '.join(f'`{part}`' for part in EXCITATION)}. `{ANSWER}`: what no re-fit brings back, as a "
        "share of the answer (`se_prune/scoring/answer.py`); `gate-obs`: the same as a share of the signal. The power "
        "is the exponent of a channel's MACs in the price of a step (`planning.COST_POWER`, "
        f"{planning.COST_POWER:g} by default). Hidden units: `--hidden`.\n\n"
    )
    names = sorted({r["network"] for r in rows}, key=lambda n: (n not in NETWORKS, n))
    table = [
        [
            row["network"],
            " × ".join(row["parts"]),
            f"{row['power']:g}",
            row["hidden"],
            *(f"{100 * value:.2f} %" for value in row["alike"].values()),
        ]
        for row in sorted(rows, key=lambda r: names.index(r["network"]))
    ]
    columns = ["network", "score", "power", "hidden units", *(f"{100 * k:.0f} % of MACs" for k in KEPT)]
    body += markdown_table(columns, table)
    write_report("scores", "MNIST=… python -m reports.bench scores", body, rows)
