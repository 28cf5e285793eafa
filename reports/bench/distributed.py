"""Two gloo processes on two cores against one: are sums and Gram matrices the same, and how much faster is training?

Each process computes on one thread. The machine is not ours alone, so one process and two are timed in turn, the second
process waiting while the first works alone; what other work took meanwhile is noted, and medians over quiet rounds are
what counts. Starts add rounds until there are enough of them.
"""

from __future__ import annotations

import contextlib
import os
import socket
import statistics as stats
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from reports.bench.common import (
    FOLDER,
    NETWORKS,
    append_row,
    bundled,
    markdown_table,
    read_rows,
    write_report,
)
from se_prune import artifact, distributed
from se_prune.artifact import Network
from se_prune.data import open_data
from se_prune.data.source import Split, balanced_subset, shared_batches
from se_prune.gates.moments import collect_grams, has_rows
from se_prune.gates.sites import find_sites
from se_prune.gates.statistics import SiteSums, collect
from se_prune.pipeline.measure import BATCH
from se_prune.preprocessing import example_input
from se_prune.settings import TrainSettings
from se_prune.training import fit
from se_prune.training.loop import StepLog

COMMAND = "python -m reports.bench distributed"
CPU = torch.device("cpu")
ROWS = FOLDER / "distributed.jsonl"
ROUNDS, IMAGES, MEASURED = 7, 640, 1000
EXACT, FASTER = 1e-12, 1.6
#: Share of the cores that other work may take in a round, unless there are fewer than so many of these.
QUIET, ENOUGH = 0.05, 5
SETTINGS = TrainSettings(
    epochs=1, batch_size=128, lr=1e-3, schedule="constant", warmup=0.0, amp="off", sync_bn="off"
)
#: What is timed: two processes whose BN takes the statistics of each share, or of the whole batch.
WAYS = {"own": SETTINGS, "shared": replace(SETTINGS, sync_bn="on")}


def main() -> None:
    """Write `reports/distributed.md`; rounds that an earlier start has finished count."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "reports.bench.distributed"],
            env={**os.environ, **place, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    if any(process.wait() for process in started):
        sys.exit("a process failed; it says why above.")
    report()


def work() -> None:
    """Be one of the two processes."""
    torch.set_num_threads(1)
    distributed.start()
    data = open_data("fashion-mnist")
    done = distributed.from_main(lambda: [row["key"] for row in read_rows(ROWS)])
    for name in NETWORKS:
        network = bundled(name)
        key = f"{name} equal"
        if key not in done:
            _note(
                {"key": key, "network": name, **_equality(network, balanced_subset(data.train, MEASURED, 0))}
            )
        split = balanced_subset(data.train, IMAGES, 0)
        _timed(network, split, SETTINGS)  # warms up
        for _ in range(ROUNDS):
            rounds = distributed.from_main(partial(_rounds, name))
            if sum(_is_quiet(row) for row in rounds) >= ROUNDS:
                break
            number = len(rounds)
            _note({"key": f"{name} {number}", "network": name, **_round(network, split, number)})
    distributed.stop()


def _note(row: dict[str, Any]) -> None:
    if distributed.is_main():
        append_row(ROWS, row)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Let this process be the only one for a while; the others wait at the end."""
    place, distributed._place = distributed._place, distributed._Place()
    try:
        yield
    finally:
        distributed._place = place


def _equality(network: Network, split: Split) -> dict[str, Any]:
    """Return the largest relative differences of sums and Gram matrices of two processes from those of one."""
    together = _measured(network, split)
    alone: dict[str, torch.Tensor] = {}
    if distributed.is_main():
        with _alone():
            alone = _measured(network, split)
    distributed.barrier()
    gaps = {name: _gap(together[name], value) for name, value in alone.items()}
    kinds = {kind: [gap for name, gap in gaps.items() if name.startswith(kind)] for kind in ("sums", "gram")}
    return {kind: max(values, default=0.0) for kind, values in kinds.items()} | {
        f"{kind}_tables": len(values) for kind, values in kinds.items()
    }


def _measured(network: Network, split: Split) -> dict[str, torch.Tensor]:
    model, preprocessing = network.module, network.header.preprocessing
    sites = find_sites(model, example_input(preprocessing))
    names = [str(i) for i in range(10)]
    found = collect(model, sites, split, preprocessing, classes=names, device=CPU, batch_size=BATCH)
    tables = {"sums counts": found.counts}
    for site, sums in found.sums.items():
        tables |= {f"sums {site} {f.name}": getattr(sums, f.name) for f in fields(SiteSums)}
    layers = [name for name, module in model.named_modules() if has_rows(module)]
    with torch.no_grad(), collect_grams(model, layers) as grams:
        for images, _ in shared_batches(split, BATCH, preprocessing):
            model(images)
    return tables | {f"gram {name}": value for name, value in grams.items()}


def _gap(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the largest difference of two tables relative to the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-300))


def _round(network: Network, split: Split, number: int) -> dict[str, dict[str, float]]:
    """Time one process and two, in turn."""
    found: dict[str, dict[str, float]] = {}
    order = ["one", *WAYS]
    for way in order if number % 2 else order[::-1]:
        distributed.barrier()
        if way != "one":
            found[way] = _timed(network, split, WAYS[way])
        elif distributed.is_main():
            with _alone():
                found[way] = _timed(network, split, SETTINGS)
    distributed.barrier()
    return found


def _timed(network: Network, split: Split, settings: TrainSettings) -> dict[str, float]:
    """Train an epoch; return images per second, and per CPU second of the busier process, and what others took."""
    clock: list[tuple[float, float, float]] = []

    def tick(_: StepLog) -> None:
        clock.append((time.perf_counter(), time.process_time(), _busy()))

    model = artifact.clone(network.module)
    preprocessing = network.header.preprocessing
    fit(model, split, settings, preprocessing=preprocessing, device=CPU, on_step=tick)
    wall, cpu, busy = (last - first for first, last in zip(clock[0], clock[-1], strict=True))
    images = (len(clock) - 1) * settings.batch_size
    own = distributed.gather(cpu)
    others = max(0.0, busy - sum(own)) / (wall * (os.cpu_count() or 1))
    return {"wall": images / wall, "cpu": images / max(own), "others": others}


def _busy() -> float:
    """Return the CPU seconds that all processes of the machine have taken so far."""
    first = Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()[1:]
    user, nice, system, _, _, *interrupts = (int(ticks) for ticks in first[:8])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def report() -> None:
    """Write the report of the rows that are there."""
    rows, lines, summary = read_rows(ROWS), [], []
    for name in NETWORKS:
        (equal,) = [row for row in rows if row["key"] == f"{name} equal"]
        rounds = _rounds(name)
        entry = {"network": name, "sums": equal["sums"], "gram": equal["gram"], **_summary(rounds)}
        summary.append(entry)
        lines.append(
            [
                f"zoo:{name}",
                f"{equal['sums']:.1e}",
                f"{equal['gram']:.1e}",
                f"{entry['rounds']}",
                f"{entry['one']:.0f}",
            ]
            + [cell for way in WAYS for cell in _cells(entry, way)]
        )
    body = "# Two processes against one\n\n" + (
        f"Two gloo processes with a thread each on {os.cpu_count()} cores, as torchrun starts them, against one "
        "process with one thread. Statistics of all gates and Gram matrices of all layers on "
        f"{MEASURED:,} training images in batches of {BATCH}: largest difference relative to a table's largest "
        f"value; the bar is {EXACT:g}.\n\n"
        f"Training: images per second over an epoch of {IMAGES:,} images in batches of {SETTINGS.batch_size} (of both "
        "together), float32, in the first column one process. One and two are timed in turn; medians over rounds, and "
        f"the range of their ratios; the bar is {FASTER}. The machine is shared: rounds in which other work took more "
        f"than {QUIET:.0%} of the cores do not count, unless fewer than {ENOUGH} are left; the table says what it took "
        "in the worst of those that count. `CPU` compares images per CPU second of the busier process, which leaves "
        "out waiting, for other work and for one another.\n\n"
    )
    columns = ["network", "sums differ", "Gram differ", "rounds", "one, images/s"]
    for label in ("BN per share", "BN over the batch"):
        columns += [f"two, {label}", "ratio", "CPU", "other work"]
    write_report("distributed", COMMAND, body + markdown_table(columns, lines), summary)


def _rounds(name: str) -> list[dict[str, Any]]:
    return [row for row in read_rows(ROWS) if row["network"] == name and "one" in row]


def _is_quiet(row: dict[str, Any]) -> bool:
    return all(row[way]["others"] <= QUIET for way in ("one", *WAYS))


def _summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return medians and ranges of the rounds that count."""
    quiet = [r for r in rounds if _is_quiet(r)]
    counted = quiet if len(quiet) >= ENOUGH else rounds
    entry: dict[str, Any] = {"rounds": len(counted), "left_out": len(rounds) - len(counted)}
    entry["one"] = stats.median(r["one"]["wall"] for r in counted)
    for way in WAYS:
        ratios = [r[way]["wall"] / r["one"]["wall"] for r in counted]
        entry[way] = {
            "images_per_second": stats.median(r[way]["wall"] for r in counted),
            "ratio": stats.median(ratios),
            "range": [min(ratios), max(ratios)],
            "cpu_ratio": stats.median(r[way]["cpu"] / r["one"]["cpu"] for r in counted),
            "others": max(max(r[way]["others"], r["one"]["others"]) for r in counted),
        }
    return entry


def _cells(entry: dict[str, Any], way: str) -> list[str]:
    found = entry[way]
    low, high = found["range"]
    return [
        f"{found['images_per_second']:.0f}",
        f"{found['ratio']:.2f} ({low:.2f} to {high:.2f})",
        f"{found['cpu_ratio']:.2f}",
        f"{found['others']:.0%}",
    ]


if __name__ == "__main__":
    work()
