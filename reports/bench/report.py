"""How long a report of twelve compared runs takes to build and to open in Chromium, and how large it is."""

from __future__ import annotations

import itertools
import statistics as stats
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from reports.bench.common import FOLDER, NETWORKS, markdown_table, write_report
from se_prune import report, text
from se_prune.data import open_data
from se_prune.data.source import balanced_subset
from se_prune.device import processor
from se_prune.gates.sites import find_sites
from se_prune.gates.statistics import collect
from se_prune.pipeline import example_input, run_recipe
from se_prune.pipeline.details import profiles
from se_prune.recipe import ApplyTable, ModelTable, RunRecipe
from se_prune.records import ArchSpec
from se_prune.results import GateProfile, Run
from se_prune.schema import from_json, to_json
from se_prune.zoo import registry

BUDGETS = (0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
TRAIN, TEST = 500, 500
#: Each page is built and opened so often.
TIMES = 3
#: Images on which the gates of an SE-ResNet-50 are measured, for a page as large as it may become.
WIDE_IMAGES = 64
RECORDS = FOLDER.parent / "runs" / "report"
BARS = (10.0, 2.0)


def main() -> None:
    """Write `reports/report_page.md`."""
    from tests.browser import Browser, find_browser

    program = find_browser()
    if program is None:
        raise SystemExit("this study opens pages in Chromium; install it, such as apt-get install chromium.")
    runs = records()
    wide = wide_gates()
    cases = {
        "12 runs as they are": runs,
        "12 runs, each with the gates of an SE-ResNet-50": [
            replace(run, profiles=wide, profiles_after=()) for run in runs
        ],
        "one run": runs[:1],
    }
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, chosen in cases.items():
            page = Path(folder) / "report.html"
            builds = [_seconds(lambda c=chosen, p=page: report.write_report(c, p)) for _ in range(TIMES)]
            browser = Browser(program)
            try:
                opened = [_opened(browser, page) for _ in range(TIMES)]
            finally:
                browser.close()
            rows.append(
                {
                    "case": name,
                    "runs": len(chosen),
                    "bytes": page.stat().st_size,
                    "figures": opened[0]["figures"],
                    "build_s": builds,
                    "load_s": [o["load"] for o in opened],
                    "drawn_s": [o["drawn"] for o in opened],
                    "errors": sum(o["errors"] for o in opened),
                }
            )
    _write(rows, program)


def records() -> list[Run]:
    """Return the records of twelve real runs: both bundled networks at six budgets; kept ones are read."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        place: str | None = None
        for name, budget in itertools.product(NETWORKS, BUDGETS):
            path = RECORDS / f"{name}-{budget:g}.json"
            if not path.exists():
                place = place or _small_data(Path(folder) / "data")
                run = _run(name, budget, place, Path(folder) / f"{name}-{budget:g}")
                RECORDS.mkdir(parents=True, exist_ok=True)
                path.write_text(to_json(run), encoding="utf-8")
            found.append(from_json(Run, path.read_bytes()))
    return found


def _small_data(folder: Path) -> str:
    """Write a balanced part of the bundled images as idx files."""
    from tests.tiny import fashion_folder

    return str(fashion_folder(folder, TRAIN, TEST))


def _run(name: str, budget: float, data: str, folder: Path) -> Run:
    recipe = RunRecipe(
        name=f"{name}, {budget:.0%} of its MACs",
        model=ModelTable(ref=f"zoo:{name}", pretrained=True),
        data=data,
        apply=ApplyTable(macs=budget, round_to=4, criterion="gate-energy", repair="bn"),
        latency_rounds=10,
    )
    return run_recipe(recipe, folder, command="python -m reports.bench report").run


def wide_gates() -> tuple[GateProfile, ...]:
    """Return the gates of an SE-ResNet-50 with random weights on some images: 15,104 channels in 16 sites."""
    spec = ArchSpec(ref="zoo:se_resnet50")
    torch.manual_seed(0)
    module = registry.build(spec).eval()
    preprocessing = replace(registry.default_preprocessing(spec), input_size=(3, 64, 64))
    data = open_data("fashion-mnist")
    sites = find_sites(module, example_input(preprocessing))
    measured = collect(
        module,
        sites,
        balanced_subset(data.train, WIDE_IMAGES, 0),
        preprocessing,
        classes=data.classes,
        device=torch.device("cpu"),
        batch_size=16,
    )
    return profiles(measured)


def _seconds(job: Any) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def _opened(browser: Any, page: Path) -> dict[str, Any]:
    """Open a page and return seconds to its load event and to the frame after it, and how many figures it has."""
    start = time.perf_counter()
    browser.open(page)
    load = time.perf_counter() - start
    browser.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    drawn = time.perf_counter() - start
    first = browser.run("document.querySelector('svg.figure').getBoundingClientRect().width")
    assert first > 0, "the first figure is drawn"
    figures = browser.run("document.querySelectorAll('svg.figure').length")
    return {"load": load, "drawn": drawn, "figures": figures, "errors": len(browser.errors)}


def _write(rows: list[dict[str, Any]], program: str) -> None:
    table = markdown_table(
        [
            "page",
            "runs",
            "figures",
            "size",
            "built in, median",
            "largest",
            "load event, median",
            "first frame",
            "largest",
        ],
        [
            [
                row["case"],
                str(row["runs"]),
                str(row["figures"]),
                text.file_size(row["bytes"]),
                f"{stats.median(row['build_s']):.2f} s",
                f"{max(row['build_s']):.2f} s",
                f"{stats.median(row['load_s']):.2f} s",
                f"{stats.median(row['drawn_s']):.2f} s",
                f"{max(row['drawn_s']):.2f} s",
            ]
            for row in rows
        ],
    )
    build, drawn = (max(max(row[key]) for row in rows[:2]) for key in ("build_s", "drawn_s"))
    met = "Both bars are met." if build <= BARS[0] and drawn <= BARS[1] else "NOT both bars are met."
    kept = ", ".join(f"{budget:.0%}" for budget in BUDGETS)
    body = f"""# A report of twelve compared runs

Both bundled networks at {kept} of their MACs (criterion `gate-energy`, BN recalibration, no
training, {TRAIN:,} training and {TEST:,} test images), timed in torch: twelve records of real runs, kept in
`runs/report`. A page is built {TIMES} times (HTML, Markdown and JSON) and opened {TIMES} times in headless Chromium
without a GPU; the first frame is the second animation frame after the load event. The second page has the gates of
an SE-ResNet-50 with random weights (15,104 channels, measured on {WIDE_IMAGES} images of 64×64) in each of the twelve
records: as large as a page may become.
Errors in the console: {sum(row["errors"] for row in rows)}. Bars: {BARS[0]:g} s to build, {BARS[1]:g} s to open. {met}

{table}
{processor()}, {Path(program).name}.
"""
    write_report("report_page", "python -m reports.bench report", body, rows)


if __name__ == "__main__":
    main()
