"""Figures as files: SVG of our own, and PNG where resvg is installed."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

from se_prune.files import whole_file, write_text
from se_prune.report import svg
from se_prune.report.content import Figure

#: Pixels of a PNG to one of the SVG.
ZOOM = 2.0
NO_PNG = "the figures are SVG alone; for PNG beside them: pip install 'se-prune[figures]'."


def can_draw_png() -> bool:
    """Say whether the package that makes PNG of SVG is installed."""
    return importlib.util.find_spec("resvg_py") is not None


def write_figures(figures: Sequence[Figure], folder: Path) -> list[Path]:
    """Write every panel of figures as `KEY.svg` or `KEY-CHOICE.svg`, and as PNG where that can be made.

    Raises:
        SePruneError: A file cannot be written.
    """
    written = []
    for figure in figures:
        for i, plots in enumerate(figure.panels):
            choice = figure.choices[i] if len(figure.panels) > 1 else ""
            name = safe_name(f"{figure.key}-{choice}" if choice else figure.key)
            title = f"{choice}: {figure.caption}" if choice else figure.caption
            source = svg.standalone(plots, title, (*figure.keys, *figure.classes))
            written.append(folder / f"{name}.svg")
            write_text(written[-1], source)
            if can_draw_png():
                written.append(folder / f"{name}.png")
                with whole_file(written[-1]) as temporary:
                    temporary.write_bytes(png(source))
    return written


def png(source: str) -> bytes:
    """Return an SVG as PNG, at twice its size."""
    import resvg_py

    return bytes(resvg_py.svg_to_bytes(svg_string=source, zoom=ZOOM))


def safe_name(name: str) -> str:
    """Return a name without the characters that a file name may not have."""
    return re.sub(r"[^\w.-]+", "_", name)
