"""The report as one HTML file that opens offline: plotly.js, figures and style are inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from se_prune.errors import SePruneError
from se_prune.report import sections
from se_prune.report.sections import Section, Tile
from se_prune.results import Run

MAX_BYTES = 6_000_000
#: What one run takes of the page without its gate profiles, amply; and the page itself.
RUN_BYTES, PAGE_BYTES = 70_000, 40_000


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPart:
    """The part of a page that one run fills; `key` keeps the ids of several runs apart."""

    key: str
    run: Run
    verdict: str
    tiles: list[Tile]
    sections: list[Section]


def render(runs: Sequence[Run]) -> str:
    """Return the HTML of a report.

    Raises:
        SePruneError: The page would be larger than 6 MB.
    """
    plotly = get_plotlyjs()
    free = MAX_BYTES - len(plotly.encode()) - PAGE_BYTES - RUN_BYTES * len(runs)
    parts = [_part(f"run-{i}", run, max(0, free) / len(runs)) for i, run in enumerate(runs, start=1)]
    page = _template().render(
        title=page_title(runs),
        parts=parts,
        comparison=sections.compare(runs) if len(runs) > 1 else None,
        plotly=_script(plotly),
    )
    if len(page.encode()) > MAX_BYTES:
        raise SePruneError(
            f"a page of these {len(runs)} runs would take {len(page.encode()) / 1e6:.1f} MB, more than "
            f"{MAX_BYTES / 1e6:.0f} MB; report fewer runs at a time."
        )
    return page


def page_title(runs: Sequence[Run]) -> str:
    """Return the title of a report of one or several runs."""
    return runs[0].name if len(runs) == 1 else f"{len(runs)} compression runs"


def _part(key: str, run: Run, profile_chars: float) -> RunPart:
    return RunPart(
        key=key,
        run=run,
        verdict=sections.verdict(run),
        tiles=sections.tiles(run),
        sections=sections.of_run(run, profile_chars),
    )


def _script(source: str) -> Markup:
    """Return JavaScript that may stand inside a script element as it is."""
    assert "</script" not in source.lower(), "plotly.js must not end its own element"
    return Markup(source)  # noqa: S704 - plotly's own file, no user text


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("se_prune", "report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("template.html.j2")
