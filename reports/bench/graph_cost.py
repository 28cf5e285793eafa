"""What looking at a network costs: memory and CPU time of `inspect` and `apply --dry-run`, and how they grow.

Every run is a process of its own, on one thread. The two large networks run the commands themselves; the series run the
stages in one process, which times each.
"""

from __future__ import annotations

import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from rich.progress import track

from reports.bench.common import markdown_table, write_report

RUNS = 3
LARGE = ("zoo:senet154", "timm:efficientnet_b7")
SPARSITY = 0.5
DRY_RUN = ("--sparsity", str(SPARSITY), "--criterion", "l2", "--dry-run")
#: Blocks in the family's main path by network; each series ends well beyond what the paper has.
SERIES = {
    "CIFAR SE-ResNet": {f"zoo:se_resnet20?depth={d}": d for d in (20, 56, 110, 218, 434)},
    "SE-ResNet (224×224)": {f"zoo:se_resnet{d}": d for d in (50, 101, 152)},
}
STAGES = ("inspect", "plan", "cut and proof")


def main() -> None:
    """Write `reports/graph_cost.md`."""
    if len(sys.argv) > 2 and sys.argv[1] == "one":
        sys.stdout.write(json.dumps(one(sys.argv[2])) + "\n")
        return
    commands = [(name, command) for name in LARGE for command in ("inspect", "apply")]
    large = [_command(name, command) for name, command in track(commands, "commands")]
    series = {
        family: [_stages(name, depth) for name, depth in track(networks.items(), family)]
        for family, networks in SERIES.items()
    }
    body = "# What looking at a network costs\n\n" + (
        f"Medians of {RUNS} runs, each a process of its own on one thread, imports and opening the network with random "
        "weights included; peak is the largest resident memory of the process.\n\n"
    )
    body += markdown_table(
        ["network", "command", "CPU seconds", "peak memory", "weights"],
        [
            [
                r["network"],
                r["command"],
                f"{r['cpu']:.1f}",
                f"{r['peak'] / 1e9:.2f} GB",
                f"{r['weights'] / 1e9:.2f} GB",
            ]
            for r in large
        ],
    )
    body += (
        "\n## Growth with depth\n\nCPU seconds of the stages alone, without imports and opening. The exponent e of "
        "seconds ~ depth^e is fitted to the logarithms of all depths (of the upper half in brackets): 1 is linear, 2 "
        "quadratic.\n\n"
    )
    for family, rows in series.items():
        body += f"{family}:\n\n" + markdown_table(
            ["depth", "operations", *STAGES, "peak memory"], [*_lines(rows), _exponents(rows)]
        )
        body += "\n"
    write_report("graph_cost", "python -m reports.bench graph_cost", body, {"large": large, "series": series})


def _lines(rows: Iterable[dict[str, Any]]) -> list[list[str]]:
    return [
        [
            str(r["depth"]),
            str(r["operations"]),
            *(f"{r['cpu'][stage]:.2f}" for stage in STAGES),
            f"{r['peak'] / 1e9:.2f} GB",
        ]
        for r in rows
    ]


def _exponents(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the last line of a family's table."""
    cells = []
    for stage in STAGES:
        whole = exponent([(r["depth"], r["cpu"][stage]) for r in rows])
        upper = exponent([(r["depth"], r["cpu"][stage]) for r in rows[(len(rows) - 1) // 2 :]])
        cells.append(f"{whole:.2f} ({upper:.2f})")
    return ["exponent", "", *cells, ""]


def exponent(points: Iterable[tuple[float, float]]) -> float:
    """Return the slope of least squares through the logarithms of points (x, y)."""
    logs = [(math.log(x), math.log(max(y, 1e-6))) for x, y in points]
    return statistics.linear_regression([x for x, _ in logs], [y for _, y in logs]).slope


def _command(name: str, command: str) -> dict[str, Any]:
    """Run a command of ours on a network; return the medians of its CPU seconds and its peak memory."""
    options = DRY_RUN if command == "apply" else ()
    line = [sys.executable, "-W", "ignore", "-c", "from se_prune_cli.app import main; main()", command, name]
    runs = [_used([*line, *options, "--json"]) for _ in range(RUNS)]
    cost = json.loads(runs[0][2])
    params = (cost["cost"] if command == "inspect" else cost["before"])["params"]
    return {
        "network": name,
        "command": " ".join((command, *options)),
        "cpu": statistics.median(r[0] for r in runs),
        "peak": statistics.median(r[1] for r in runs),
        "weights": 4 * params,
    }


def _used(line: Sequence[str]) -> tuple[float, int, bytes]:
    """Run a process to its end; return its CPU seconds, its peak memory in bytes, and what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(line, env=environment, **pipes) as process:  # noqa: S603 - our own commands
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(line)} ended with code {process.returncode}")
    return usage.ru_utime + usage.ru_stime, 1024 * usage.ru_maxrss, printed


def _stages(name: str, depth: int) -> dict[str, Any]:
    """Return the medians of one network of a series."""
    line = [sys.executable, "-W", "ignore", "-m", "reports.bench.graph_cost", "one", name]
    runs = [json.loads(_used(line)[2]) for _ in range(RUNS)]
    return {
        "network": name,
        "depth": depth,
        "operations": runs[0]["operations"],
        "peak": statistics.median(r["peak"] for r in runs),
        "cpu": {stage: statistics.median(r["cpu"][stage] for r in runs) for stage in STAGES},
    }


def one(name: str) -> dict[str, Any]:
    """Time the stages of `apply --dry-run` in this process."""
    import torch

    from se_prune.checkpoint import open_model
    from se_prune.gates.trace import trace
    from se_prune.pipeline import apply_plan, example_input, plan, structure
    from se_prune.records import Budget

    torch.set_num_threads(1)
    network = open_model(name)
    small, device = open_model("zoo:se_resnet20"), torch.device("cpu")
    budget, cpu = Budget(kind="sparsity", value=SPARSITY), {}
    for each in (small, network):  # the first warms up what every process sets up once
        start = time.process_time()
        found = structure(each)
        inspected = time.process_time()
        chosen = plan(each, found, budget, criterion="l2", device=device)
        planned = time.process_time()
        apply_plan(each, found, chosen, device=device, repair="none")
        cpu = dict(
            zip(STAGES, (inspected - start, planned - inspected, time.process_time() - planned), strict=True)
        )
    operations = len(trace(network.module, example_input(network.header.preprocessing)).nodes)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"operations": operations, "peak": peak, "cpu": cpu}


if __name__ == "__main__":
    main()
