"""The tables of classes: which lose and gain, and which wrong answers became more or fewer."""

from __future__ import annotations

from se_prune import text
from se_prune.report import changes
from se_prune.report.tables import Table
from se_prune.results import Run

#: Rows of the per-class table; with more classes than this it shows both ends.
CLASS_ROWS = 60
#: Rows of the table of wrong answers.
CONFUSIONS = 16


def classes(run: Run) -> Table | None:
    """Return the accuracy per class; of many classes both ends of the ranking."""
    found = changes.class_changes(run)
    if not found:
        return None
    caption = "Accuracy of each class, largest loss first"
    if len(found) > CLASS_ROWS:
        half = CLASS_ROWS // 2
        caption = f"Accuracy of the {half} classes that lose and the {half} that gain most, of {len(found):,}"
        found = found[:half] + found[-half:]
    counted = any(change.interval is not None for change in found)
    rows = tuple(
        (
            change.name,
            text.percent(change.dense),
            text.percent(change.last),
            text.points(change.difference, 1),
            *(_certainty(change) if counted else ()),
        )
        for change in found
    )
    head = ("class", run.stages[0].stage, run.stages[-1].label, "change")
    more = ("95 % interval of the change", "images") if counted else ()
    return Table(caption=caption, head=(*head, *more), align=f"lrrr{'rr' * counted}", rows=rows)


def _certainty(change: changes.ClassChange) -> tuple[str, str]:
    if change.interval is None or change.n is None:
        return text.MISSING, text.MISSING
    return text.points_interval(change.interval), text.count(change.n)


def confusions(run: Run) -> Table | None:
    """Return the wrong answers whose number changed most."""
    wrong = [
        item for item in changes.confusions(run) if item.label != item.answer and item.last != item.dense
    ]
    if not wrong:
        return None
    most = sorted(wrong, key=lambda item: (-abs(item.last - item.dense), item.label, item.answer))[
        :CONFUSIONS
    ]
    return Table(
        caption="Wrong answers whose number changed most",
        head=("class", "answered", run.stages[0].stage, run.stages[-1].label, "change"),
        align="llrrr",
        rows=tuple(
            (
                changes.class_name(run, item.label),
                changes.class_name(run, item.answer),
                text.count(item.dense),
                text.count(item.last),
                f"{item.last - item.dense:+d}".replace("-", "−"),
            )
            for item in most
        ),
    )
