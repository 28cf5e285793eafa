"""The report as one HTML file that opens offline: figures, pictures, style and script are inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jinja2

from se_prune.errors import SePruneError
from se_prune.report import gate_sections, sections, svg
from se_prune.report.content import Section, Tile
from se_prune.report.plot import PALETTE
from se_prune.results import GateReport, Run

MAX_BYTES = 6_000_000
#: What one run takes of the page without its gate profiles, amply; and the page itself.
RUN_BYTES, PAGE_BYTES = 150_000, 40_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The part of a page that one run fills; `key` keeps the ids of several runs apart."""

    key: str
    name: str
    verdict: str
    tiles: list[Tile]
    sections: list[Section]


def render(runs: Sequence[Run]) -> str:
    """Return the HTML of a report.

    Raises:
        SePruneError: The page would be larger than 6 MB.
    """
    pictures = sum(len(image.data) for run in runs for image in run.changed)
    free = MAX_BYTES - PAGE_BYTES - RUN_BYTES * len(runs) - pictures
    parts = [_part(f"run-{i}", run, max(0, free) / len(runs)) for i, run in enumerate(runs, start=1)]
    return _page(
        f"these {len(runs)} runs",
        title=page_title(runs),
        kind="compression report",
        parts=parts,
        comparison=sections.compare(runs) if len(runs) > 1 else None,
    )


def render_gates(report: GateReport) -> str:
    """Return the HTML of a page on one network's gates.

    Raises:
        SePruneError: The page would be larger than 6 MB.
    """
    part = Part(
        key="network",
        name=report.name,
        verdict=report.outlook,
        tiles=[],
        sections=gate_sections.of_gates(report, MAX_BYTES - PAGE_BYTES - RUN_BYTES),
    )
    return _page("these gates", title=report.name, kind="gate report", parts=[part], comparison=None)


def render_study(title: str, verdict: str, shown: Sequence[Section]) -> str:
    """Return the HTML of a study: what came out in a sentence or two, and its sections.

    Raises:
        SePruneError: The page would be larger than 6 MB.
    """
    part = Part(key="study", name=title, verdict=verdict, tiles=[], sections=list(shown))
    return _page("this study", title=title, kind="study", parts=[part], comparison=None)


def _page(what: str, *, title: str, kind: str, parts: Sequence[Part], comparison: Section | None) -> str:
    page = _template().render(
        title=title, kind=kind, parts=parts, comparison=comparison, palette=PALETTE, draw=svg.inline
    )
    size = len(page.encode())
    if size > MAX_BYTES:
        raise SePruneError(
            f"a page of {what} would take {size / 1e6:.1f} MB, more than {MAX_BYTES / 1e6:.0f} MB; report fewer "
            "runs at a time."
        )
    return page


def page_title(runs: Sequence[Run]) -> str:
    """Return the title of a report of one or several runs."""
    return runs[0].name if len(runs) == 1 else f"{len(runs)} compression runs"


def _part(key: str, run: Run, profile_chars: float) -> Part:
    return Part(
        key=key,
        name=run.name,
        verdict=sections.verdict(run),
        tiles=sections.tiles(run),
        sections=sections.of_run(run, profile_chars),
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("se_prune", "report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("template.html.j2")
