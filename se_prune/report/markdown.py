"""The report as Markdown for a pull request: the sentences and tables of the page, without its figures."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence

from se_prune.report import gate_sections, sections
from se_prune.report.content import Section
from se_prune.report.html import page_title
from se_prune.report.tables import Table
from se_prune.results import GateReport, Run

#: Characters that mean something to Markdown or HTML anywhere in a line.
SPECIAL = re.compile(r"([\\`*\[\]|<>~])")
#: An underscore is markup only where it is not inside a word.
EDGE_UNDERSCORE = re.compile(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def render(runs: Sequence[Run]) -> str:
    """Return the Markdown of a report."""
    lines = [f"# {escape(page_title(runs))}", ""]
    if len(runs) > 1:
        lines += _section(sections.compare(runs), "##")
    for run in runs:
        if len(runs) > 1:
            lines += [f"## {escape(run.name)}", ""]
        lines += [f"**{escape(sections.verdict(run))}**", ""]
        for section in sections.of_run(run, profile_chars=None):
            lines += _section(section, "##" if len(runs) == 1 else "###")
    return "\n".join(lines).rstrip() + "\n"


def render_gates(report: GateReport) -> str:
    """Return the Markdown of a page on one network's gates."""
    lines = [f"# {escape(report.name)}", "", f"**{escape(report.outlook)}**", ""]
    for section in gate_sections.of_gates(report, profile_chars=None):
        lines += _section(section, "##")
    return "\n".join(lines).rstrip() + "\n"


def escape(text: str) -> str:
    """Return text of a record as Markdown that shows exactly it, on one line."""
    text = SPECIAL.sub(r"\\\1", " ".join(text.split()).replace("&", "&amp;"))
    return EDGE_UNDERSCORE.sub(r"\\_", text)


def _section(section: Section, heading: str) -> Iterator[str]:
    yield from (f"{heading} {section.title}", "")
    for paragraph in section.paragraphs:
        yield from (escape(paragraph), "")
    if section.command is not None:
        yield from (*_code(section.command), "")
    for table in section.tables:
        yield from (*_table(table), "")


def _table(table: Table) -> Iterator[str]:
    """Yield a table under its caption; a long one is folded away."""
    if table.is_long:
        yield from ("<details>", f"<summary>{html.escape(table.caption)}</summary>", "")
    else:
        yield from (f"{escape(table.caption)}:", "")
    yield _row(table.head)
    yield _row(["---:" if letter == "r" else "---" for letter in table.align], raw=True)
    for row in table.rows:
        yield _row(row)
    if table.is_long:
        yield from ("", "</details>")


def _row(cells: Sequence[str], *, raw: bool = False) -> str:
    return f"| {' | '.join(cells if raw else [escape(cell) for cell in cells])} |"


def _code(command: str) -> Iterator[str]:
    """Yield a fenced block; the fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", command)), default=0)
    fence = "`" * max(3, longest + 1)
    yield from (f"{fence}sh", *command.splitlines(), fence)
