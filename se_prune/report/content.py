"""What a report is made of, whatever writes it down: sections of paragraphs, figures, pictures and tables."""

from __future__ import annotations

from dataclasses import dataclass

from se_prune.report.plot import Key, Plot
from se_prune.report.tables import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One or several panels under one caption; with several, `choices` names each and the reader picks one.

    A panel is some plots below each other; `first` is the one that is shown at first. `key` is the name of its file;
    `description` says in words what is drawn. `keys` is the legend; `classes` is the part of it that the reader may
    bring forward, in the order of the classes' lines.
    """

    key: str
    caption: str
    description: str
    panels: tuple[tuple[Plot, ...], ...]
    choices: tuple[str, ...] = ()
    first: int = 0
    keys: tuple[Key, ...] = ()
    classes: tuple[Key, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One key number: what it is, its value, and where it comes from."""

    name: str
    value: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A small image (a data URL) with two lines below it; `is_loss` where a right answer was lost."""

    source: str
    title: str
    detail: str
    is_loss: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A heading with paragraphs, a command line, figures, pictures and tables, in this order."""

    key: str
    title: str
    paragraphs: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    pictures: tuple[Picture, ...] = ()
    tables: tuple[Table, ...] = ()
    command: str | None = None
