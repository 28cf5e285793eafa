"""The report on a terminal: the numbers of the page, and its figures as text."""

import io
import re

from rich.console import Console
from se_prune_cli.terminal import LEVELS, show_report

from se_prune.report import html
from tests.pages import Page
from tests.runs import CLASSES, HOSTILE, cost, hostile_run, make_run

NUMBER = re.compile(r"[−+]?\d[\d,.]*\d|\d")


def shown(runs, width=400):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    show_report(console, runs)
    return console.file.getvalue()


def words(text):
    return " ".join(text.split())


def page_words(runs):
    page = Page(html.render(runs))
    return page, words(" ".join([page.text, *page.tips]))


def test_every_cell_and_sentence_of_the_page_stands_on_the_terminal():
    runs = [make_run(), make_run(name="again", cost_after=cost(31_000_000, 210_000, 90_000))]
    text, (page, _) = words(shown(runs)), page_words(runs)
    cells = [words(cell) for cell in page.cells]
    assert len(cells) > 400
    assert [cell for cell in cells if cell not in text] == []


def test_every_number_of_a_figure_stands_on_the_page():
    runs = [make_run()]
    _, page = page_words(runs)
    known = set(NUMBER.findall(page))
    lines = [line for line in shown(runs).splitlines() if re.search(r"[█●░]", line)]
    assert len(lines) > 25
    values = [re.split(r"[█░▏●○─·]\s", line)[-1] for line in lines]
    numbers = [number for value in values for number in NUMBER.findall(value)]
    assert len(numbers) >= 40
    assert [number for number in numbers if number not in known] == []


def test_bars_are_as_long_as_their_values():
    lines = shown([make_run()]).splitlines()
    (line,) = [line for line in lines if "8 of 16" in line and " conv1 " in line]
    assert (line.count("█"), line.count("░")) == (24, 24)
    (line,) = [line for line in lines if "16 of 64" in line]
    assert (line.count("█"), line.count("░")) == (12, 36)


def test_gates_are_heights_of_every_class():
    lines = shown([make_run()]).splitlines()
    for name in (*CLASSES, "mean of all classes"):
        found = [line for line in lines if re.fullmatch(rf"\s*{re.escape(name)} [{LEVELS}]+", line)]
        assert [len(line.split()[-1]) for line in found] == [64, 32], name


def test_hostile_names_are_no_markup():
    text = shown([hostile_run()])
    assert HOSTILE in text.replace("\n", "")
    assert "[/]" not in shown([make_run(name="[bold]x[/]")]).replace("[bold]x[/]", "")
    assert "[bold]x[/]" in shown([make_run(name="[bold]x[/]")])


def test_a_narrow_terminal_keeps_names_whole():
    text = shown([make_run()], width=80)
    assert max(len(line) for line in text.splitlines()) <= 120
    assert re.search(r"^ layer3\.2\.se ", text, re.MULTILINE)
