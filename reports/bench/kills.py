"""SIGKILL at random moments of `finetune`, `analyze` and `run`: what the same command, given again, ends with."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from reports.bench.common import markdown_table, write_report
from se_prune.data import open_data
from se_prune.data.source import balanced_subset

NET = ["zoo:se_resnet20", "--pretrained"]
TUNED = [*NET, "--teacher", NET[0], "--teacher-pretrained", "--epochs", "3", "--batch-size", "48"]
#: The command, the file that must be the same to the bit, and how many kills it gets.
JOBS: dict[str, tuple[list[str], str, int]] = {
    "finetune": (
        ["finetune", *TUNED, "--data", "data", "-o", "out/net.safetensors"],
        "net.safetensors",
        8,
    ),
    "analyze": (["analyze", *NET, "--data", "data", "-o", "out/s.safetensors"], "s.safetensors", 4),
    "run": (["run", "recipe.toml", "-o", "out"], "pruned.safetensors", 8),
}
#: After so many kills in a row the command is left to end.
SERIES = 4
#: Within an epoch the state is saved every so many seconds here, since the real epochs are short.
SAVE_SECONDS = 0.5
SCRIPT = f"""
from se_prune.training import state
state.SAVE_SECONDS, state.SAVE_SHARE = {SAVE_SECONDS}, 1.0
from se_prune_cli.app import main
main()
"""
RECIPE = """
data = "data"
latency_rounds = 1
[model]
ref = "zoo:se_resnet20"
pretrained = true
[apply]
macs = 0.5
[finetune]
epochs = 3
batch_size = 48
ema_decay = 0.9
"""


def main() -> None:
    """Write `reports/kills.md`."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        _prepare(place)
        for job in JOBS:
            rows += _study(job, place)
    body = "# Killed at random moments\n\n" + (
        f"{sum(row['kills'] for row in rows)} times SIGKILL, at moments drawn evenly from the time that the command "
        "takes, in series: the same command is given again after each kill, and left to end after the last. "
        f"SE-ResNet-20 on 240 real training images, {torch.get_num_threads()} thread; within an epoch the state is "
        f"saved every {SAVE_SECONDS} s. Equal: the file is bit for bit that of a command which was never killed. Stray "
        "files: those that such a command does not leave.\n\n"
    )
    body += markdown_table(
        ["command", "kills", "seconds until each kill", "equal", "stray files"],
        [
            [
                f"`{row['command']}`",
                str(row["kills"]),
                ", ".join(f"{s:.1f}" for s in row["after_s"]),
                "yes" if row["equal"] else "**no**",
                ", ".join(row["stray"]) or "none",
            ]
            for row in rows
        ],
    )
    write_report("kills", "python -m reports.bench kills", body, rows)


def _prepare(place: Path) -> None:
    from tests.tiny import write_idx

    data = open_data("fashion-mnist")
    for prefix, split, count in (("train", data.train, 240), ("t10k", data.test, 100)):
        part: Any = balanced_subset(split, count, 0)
        write_idx(place / "data", prefix, part.images[:, 0], part.labels)
    (place / "recipe.toml").write_text(RECIPE, encoding="utf-8")


def _start(arguments: list[str], place: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(  # noqa: S603 - our own command
        [sys.executable, "-c", SCRIPT, *arguments],
        cwd=place,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def _finish(arguments: list[str], place: Path) -> None:
    process = _start(arguments, place)
    _, errors = process.communicate()
    if process.returncode:
        sys.exit(f"{' '.join(arguments)} failed: {errors.decode()}")


def _study(job: str, place: Path) -> Iterator[dict[str, Any]]:
    arguments, file, left = JOBS[job]
    out = place / "out"
    clock = time.monotonic()
    _finish(arguments, place)
    takes = time.monotonic() - clock
    wanted, names = _digest(out / file), _names(out)
    shutil.rmtree(out)
    draw = random.Random(job)  # noqa: S311 - moments, no secret
    while left:
        after: list[float] = []
        while len(after) < min(SERIES, left):
            process, moment = _start(arguments, place), draw.uniform(0, takes)
            try:
                process.wait(moment)
                break  # it ended before its moment: no kill, and the command is done
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                after.append(moment)
        left -= len(after)
        _finish(arguments, place)
        stray = sorted(set(_names(out)) - set(names))
        row = {
            "command": job,
            "kills": len(after),
            "after_s": after,
            "takes_s": takes,
            "equal": _digest(out / file) == wanted,
            "stray": stray,
        }
        print(json.dumps(row), flush=True)
        yield row
        shutil.rmtree(out)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


if __name__ == "__main__":
    main()
