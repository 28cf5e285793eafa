"""Compression reports: HTML, Markdown and JSON from run records; nothing is measured here."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from se_prune.errors import SePruneError, UsageError
from se_prune.files import write_text
from se_prune.report import gate_sections, html, markdown, sections
from se_prune.report.content import Figure
from se_prune.report.files import safe_name, write_figures
from se_prune.results import GateReport, Run
from se_prune.schema import from_json, to_json

__all__ = ["load_run", "write_figures_of", "write_gate_figures", "write_gate_report", "write_report"]


def write_report(runs: Sequence[Run], output: str | Path) -> list[Path]:
    """Write a report of one or several runs as `output` (HTML), with `.md` and `.json` of the same stem beside it.

    The JSON is the list of run records as they are: fractions, and the predictions for paired tests.

    Args:
        runs: The records; several are compared first.
        output: The HTML file; `.html` is added where it has no suffix.

    Returns:
        The three files: HTML, Markdown, JSON.

    Raises:
        UsageError: There is no run, `output` is not an HTML file, or its JSON would replace a run record.
        SePruneError: The page would be larger than 6 MB, or a file cannot be written.
    """
    _require_runs(runs)
    page = _html_path(Path(output))
    json_text = "[\n" + ",\n".join(to_json(run) for run in runs) + "\n]\n"
    return _write(page, html.render(runs), markdown.render(runs), json_text)


def write_figures_of(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Write every figure of runs as SVG, and as PNG where the extra `figures` is installed.

    Args:
        runs: The records; with several, each has a folder in `folder`, and the comparison stands beside them.
        folder: Where the files go.

    Raises:
        UsageError: There is no run.
        SePruneError: A file cannot be written.
    """
    _require_runs(runs)
    if len(runs) == 1:
        return write_figures(_of_run(runs[0]), folder)
    written = write_figures(sections.compare(runs).figures, folder)
    for i, run in enumerate(runs, start=1):
        written += write_figures(_of_run(run), folder / safe_name(f"{i}-{run.name}"))
    return written


def _require_runs(runs: Sequence[Run]) -> None:
    if not runs:
        raise UsageError(
            "there is no run to report; name at least one run record (`se-prune run` writes them)."
        )


def write_gate_report(report: GateReport, output: str | Path) -> list[Path]:
    """Write a page on one network's gates, and Markdown and JSON beside it; as `write_report`.

    Raises:
        UsageError: `output` is not an HTML file, or its JSON would replace a run record.
        SePruneError: The page would be larger than 6 MB, or a file cannot be written.
    """
    page = _html_path(Path(output))
    texts = html.render_gates(report), markdown.render_gates(report), f"[\n{to_json(report)}\n]\n"
    return _write(page, *texts)


def write_gate_figures(report: GateReport, folder: Path) -> list[Path]:
    """Write every figure of one network's gates as SVG, and as PNG where the extra `figures` is installed.

    Raises:
        SePruneError: A file cannot be written.
    """
    found = [f for section in gate_sections.of_gates(report, math.inf) for f in section.figures]
    return write_figures([*found, *gate_sections.within_class(report.profiles, ())], folder)


def _write(page: Path, html_text: str, markdown_text: str, json_text: str) -> list[Path]:
    texts = {
        page: html_text,
        page.with_suffix(".md"): markdown_text,
        page.with_suffix(".json"): json_text,
    }
    for path, content in texts.items():
        write_text(path, content)
    return list(texts)


def _of_run(run: Run) -> list[Figure]:
    found = [figure for section in sections.of_run(run, math.inf) for figure in section.figures]
    return [*found, *gate_sections.within_class(run.profiles, run.profiles_after)]


def _html_path(output: Path) -> Path:
    """Return the HTML file to write, after checking that nothing of the user's is replaced."""
    page = output if output.suffix else output.with_suffix(".html")
    if page.suffix not in {".html", ".htm"}:
        raise UsageError(f"a report is an HTML file, got {output}; give -o a name that ends in .html.")
    beside = page.with_suffix(".json")
    if _is_single_record(beside):
        raise UsageError(
            f"the report's JSON would replace the run record {beside}; give -o another name, such as "
            f"{page.with_stem(page.stem + '-report').name}."
        )
    return page


def _is_single_record(path: Path) -> bool:
    """Say whether a file is a JSON object; a report's own JSON is a list and may be replaced."""
    try:
        with path.open("rb") as file:
            return file.read(64).lstrip().startswith(b"{")
    except OSError:
        return False


def load_run(path: str | Path) -> Run:
    """Read a run record; a report's JSON with one run in it is read as well.

    Raises:
        SePruneError: The file is missing, not JSON, or not the record of one run.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise SePruneError(
            f"cannot read the run record {path}: {error.strerror}; `se-prune run` writes one."
        ) from error
    what = f"the run record {path}"
    if not content.lstrip().startswith(b"["):
        return _read(content, what)
    try:
        records = json.loads(content)
    except ValueError as error:
        raise SePruneError(f"{what} is damaged ({error}); copy it again, or repeat the run.") from error
    if len(records) != 1:
        raise SePruneError(
            f"{what} is the JSON of a report of {len(records)} runs; give the record of one run."
        )
    return _read(json.dumps(records[0]).encode(), what)


def _read(content: bytes, what: str) -> Run:
    try:
        return from_json(Run, content, what=what)
    except SePruneError as error:
        raise SePruneError(
            f"{error} It is damaged or of another version; copy it again, or repeat the run."
        ) from error
