"""Time and memory of analysis, scoring, cut and repair, beside plain inference; each in a process of its own.

At 50 % of the MACs, criterion `excitation`, repair `refit`. The bundled networks see their default number of images of
the bundled Fashion-MNIST, SE-ResNet-50 (224×224, random weights) 512 made-up ones. Memory is the largest resident size
of the process, imports and data included; of the repair from its beginning on. Temporary files are not memory, though
the system may keep them in what memory is free.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from reports.bench.common import FOLDER, append_row, markdown_table, read_rows, write_report
from se_prune import pipeline
from se_prune.artifact import Network
from se_prune.checkpoint import open_model
from se_prune.data import DataSource, open_data
from se_prune.data.batches import TensorImages
from se_prune.data.source import balanced_subset
from se_prune.device import inference_batch, processor
from se_prune.pipeline.measure import MEASURED_IMAGES
from se_prune.records import Budget, LayerRefit, Plan
from se_prune.schema import from_json, to_json
from se_prune.surgery import refit, spill
from se_prune.surgery.fit import LayerFit

#: Networks with the seconds that analysis, scoring, cut and repair together may take.
CASES = {"se_resnet20": 60, "se_mobilenet_x025": 60, "se_resnet50": 900}
LARGE, IMAGES = "se_resnet50", 512
PARTS = ("inference", "plan", "repair")
ROWS = FOLDER / "refit_cost.jsonl"
MB = 1 << 20


def main() -> None:
    """Measure the parts that have no row yet, then write `reports/refit_cost.md`."""
    for name in CASES:
        for part in PARTS:
            rows = read_rows(ROWS)
            if any((r["network"], r["part"]) == (name, part) for r in rows):
                continue
            plan = next((r["plan"] for r in rows if (r["network"], r["part"]) == (name, "plan")), "")
            command = [sys.executable, "-m", "reports.bench.refit_cost", name, part]
            done = subprocess.run(  # noqa: S603 - our own command
                command, input=plan, capture_output=True, text=True, check=False
            )
            if done.returncode:
                sys.exit(f"{name}, {part}: {done.stderr}")
            append_row(ROWS, {"network": name, "part": part, **json.loads(done.stdout.splitlines()[-1])})
            report()
    report()


def measure(name: str, part: str) -> dict[str, Any]:
    """Do one part in this process, and return what it took."""
    network, data = _opened(name)
    watch = _Watch()
    found: dict[str, Any] = {
        "images": min(MEASURED_IMAGES, len(data.train)),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "processor": processor(),
    }
    if part == "inference":
        watch.restart()
        with watch.stage("inference", None):
            _infer(network, data)
    elif part == "plan":
        found["plan"] = to_json(_planned(network, data, watch))
    else:
        found |= _repaired(network, data, from_json(Plan, sys.stdin.read()), watch)
    return found | {"seconds": watch.seconds, "cpu": watch.cpu, "peak": watch.peak()}


def _opened(name: str) -> tuple[Network, DataSource]:
    if name != LARGE:
        return open_model(f"zoo:{name}", pretrained=True), open_data("fashion-mnist")
    coarse = torch.rand(IMAGES, 3, 14, 14, generator=torch.Generator().manual_seed(0))
    images = torch.cat(
        [
            (F.interpolate(part, size=(224, 224), mode="bilinear") * 255).to(torch.uint8)
            for part in coarse.split(16)
        ]
    )
    split = TensorImages(images=images, labels=torch.arange(IMAGES) % 1000)
    classes = tuple(str(i) for i in range(1000))
    torch.manual_seed(0)
    return open_model(f"zoo:{name}"), DataSource(ref="made up", classes=classes, train=split, test=split)


@torch.no_grad()
def _infer(network: Network, data: DataSource) -> None:
    device = torch.device("cpu")
    split = balanced_subset(data.train, MEASURED_IMAGES, 0)
    network.module.eval()
    for images, _ in split.batches(inference_batch(device), network.header.preprocessing):
        network.module(images)


def _planned(network: Network, data: DataSource, watch: _Watch) -> Plan:
    with watch.stage("structure", None):
        found = pipeline.structure(network)
    return pipeline.plan(
        network,
        found,
        Budget(kind="macs", value=0.5),
        criterion="excitation",
        device=torch.device("cpu"),
        data=data,
        reporter=watch,
    )


def _repaired(network: Network, data: DataSource, plan: Plan, watch: _Watch) -> dict[str, Any]:
    grams, files = [0], [0]

    class Fit(LayerFit):
        """Notes the bytes of its Gram matrix."""

        def finish(self) -> LayerRefit:
            grams[0] = max(grams[0], self.fitting.xx.nbytes)
            return super().finish()

    class Noted(spill.Spill):
        """Notes the bytes of all temporary files together."""

        def put(self, tensor: torch.Tensor) -> spill.Spilled:
            files[0] += tensor.nbytes
            return super().put(tensor)

    refit.LayerFit, refit.Spill = Fit, Noted  # type: ignore[misc]
    applied = pipeline.apply_plan(
        network, pipeline.structure(network), plan, device=torch.device("cpu"), data=data, reporter=watch
    )
    return {
        "gram": grams[0],
        "written": files[0],
        "layers": len(applied.refits),
        "kept": sum(fit.kept for fit in applied.refits),
        "macs": [applied.before.macs, applied.after.macs],
    }


class _Watch:
    """A reporter that times stages, and takes the peak of memory from the first stage of a repair on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu: dict[str, float] = {}
        self.repairing = False

    @contextlib.contextmanager
    def stage(self, title: str, total: int | None) -> Iterator[Callable[..., None]]:
        """Time a stage."""
        del total
        if title.startswith("repair") and not self.repairing:
            self.repairing = True
            self.restart()
        started, cpu = time.perf_counter(), time.process_time()
        yield lambda *_, **__: None
        self.seconds[title] = time.perf_counter() - started
        self.cpu[title] = time.process_time() - cpu
        sys.stderr.write(f"{title}: {self.seconds[title]:.1f} s\n")

    def restart(self) -> None:
        """Begin the peak anew at what is resident now; Linux alone can."""
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def peak(self) -> int:
        """Return the peak in bytes."""
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
        assert found is not None
        return int(found[1]) * 1024


def _row(name: str, parts: dict[str, dict[str, Any]], what: str) -> list[str]:
    """Return a line of the first table: seconds of the wall clock, or of all cores together."""
    plan, repair = parts["plan"][what], parts["repair"][what]
    score = next(value for title, value in plan.items() if title.startswith("score"))
    mending = sum(value for title, value in repair.items() if title.startswith("repair"))
    analysis = sum(plan.values()) - score
    total = analysis + score + repair["cut"] + mending
    values = [f"{value:.1f}" for value in (analysis, score, repair["cut"], mending, total)]
    met = ("met" if total <= CASES[name] else "missed") if what == "seconds" else ""
    return [
        f"zoo:{name}",
        str(parts["plan"]["threads"]),
        "wall clock" if what == "seconds" else "CPU",
        *values,
        f"≤ {CASES[name]} s: {met}" if met else "",
    ]


def report() -> None:
    """Write `reports/refit_cost.md` from the rows that are there."""
    rows = read_rows(ROWS)
    whole = {
        name: found
        for name in CASES
        if len(found := {r["part"]: r for r in rows if r["network"] == name}) == len(PARTS)
    }
    body = "# What analysis, scoring, cut and repair cost\n\n" + __doc__.partition("\n\n")[2].strip() + "\n\n"
    body += markdown_table(
        [
            "network",
            "threads",
            "seconds of",
            "analysis",
            "scoring",
            "cut and proof",
            "repair",
            "together",
            "bar",
        ],
        [_row(name, parts, what) for name, parts in whole.items() for what in ("seconds", "cpu")],
    )
    lines = []
    for name, parts in whole.items():
        inference, repair = parts["inference"], parts["repair"]
        bound = 2 * inference["peak"] + repair["gram"]
        sizes = (inference["peak"], repair["peak"], repair["gram"], bound, repair["written"])
        lines.append(
            [
                f"zoo:{name}",
                f"{repair['images']:,}",
                *(f"{size / MB:,.0f}" for size in sizes),
                "met" if repair["peak"] <= bound else "missed",
                f"{repair['kept']} of {repair['layers']}",
            ]
        )
    body += "\n" + markdown_table(
        [
            "network",
            "images",
            "MiB of inference",
            "of repair",
            "largest Gram matrix",
            "2 × inference + Gram",
            "written to temporary files",
            "bar",
            "layers fitted",
        ],
        lines,
    )
    if whole:
        loads = [row["load"] for parts in whole.values() for row in parts.values()]
        some = next(iter(whole.values()))["repair"]
        body += (
            f"\n{some['processor']}; load average of the machine when the parts began "
            f"{min(loads):.1f} to {max(loads):.1f}. Inference in batches of {inference_batch(torch.device('cpu'))}. "
            "Written is the sum of all that passes; what is held at once is less.\n"
        )
    write_report(
        "refit_cost",
        "python -m reports.bench refit_cost",
        body,
        [{k: v for k, v in r.items() if k != "plan"} for r in rows],
    )


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(*sys.argv[1:])) + "\n")
