"""Reports from a whole record and from poor ones: what they show, what they leave out, what they let nobody inject."""

import dataclasses
import itertools
import re

import pytest

from se_prune.records import SitePlan
from se_prune.report import class_tables, figures, html, markdown, sections, tables
from se_prune.report.changes import class_changes
from se_prune.report.content import Figure, Section
from tests.pages import Page
from tests.runs import HOSTILE, SITES, cost, evaluation, hostile_run, make_run

SECTIONS = {
    "before-after": "Before and after",
    "stages": "Accuracy at each stage",
    "costs": "Where the cost is",
    "channels": "Channels kept",
    "gates": "What the gates do",
    "classes": "Accuracy of each class",
    "changed": "Images whose answer changed",
    "exported": "Exported files",
    "left-out": "What the cost leaves out",
    "reproduce": "How to reproduce",
}


@pytest.fixture(scope="module")
def run():
    return make_run()


@pytest.fixture(scope="module")
def page(run):
    return Page(html.render([run]))


@pytest.fixture(scope="module")
def prose(run):
    return markdown.render([run])


def test_the_page_is_one_file_that_opens_offline(run):
    source = html.render([run])
    page = Page(source)
    assert len(source.encode()) <= 6_000_000
    assert page.links, "the page has links to its own sections"
    inside = ("#", "data:,", "data:image/png;base64,")
    assert all(link.startswith(inside) for link in page.links)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    style = re.search(r"<style>(.*?)</style>", source, re.DOTALL).group(1)
    assert "font-family" in style
    assert "url(" not in style
    assert "@import" not in style
    assert not {"iframe", "object", "embed", "form"} & set(page.tags)


def test_a_study_is_a_page_of_its_sections(run):
    table = tables.before_after(run)
    drawn = figures.stages(run)
    shown = [
        Section(
            key=key,
            title=f"Network {key}",
            figures=(Figure(key=f"of-{key}", caption="Top-1", description="By stage.", panels=((drawn,),)),),
            tables=(table,),
        )
        for key in "ab"
    ]
    source = html.render_study("Criteria & budgets", "p < 0.05 on <three>.", shown)
    page = Page(source)
    assert "Criteria &amp; budgets" in source
    assert "p &lt; 0.05 on &lt;three&gt;." in source
    assert {"study-a", "study-b"} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert source.count('class="figure"') == 2
    assert all(source.count(cell) >= 2 for row in table.rows for cell in row if cell.isalnum())


def test_ids_are_unique_and_headings_do_not_skip_a_level(run):
    page = Page(html.render([run, dataclasses.replace(run, name="again")]))
    assert len(page.ids) == len(set(page.ids))
    levels = [int(tag[1]) for tag in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert max(levels) == 3
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_every_table_has_a_caption_and_heads_with_scope(page):
    assert page.tags.count("table") == page.tags.count("caption") == 13
    assert "th" in page.tags
    source = html.render([make_run()])
    assert not re.search(r"<th(?![^>]*scope=)[ >]", source)


@pytest.mark.parametrize(("key", "title"), SECTIONS.items())
def test_every_section_is_there(page, prose, key, title):
    assert f"run-1-{key}" in page.ids
    assert title in page.text
    assert f"## {title}\n" in prose


def test_the_verdict_is_computed_from_the_record(page, prose, run):
    expected = (
        "zoo:se_resnet20 keeps 48.9 % of its MACs and 51.0 % of its parameters; top-1 94.31 % → 93.98 % "
        "(difference −0.33 points, exact McNemar p = 0.12) on 10,000 test images."
    )
    assert sections.verdict(run) == expected
    assert expected in page.text
    assert f"**{expected}**" in prose


def test_the_verdict_claims_only_what_is_recorded(run):
    assert sections.verdict(dataclasses.replace(run, paired=None)).endswith(
        "(difference −0.33 points) on 10,000 test images."
    )
    bare = dataclasses.replace(run, paired=None, stages=())
    assert sections.verdict(bare) == "zoo:se_resnet20 keeps 48.9 % of its MACs and 51.0 % of its parameters."


NUMBERS = [
    "41.00 M",
    "20.05 M",
    "120.00 k",
    "42.5 %",
    "1.14 MB",
    "598.0 kB",
    "93.84–94.75 %",
    "7.61 ms",
    "5.35–5.96 ms",
    "1.38× as fast",
    "torch on cpu, 1 thread, batch 1, 50 interleaved rounds",
    "2.1e-06",
    "−63.11 points",
    "4 min 12 s",
    "168 of 352",
    "at the floor of 4 hidden units",
    "71.0 %",
    "583.1 kB",
    "0.653 ms",
    "batch_norm (calls)",
    "se-prune run recipes/half.toml -o runs/half",
    "seed 7",
    "2.14.1",
]


@pytest.mark.parametrize("number", NUMBERS)
def test_page_and_markdown_show_the_same_numbers(page, prose, number):
    assert number in page.text
    assert number in prose


def test_the_advice_to_fold_is_counted(page):
    assert "The advice is to fold 1 of 4 gate sites." in page.text


OPTIONAL = {
    "stages": ({"stages": (), "paired": None}, {"stages", "classes"}),
    "exported": ({"exported": ()}, {"exported"}),
    "sites and profiles": ({"sites": (), "profiles": ()}, {"gates"}),
}


@pytest.mark.parametrize(("missing", "gone"), OPTIONAL.values(), ids=OPTIONAL)
def test_what_is_not_recorded_has_no_section(missing, gone):
    whole, poor = make_run(), make_run(**missing)
    keys = {section.key for section in sections.of_run(whole, 1e6)}
    assert keys == set(SECTIONS)
    assert keys - {section.key for section in sections.of_run(poor, 1e6)} == gone
    titles = [SECTIONS[key] for key in gone]
    page = Page(html.render([poor]))
    assert not [title for title in titles if title in page.text or title in markdown.render([poor])]


def test_what_was_folded_stands_in_the_site_table_and_in_the_costs(run, page):
    assert "SE blocks changed no logit" not in page.text
    assert "logit shift" not in page.text
    plans = tuple(
        SitePlan(name=name, action="fold" if i % 2 else "keep", loss=0.1, note="into bn2" if i % 2 else None)
        for i, name in enumerate(SITES)
    )
    sites = tuple(dataclasses.replace(site, logit_shift=0.0123) for site in run.sites)
    plan = dataclasses.replace(run.plan, sites=plans)
    text = markdown.render([dataclasses.replace(run, plan=plan, sites=sites, sites_after=())])
    assert "Removing the channels and 2 SE blocks changed no logit" in text
    assert "masked and those gates constant." in text
    assert "The advice is to fold 1 of 4 gate sites, and 2 were folded." in text
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| layer")}
    assert [("folded into bn2" in rows[name], "kept |" in rows[name]) for name in SITES] == [
        (False, True),
        (True, False),
    ] * 2
    assert all("1.23 %" in rows[name] for name in SITES)
    (sites_row,) = [line for line in text.splitlines() if line.startswith("| gate sites")]
    assert [cell.strip() for cell in sites_row.split("|")[1:-1]] == ["gate sites", "4", "2", "50.0 %"]


def test_latency_appears_only_where_it_was_measured(page):
    poor = make_run(latency=None)
    assert "interleaved rounds" in page.text
    assert "latency, batch 1, median" in page.text
    rendered = Page(html.render([poor])).text + markdown.render([poor])
    assert "interleaved rounds" not in rendered
    assert "median" not in rendered


def test_one_stage_alone_claims_no_change():
    run = make_run(stages=make_run().stages[:1], paired=None)
    assert "points" not in sections.verdict(run)
    page = Page(html.render([run]))
    assert "run-1-stages" in page.ids
    assert "run-1-classes" not in page.ids


def test_hostile_names_stay_text_in_the_page(page):
    hostile = Page(html.render([hostile_run()]))
    assert hostile.handlers == []
    assert set(hostile.tags) <= set(page.tags)
    scripts = {tag: hostile.tags.count(tag) for tag in ("script", "img")}
    assert scripts == {"script": page.tags.count("script"), "img": 2}
    assert " ".join(HOSTILE.split()) in hostile.text


def test_hostile_names_stay_text_in_markdown():
    source = markdown.render([hostile_run()])
    prose, fenced, versions = re.split(r"^`````(?:sh)?$", source, flags=re.MULTILINE)
    assert HOSTILE in fenced, "a command is shown as it is, inside a fence longer than its own backticks"
    prose += versions
    unescaped = re.findall(r"(?<!\\)<(?!/?(?:details|summary)>)", prose)
    assert r"\<script\>" in prose
    assert unescaped == []
    rows = [line for line in prose.splitlines() if line.startswith("|") and "script" in line]
    heads = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
    assert heads == {3, 6, 7}, "the escaped bar adds no column to the tables of two, five and six"


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("a_b", "a_b"),
        ("__background__", r"\_\_background\_\_"),
        ("a|b", r"a\|b"),
        ("a\nb", "a b"),
        ("&lt;", "&amp;lt;"),
    ],
)
def test_markdown_escapes_only_what_it_must(raw, shown):
    assert markdown.escape(raw) == shown


def test_many_classes_show_both_ends():
    names = tuple(f"class {i}" for i in range(1000))
    stages = tuple(
        dataclasses.replace(stage, evaluation=evaluation(9000 + i, classes=names))
        for i, stage in enumerate(make_run().stages)
    )
    run = make_run(stages=stages)
    table = class_tables.classes(run)
    assert len(table.rows) == class_tables.CLASS_ROWS
    assert "of 1,000" in table.caption
    assert table.is_long
    changes = [change.difference for change in class_changes(run)]
    assert changes == sorted(changes)
    assert len(figures.classes(run).marks) == figures.CLASS_BARS
    assert "<details>" in markdown.render([run])


def test_several_runs_are_compared_first(run):
    other = make_run(
        name="three quarters",
        cost_after=cost(31_000_000, 210_000, 90_000),
        stages=(*run.stages[:1], dataclasses.replace(run.stages[1], evaluation=evaluation(9410))),
        paired=None,
        latency=None,
    )
    page = Page(html.render([run, other]))
    assert page.ids.index("comparison") < page.ids.index("run-1") < page.ids.index("run-2")
    assert page.text.count("keeps 48.9 % of its MACs") == page.text.count("keeps 75.6 % of its MACs") == 1
    assert {"figure-tradeoff-macs", "figure-tradeoff-latency"} <= set(page.ids)
    table = tables.comparison([run, other])
    assert table.rows[0][-2:] == ("0.12", "1.38×")
    assert table.rows[1][-2:] == ("–", "–")
    assert "p" not in tables.comparison([other]).head
    assert "## Comparison" in markdown.render([run, other])
    assert "Comparison" not in Page(html.render([run])).text


def test_runs_on_different_data_are_not_compared_silently(run):
    other = dataclasses.replace(run, data="cifar10")
    warning = "The runs use different data (fashion-mnist, cifar10); their accuracies do not compare."
    assert warning in Page(html.render([run, other])).text
    assert warning not in Page(html.render([run, run])).text
