"""The smallest SE-ResNet-20 within half a point: what `recipes/fashion_se_resnet20_max_drop.toml` finds and proves.

Fine-tuning takes the whole Fashion-MNIST where `FASHION_MNIST` names the folder of its idx files, else the bundled
part. Resumable, as every run is: the folder `runs/max_drop` keeps what is done.
"""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from reports.bench.common import FOLDER, markdown_table, write_report
from se_prune import text
from se_prune.errors import NotKept
from se_prune.pipeline import run_recipe
from se_prune.pipeline.progress import FILE, RunProgress
from se_prune.pipeline.progress import FOLDER as STATE
from se_prune.recipe import RunRecipe, read_run
from se_prune.report import load_run
from se_prune.report.search import sentence, tries
from se_prune.results import MaxDrop, Run, Try
from se_prune.schema import from_json, to_dict

NAME = "fashion_se_resnet20_max_drop"
OUT = FOLDER.parent / "runs" / "max_drop"
#: The bar: at most this fraction of the MACs.
MOST = 0.45


def recipe() -> RunRecipe:
    """Return the recipe, with the whole data set where there is one."""
    found = read_run(FOLDER.parent / "recipes" / f"{NAME}.toml")
    return replace(found, data=os.environ.get("FASHION_MNIST", found.data))


def main() -> None:
    """Run or go on with the recipe, and write `reports/max_drop.md`."""
    torch.set_num_threads(1)
    refused = ""
    if not (OUT / "run.json").is_file():
        report()
        try:
            run_recipe(recipe(), OUT, command=f"se-prune run {NAME}", device="cpu")
        except NotKept as error:
            refused = str(error)
    report(refused)


def report(refused: str = "") -> None:
    """Write `reports/max_drop.md` from what is there."""
    run = load_run(OUT / "run.json") if (OUT / "run.json").is_file() else None
    asked = recipe()
    images = "60,000" if "FASHION_MNIST" in os.environ else "12,000 bundled"
    assert asked.search is not None
    assert asked.finetune is not None
    body = [
        "# The smallest network within half a point\n\n"
        f"`recipes/{NAME}.toml`: SE-ResNet-20, bisection over the MACs from {text.percent(asked.search.least, 0)} to "
        f"100 %, to within {text.percent(asked.search.tolerance, 0)}; every try is cut, repaired and fine-tuned for "
        f"{asked.finetune.epochs} epochs on the {images} training images. A share of "
        f"{text.percent(asked.search.held_out, 0)} of the {asked.search.images} images decides; what counts of a drop "
        f"is its upper end at a confidence of {asked.search.confidence:g} (0.5: the drop as measured). One thread.\n"
    ]
    if run is None or run.max_drop is None:
        done = _tries_so_far()
        body.append(f"{refused}\n" if refused else "The search has not come to its end yet.\n")
        body.append(_table_of(done))
        write_report("max_drop", _command(), "\n".join(body), [to_dict(t) for t in done])
        return
    body += [_verdict(run, run.max_drop), _table(run.max_drop)]
    write_report("max_drop", _command(), "\n".join(body), to_dict(run.max_drop))


def _command() -> str:
    """Return the command as it was given, but for the folder."""
    return ("FASHION_MNIST=… " if "FASHION_MNIST" in os.environ else "") + "python -m reports.bench max_drop"


def _verdict(run: Run, found: MaxDrop) -> str:
    share = run.cost_after.macs / run.cost_before.macs
    met = "met" if share <= MOST and found.kept else "NOT met"
    told = sentence(found)
    p = "" if run.paired is None else f", exact McNemar p {text.p_value(run.paired.p_value)}"
    return (
        f"**{text.percent(share)} of the MACs stay; {told}{p}.** The bar of at most {text.percent(MOST, 0)} of the "
        f"MACs with the drop kept is {met}.\n"
    )


def _tries_so_far() -> tuple[Try, ...]:
    path = OUT / STATE / FILE
    return from_json(RunProgress, path.read_bytes()).tries if path.is_file() else ()


def _table(found: MaxDrop) -> str:
    table = tries(found)
    return f"{table.caption}, in points:\n\n" + markdown_table(table.head, table.rows)


def _table_of(done: tuple[Try, ...]) -> str:
    rows = [
        [
            text.percent(t.budget),
            text.MISSING if t.macs is None else text.percent(t.macs),
            text.MISSING if t.drop is None else f"{100 * t.drop.drop:.2f}",
            "yes" if t.keeps else "no",
        ]
        for t in done
    ]
    return (
        markdown_table(["budget", "MACs kept", "drop, points", "kept"], rows) if rows else "No try is done.\n"
    )
