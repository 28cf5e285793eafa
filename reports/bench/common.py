"""What the studies share: the bundled networks, resumable rows, Markdown tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from se_prune.artifact import Network
from se_prune.checkpoint import open_model
from se_prune.files import write_text

FOLDER = Path(__file__).parent.parent
NETWORKS = ("se_resnet20", "se_mobilenet_x025")


def bundled(name: str) -> Network:
    """Open a bundled trained network."""
    return open_model(f"zoo:{name}", pretrained=True)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the finished rows of a study; a line that a kill cut short is left out."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add one finished row."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the rank correlation of two lists; equal values share the mean of their ranks."""
    x, y = np.array(first), np.array(second)
    ranks = [(v[:, None] > v).sum(1) + (v[:, None] == v).sum(1) / 2 for v in (x, y)]
    return float(np.corrcoef(*ranks)[0, 1])


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def write_report(name: str, command: str, body: str, rows: Any) -> None:
    """Write `reports/NAME.md` with the command on top, and the rows as JSON beside it."""
    write_text(FOLDER / f"{name}.md", f"{body.rstrip()}\n\nMade by `{command}`.\n")
    write_text(FOLDER / f"{name}.json", json.dumps(rows, indent=1) + "\n")
