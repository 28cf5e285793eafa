"""Two training steps of the ImageNet recipes on fake images of their size, from webdataset shards to the pruned file.

Weights are random, since nothing is downloaded. `SE_PRUNE_RECIPES=all` adds the networks above 1 GMACs.
"""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from reports.bench.common import FOLDER, append_row, markdown_table, read_rows, write_report
from se_prune.pipeline import run_recipe
from se_prune.recipe import find_recipe, read_run

SMALL = ("imagenet_mobilenetv3_large", "imagenet_efficientnet_b0")
LARGE = (
    "imagenet_se_resnet50",
    "imagenet_se_resnet101",
    "imagenet_se_resnet152",
    "imagenet_se_resnext50",
    "imagenet_senet154",
)
IMAGES, BATCH, CLASSES, SIDE = 16, 8, 1000, 256
ROWS = FOLDER / "recipes.jsonl"


def write_fake(folder: Path) -> None:
    """Write shards of noise in colour: 16 training and 16 validation images of a thousand classes."""
    rng = np.random.default_rng(0)
    (folder / "classes.txt").write_text("".join(f"class {i}\n" for i in range(CLASSES)), encoding="utf-8")
    for split in ("train", "val"):
        for shard in range(2):
            with tarfile.open(folder / f"fake-{split}-{shard:04d}.tar", "w") as tar:
                for i in range(shard, IMAGES, 2):
                    out = io.BytesIO()
                    Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(out, "JPEG")
                    for ending, content in (("jpg", out.getvalue()), ("cls", str(i * 62).encode())):
                        member = tarfile.TarInfo(f"{i:06d}.{ending}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))


def run_one(name: str, data: Path) -> dict[str, object]:
    """Run a recipe for two steps and return what came of it."""
    recipe = read_run(find_recipe(name))
    assert recipe.finetune is not None
    short = replace(
        recipe,
        data=str(data),
        model=replace(recipe.model, pretrained=False),
        finetune=replace(recipe.finetune, epochs=1, batch_size=BATCH),
        latency_rounds=0,
    )
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run = run_recipe(short, Path(folder), command=f"se-prune run {name}").run
    return {
        "recipe": name,
        "arch": run.arch.ref,
        "budget": run.plan.budget.value,
        "macs_before": run.cost_before.macs,
        "macs_after": run.cost_after.macs,
        "exported": [item.target for item in run.exported],
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    """Run the recipes that are not done yet and write the report."""
    names = SMALL + (LARGE if os.environ.get("SE_PRUNE_RECIPES") == "all" else ())
    with tempfile.TemporaryDirectory() as folder:
        write_fake(Path(folder))
        for name in names:
            if name not in {row["recipe"] for row in read_rows(ROWS)}:
                append_row(ROWS, run_one(name, Path(folder)))
    rows = read_rows(ROWS)
    missing = [name for name in SMALL + LARGE if name not in {row["recipe"] for row in rows}]
    table = markdown_table(
        ["recipe", "MACs before", "kept", "budget", "exported", "seconds"],
        [
            [
                row["recipe"],
                f"{row['macs_before'] / 1e9:.2f} G",
                f"{100 * row['macs_after'] / row['macs_before']:.1f} %",
                f"{100 * row['budget']:.0f} %",
                ", ".join(row["exported"]),
                f"{row['seconds']:.0f}",
            ]
            for row in rows
        ],
    )
    rest = f"\nNot run here: {', '.join(missing)} (`SE_PRUNE_RECIPES=all`).\n" if missing else ""
    write_report(
        "recipes",
        "python -m reports.bench recipes",
        "# Recipes for ImageNet, two steps on fake images\n\nWhole runs on 16 training and 16 validation images of "
        "noise (224×224, webdataset shards, 1000 classes), batch 8, random weights: that each recipe goes from its "
        "data to its exported file. They say nothing of accuracy, nor of the "
        "proof against the masked twin, since the logits of random weights hardly respond to what is removed.\n\n"
        f"{table}{rest}",
        rows,
    )


if __name__ == "__main__":
    main()
