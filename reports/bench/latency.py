"""Latency in onnxruntime: what half of the MACs wins, what alignment and folding add, and budgets of latency.

Networks run in turn (A B C … A B C …), batch 1, one thread; figures are ratios of medians with bootstrap intervals. A
finished row is a line of `reports/latency.jsonl`.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, Literal

import torch

from reports.bench.common import FOLDER, append_row, bundled, markdown_table, read_rows, write_report
from reports.bench.surgery import plain_cut
from se_prune.artifact import Network
from se_prune.checkpoint import open_model
from se_prune.cost import count_cost
from se_prune.device import processor
from se_prune.errors import BudgetError
from se_prune.gates.sites import find_sites
from se_prune.latency import interleaved
from se_prune.pipeline import Structure, Timing, choose_rounding, example_input, plan, structure
from se_prune.records import Budget, Plan
from se_prune.runtimes import require_runtime
from se_prune.runtimes.bench import ratio_of_medians
from se_prune.schema import to_dict
from se_prune.surgery.cut import cut
from se_prune.surgery.fold import fold

ROWS = FOLDER / "latency.jsonl"
CPU = torch.device("cpu")
REF, HALF = "zoo:se_resnet50", 0.5
ROUNDS, WARMUP = 40, 3
BUDGETS = (
    ("zoo:se_resnet20", 1),
    ("zoo:se_mobilenet_x025", 1),
    ("timm:mobilenetv3_large_100", 1),
    ("timm:mobilenetv3_large_100", 8),
    ("zoo:se_resnet50", 8),
)


def main() -> None:
    """Measure what is missing, then write `reports/latency.md`."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    done = {(row["what"], row.get("network"), row.get("round_to")) for row in read_rows(ROWS)}
    if ("halves", REF, None) not in done:
        append_row(ROWS, _halves())
    for ref, round_to in BUDGETS:
        if ("budget", ref, round_to) not in done:
            append_row(ROWS, _budget(ref, round_to))
    report()


def _opened(ref: str) -> Network:
    name = ref.partition(":")[2]
    return bundled(name) if name in {"se_resnet20", "se_mobilenet_x025"} else open_model(ref)


def _halves() -> dict[str, Any]:
    """Time SE-ResNet-50 and several ways to half of its MACs, in turn."""
    network = open_model(REF)
    found = structure(network)
    example, preprocessing = example_input(network.header.preprocessing), network.header.preprocessing
    modules = {"dense": network.module.eval()}
    for round_to in (1, 8, 16):
        modules[f"ours, multiples of {round_to}"] = _ours(network, found, round_to)
    sites = find_sites(modules["ours, multiples of 8"], example)
    constants = {s.name: torch.full((s.channels,), 0.5) for s in sites}
    modules["ours, multiples of 8, all gates folded"] = fold(
        modules["ours, multiples of 8"], example, constants
    )[0]
    for round_to in (None, 8):
        label = "plain torch-pruning" + ("" if round_to is None else f", round_to={round_to}")
        modules[label] = _plain_half(found.cost.macs, round_to)
    times = _timed({name: Network(module=m.eval(), header=network.header) for name, m in modules.items()})
    return {
        "what": "halves",
        "network": REF,
        "processor": processor(),
        "rounds": ROUNDS,
        "rows": [
            {
                "name": name,
                "macs": count_cost(modules[name], preprocessing).macs / found.cost.macs,
                "median_ms": sorted(own)[len(own) // 2],
                "speedup": ratio_of_medians(times["dense"], own),
            }
            for name, own in times.items()
        ],
    }


def _halved(network: Network, found: Structure, kind: Literal["macs", "latency"], round_to: int) -> Plan:
    budget = Budget(kind=kind, value=HALF)
    return plan(network, found, budget, criterion="l2", device=CPU, round_to=round_to, repair="none")


def _ours(network: Network, found: Structure, round_to: int) -> torch.nn.Module:
    return cut(network.module, found.example, _halved(network, found, "macs", round_to))


def _plain_half(dense_macs: int, round_to: int | None) -> torch.nn.Module:
    """Return what torch-pruning leaves at the ratio whose MACs are nearest to half of the dense ones."""
    tried: list[tuple[float, torch.nn.Module]] = []
    low, high = 0.2, 0.4
    for _ in range(5):
        ratio = (low + high) / 2
        network = open_model(REF)
        plain_cut(network.module, example_input(network.header.preprocessing), ratio, round_to)
        share = count_cost(network.module, network.header.preprocessing).macs / dense_macs
        tried.append((abs(share - HALF), network.module))
        low, high = (low, ratio) if share < HALF else (ratio, high)
    return min(tried, key=lambda one: one[0])[1]


def _timed(networks: dict[str, Network]) -> dict[str, list[float]]:
    runtime, runners = require_runtime("onnxruntime"), {}
    images = example_input(next(iter(networks.values())).header.preprocessing)
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, network) in enumerate(networks.items()):
            runners[name] = runtime.open(
                runtime.source(network, Path(folder), str(number), images), images, 1
            )
    times = interleaved(list(runners.values()), ROUNDS, WARMUP, device=CPU)
    return dict(zip(runners, times, strict=True))


def _budget(ref: str, round_to: int) -> dict[str, Any]:
    """Plan half of the latency; the plan says what it predicted and what came out."""
    network = _opened(ref)
    found = structure(network)
    auto = choose_rounding(network, found, Timing())
    started = time.perf_counter()
    row = {
        "what": "budget",
        "network": ref,
        "round_to": round_to,
        "auto": {"round_to": auto.round_to, "ms_per_gmac": auto.ms_per_gmac},
    }
    try:
        chosen = _halved(network, found, "latency", round_to)
    except BudgetError as error:
        return {**row, "within": False, "refused": str(error)}
    assert chosen.latency is not None
    return {
        **row,
        "seconds": time.perf_counter() - started,
        "macs": chosen.macs_after / chosen.macs_before,
        "within": chosen.latency.within,
        "latency": to_dict(chosen.latency),
    }


def report() -> None:
    """Write `reports/latency.md` from the rows that are there."""
    rows = read_rows(ROWS)
    halves = [row for row in rows if row["what"] == "halves"]
    budgets = [row for row in rows if row["what"] == "budget"]
    body = "# Latency\n\nonnxruntime, batch 1, one thread, random images; networks run in turn, ratios are of medians, "
    body += "with 95 % bootstrap intervals over rounds. Other work on the machine falls on all alike.\n"
    for row in halves:
        body += _halves_text(row)
    if budgets:
        body += _budgets_text(budgets)
    write_report("latency", "python -m reports.bench latency", body, rows)


def _halves_text(row: dict[str, Any]) -> str:
    text = f"\n## {row['network']} at half of its MACs\n\n224×224, random weights, {row['processor']}, "
    text += (
        f"{row['rounds']} rounds. Ours: channels by L2 norm. torch-pruning: `MagnitudePruner`, one ratio in every "
        "layer, tuned to the nearest to half of the MACs.\n\n"
    )
    return text + markdown_table(
        ["network", "MACs", "median", "as fast", "95 % interval"],
        [
            [
                r["name"],
                f"{100 * r['macs']:.1f} %",
                f"{r['median_ms']:.1f} ms",
                f"{r['speedup'][0]:.2f} ×",
                "{:.2f} to {:.2f}".format(*r["speedup"][1]),
            ]
            for r in row["rows"]
        ],
    )


def _budgets_text(rows: list[dict[str, Any]]) -> str:
    met = sum(row["within"] for row in rows)
    text = f'\n## Half of the latency as the budget\n\nWithin 5 % of it: {met} of {len(rows)}. "predicted" is what '
    text += (
        'the table of layer times says of the final plan without correction; "measured" the ratio of medians of the '
        "final network and the dense one, from a measurement of its own. `auto`: milliseconds per GMAC of the "
        "network's layers at half width, by multiple, and what `--round-to auto` takes.\n\n"
    )
    head = [
        "network",
        "round to",
        "dense",
        "predicted",
        "measured",
        "95 % interval",
        "within 5 %",
        "MACs",
        "plans",
    ]
    table = []
    for row in rows:
        if "refused" in row:
            table.append([row["network"], str(row["round_to"]), row["refused"], "", "", "", "no", "", ""])
            continue
        timed = row["latency"]
        table.append(
            [
                row["network"],
                str(row["round_to"]),
                f"{timed['dense_ms']:.3g} ms",
                f"{100 * timed['predicted_ms'] / timed['dense_ms']:.1f} %",
                f"{100 * timed['share']:.1f} %",
                "{:.1f} to {:.1f} %".format(*(100 * end for end in timed["share_ci95"])),
                "yes" if row["within"] else "no",
                f"{100 * row['macs']:.1f} %",
                str(timed["attempts"]),
            ]
        )
    text += markdown_table(head, table) + "\n"
    auto = {row["network"]: row["auto"] for row in rows}
    return text + markdown_table(
        ["network", "ms per GMAC by multiple", "auto"],
        [
            [name, ", ".join(f"{r}: {ms:.3g}" for r, ms in a["ms_per_gmac"].items()), str(a["round_to"])]
            for name, a in auto.items()
        ],
    )


if __name__ == "__main__":
    main()
