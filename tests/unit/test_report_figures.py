"""The figures of a report: what they draw of the record, that they fit, and that they let nobody inject."""

import base64
import dataclasses
import itertools
import math
import re
import xml.etree.ElementTree as ET

import pytest

from se_prune.errors import SePruneError
from se_prune.report import (
    changes,
    figures,
    gate_figures,
    gate_sections,
    html,
    sections,
    svg,
    write_figures_of,
)
from se_prune.report.plot import PALETTE, Band, Bar, Cell, Dot, Line, nice, shortened
from se_prune.results import GateProfile
from tests.pages import Page
from tests.runs import CLASSES, HOSTILE, SITES, cost, evaluation, hostile_run, make_run, profile


@pytest.fixture(scope="module")
def run():
    return make_run()


def marks(plot, kind):
    return [mark for mark in plot.marks if isinstance(mark, kind)]


def drawn(source):
    """Parse an inline plot."""
    return ET.fromstring(f"<div>{source}</div>")


def points(element):
    """Read the points of an inline path back, as the page's script does."""
    numbers = [int(number) for number in re.findall(r"-?\d+", element.get("d"))]
    steps = zip(numbers[::2], numbers[1::2], strict=True)
    return list(itertools.accumulate(steps, lambda a, b: (a[0] + b[0], a[1] + b[1])))


def curves(plot):
    return [e for e in drawn(svg.inline(plot, "x")).iter("path") if e.get("class") == "curve"]


def gates_figure(run, chars=math.inf):
    section = gate_sections.of_run(run, chars)
    return next((figure for figure in section.figures if figure.key == "gates"), None)


def test_gate_profiles_hold_every_site_and_class_before_and_after(run):
    figure = gates_figure(run)
    assert figure.choices == SITES
    assert [len(panel) for panel in figure.panels] == [2, 2, 2, 1], "the last site is folded"
    for panel, dense in zip(figure.panels, run.profiles, strict=True):
        found = curves(panel[0])
        assert [line.get("data-name") for line in found] == [*CLASSES, "mean of all classes"]
        axis = panel[0].y
        for line, gates in zip(found, [*dense.per_class.values(), dense.mean], strict=True):
            read = [axis.high - y / svg.STEPS * (axis.high - axis.low) for _, y in points(line)]
            assert read == pytest.approx(gates, abs=0.6 * (axis.high - axis.low) / svg.STEPS)
        [band] = marks(panel[0], Band)
        edge = [max(0.0, m - s) for m, s in zip(dense.mean, dense.std, strict=True)]
        assert band.low == pytest.approx(edge), "the band stays between the axes"
        *thin, bold = (line.width for line in marks(panel[0], Line))
        assert max(thin) <= bold / 2
    after = figure.panels[2][1]
    assert after.x == figure.panels[2][0].x, "both share the dense network's channels"
    assert [x for x, _ in points(curves(after)[-1])] == list(range(0, 64, 2))


def test_the_spread_within_a_class_travels_with_its_line(run):
    plot = gates_figure(run).panels[2][0]
    line = curves(plot)[3]
    steps = base64.b64decode(line.get("data-spread"))
    half = (plot.y.high - plot.y.low) / 2
    expected = run.profiles[2].per_class_std[CLASSES[3]]
    assert [step / 255 * half for step in steps] == pytest.approx(expected, abs=half / 255)


def test_the_site_that_differs_most_between_classes_comes_first(run):
    assert run.profiles[gate_figures.lively_site(run.profiles)].site == SITES[2]


def test_a_missing_gate_is_a_gap_and_not_a_number():
    gates = (0.5, math.nan, 0.7, 0.6)
    record = GateProfile(site="se", mean=gates, std=(0.0,) * 4, per_class={})
    [line] = curves(gate_figures.gate_profile(record, []))
    assert re.fullmatch(r"M0 \d+m2-\d+l1 \d+", line.get("d"))
    assert "nan" not in svg.inline(gate_figures.gate_profile(record, []), "x")


def test_of_many_classes_the_liveliest_are_drawn_in_their_order():
    names = [f"class {i}" for i in range(40)]
    lively = {"class 3", "class 20", "class 31"}
    per_class = {name: (0.9, 0.1) if name in lively else (0.5, 0.5) for name in names}
    record = GateProfile(site="se", mean=(0.5, 0.5), std=(0.1, 0.1), per_class=per_class)
    assert gate_figures.lively_classes([record], 3) == ["class 3", "class 20", "class 31"]
    assert gate_figures.lively_classes([record], 40) == names


def large_run(sites=16, channels=944, classes=30):
    """Return a run with the gate profiles of an SE-ResNet-50 and many classes."""
    names = tuple(f"class number {i}" for i in range(classes))
    profiles = tuple(profile(f"layer{i}.se", channels, 0.1, names) for i in range(sites))
    return make_run(profiles=profiles, profiles_after=(), classes=names)


def test_the_figure_says_where_it_has_not_every_site(run):
    few = dataclasses.replace(run, profiles=run.profiles[:3])
    assert "; 3 of 4 sites, spread evenly" in gates_figure(few).caption
    assert "spread evenly" not in gates_figure(run).caption


def test_large_profiles_are_thinned_to_fit_and_it_is_said():
    page = html.render([large_run(sites=32)] * 3)
    assert 4_000_000 < len(page.encode()) <= 6_000_000
    shown = re.search(r"; the (\d+) of 30 classes that differ most from it", Page(page).text)
    assert 1 <= int(shown[1]) < gate_figures.MAX_LINES


def test_profiles_that_cannot_fit_are_left_to_the_json():
    page = Page(html.render([large_run(sites=64, classes=2)] * 8))
    assert "run-1-gates" in page.ids
    assert "run-1-figure-gates" not in page.ids
    assert (
        "The profiles of 64 gates by channel and class are too large for this page; the JSON has them."
        in page.text
    )


def test_a_page_above_the_limit_is_refused(monkeypatch, run):
    monkeypatch.setattr(html, "MAX_BYTES", 100_000)
    with pytest.raises(SePruneError, match=r"these 1 runs would take 0\.\d MB, more than 0 MB; report fewer"):
        html.render([run])


def test_bars_show_channels_kept_by_kind(run):
    tracks, kept = (marks(figures.channels(run.plan.groups), Bar)[i::2] for i in (0, 1))
    assert [bar.label for bar in tracks][:3] == ["8 of 16", "8 of 16", "4 of 4"]
    shares = [100 * (g.channels - len(g.removed)) / g.channels for g in run.plan.groups]
    assert [bar.end for bar in kept] == shares
    assert len({bar.color for bar in kept}) == 4
    assert "at the floor of 8 channels" in kept[-2].tip


def test_error_bars_reach_to_the_wilson_interval(run):
    dots = marks(figures.stages(run), Dot)
    assert [(dot.low, dot.high) for dot in dots] == [
        tuple(100 * end for end in stage.evaluation.top1_ci95) for stage in run.stages
    ]


def test_many_stages_are_drawn_with_tilted_names(run):
    steps = tuple(dataclasses.replace(run.stages[1], evaluation=evaluation(9000 + i)) for i in range(12))
    plot = figures.stages(dataclasses.replace(run, stages=(run.stages[0], *steps)))
    assert len(marks(plot, Dot)) == 13
    assert "rotate(" in svg.inline(plot, "x")
    assert "rotate(" not in svg.inline(figures.stages(run), "x")


def test_where_the_cost_goes_adds_up(run):
    sums = changes.part_sums(run, "ms")
    assert list(sums) == ["stem", "stage 1, 28 × 28", "SE blocks", "head"]
    assert sums["SE blocks"] == (0.75, 0.375)
    macs = changes.part_sums(run, "MACs")
    for side, total in enumerate((run.cost_before, run.cost_after)):
        assert sum(pair[side] for pair in macs.values()) == sum(total.per_layer.values())
    bars = marks(figures.parts(run, "ms"), Bar)
    assert [bar.label for bar in bars if bar.label] == ["4.62 ms", "2.31 ms"]
    assert bars[3].end == pytest.approx(4.625)
    assert figures.parts(make_run(operations=None), "ms") is None
    assert figures.parts(make_run(parts={}), "MACs") is None


def test_class_changes_are_counted_on_the_same_images(run):
    first, last = run.stages[0].evaluation.predictions, run.stages[-1].evaluation.predictions
    for change in changes.class_changes(run):
        number = CLASSES.index(change.name)
        own = [(a, b) for label, a, b in zip(run.labels, first, last, strict=True) if label == number]
        assert change.n == len(own) == 1000
        assert change.difference == pytest.approx(
            (sum(b == number for _, b in own) - sum(a == number for a, _ in own)) / 1000
        )
        assert change.interval[0] < change.difference < change.interval[1]
    assert all(change.interval is None for change in changes.class_changes(make_run(labels=())))


def test_the_paired_interval_is_that_of_agresti_and_min():
    low, high = changes.paired_interval(16, 4, 100)  # by hand: -12/102 ± 1.96·sqrt(21 - 144/102)/102
    assert (low, high) == pytest.approx((-12 / 102 - 0.08507, -12 / 102 + 0.08507), abs=1e-4)
    assert changes.paired_interval(0, 0, 50)[1] > 0


def test_confusions_hold_every_image_twice(run):
    found = changes.confusions(run)
    assert sum(item.dense for item in found) == sum(item.last for item in found) == len(run.labels)
    plot = figures.confusion(run)
    worse = {(cell.y, cell.x) for cell in marks(plot, Cell) if cell.color == figures.LOSS}
    more = {(i.label, i.answer) for i in found if i.label != i.answer and i.last > i.dense}
    assert more <= worse
    assert figures.confusion(make_run(labels=())) is None


def test_an_image_that_one_network_could_not_read_counts_nowhere(run):
    stage = run.stages[-1]
    unread = dataclasses.replace(stage.evaluation, predictions=(-1, *stage.evaluation.predictions[1:]))
    stages = (*run.stages[:-1], dataclasses.replace(stage, evaluation=unread))
    assert len(changes.answers(dataclasses.replace(run, stages=stages))) == len(run.labels) - 1


def test_depth_shows_both_networks(run):
    plot = gate_figures.depth(run.sites, run.sites_after, "class_specificity")
    assert [line.name for line in marks(plot, Line)] == ["dense", "pruned"]
    assert [dot.y for dot in marks(plot, Dot)][:4] == pytest.approx([12, 35, 71, 2])
    assert len(marks(plot, Dot)) == 7


def trio():
    run = make_run()
    smaller = make_run(name="smaller", cost_after=cost(10_000_000, 90_000, 20_000))
    worse = (run.stages[0], dataclasses.replace(run.stages[3], evaluation=evaluation(9000)))
    return run, smaller, make_run(name="worse", stages=worse)


def test_the_pareto_line_joins_what_nothing_beats():
    plot = figures.tradeoff(trio(), "MACs")
    dots = marks(plot, Dot)
    assert [(dot.x, dot.label) for dot in dots] == [
        (20.049, "1"),
        (10.0, "2"),
        (20.049, "3"),
        (41.0, ""),
    ]
    [front] = marks(plot, Line)
    assert front.xs == (10.0, 41.0), "run 1 is no better than run 2, which is smaller"


def test_latencies_are_shares_of_the_fastest_dense_network():
    runs = trio()
    slow = tuple(dataclasses.replace(value, median_ms=2 * value.median_ms) for value in runs[1].latency)
    dots = marks(figures.tradeoff((runs[0], make_run(latency=slow)), "ms"), Dot)
    assert [dot.x for dot in dots] == pytest.approx([7.61 / 1.38, 7.61 / 1.38, 7.61])
    assert figures.tradeoff([make_run(latency=None)], "ms") is None
    other = tuple(dataclasses.replace(value, threads=4) for value in runs[1].latency)
    section = sections.compare([*runs, make_run(latency=other)])
    assert "Runs 4 were timed elsewhere or in another way" in " ".join(section.paragraphs)


def test_hostile_names_stay_text_in_figures(tmp_path):
    run = hostile_run()
    page = html.render([run, run])
    assert HOSTILE not in page
    assert "<script>alert" not in page
    assert any(" ".join(HOSTILE.split())[:20] in tip for tip in Page(page).tips)
    written = write_figures_of([run], tmp_path / "figures")
    pictures = [path for path in written if path.suffix == ".svg"]
    assert len(pictures) > 8
    for path in pictures:
        assert path.parent == tmp_path / "figures"
        assert {e.tag.rpartition("}")[2] for e in ET.parse(path).iter()} <= {
            "svg", "g", "rect", "text", "path", "line", "circle", "title",
        }  # fmt: skip


def test_files_have_the_light_colours_and_stay_inside(tmp_path, run):
    written = write_figures_of([run, run], tmp_path / "f")
    pictures = [path for path in written if path.suffix == ".svg"]
    names = {path.relative_to(tmp_path / "f").as_posix() for path in pictures}
    own = "1-se_resnet20_at_half_of_its_MACs"
    assert {"tradeoff-macs.svg", "tradeoff-latency.svg", f"{own}/gates-layer3.0.se.svg"} <= names
    assert {f"{own}/within-layer3.0.se.svg", f"{own}/pruned-within-layer3.0.se.svg"} <= names
    assert {f"{own}/{name}.svg" for name in ("stages", "channels", "classes", "confusion")} <= names
    assert {f"{own}/class-specificity.svg", f"{own}/saturated.svg", f"{own}/parts-latency.svg"} <= names
    for path in pictures:
        text = path.read_text()
        root = ET.fromstring(text)
        width, height = float(root.get("width")), float(root.get("height"))
        assert "var(" not in text
        for circle in root.iter("{http://www.w3.org/2000/svg}circle"):
            assert 0 < float(circle.get("cx")) < width
            assert 0 < float(circle.get("cy")) < height


def test_png_is_made_where_the_package_is_there(tmp_path, run):
    pytest.importorskip("resvg_py")
    written = write_figures_of([run], tmp_path)
    pictures = [path for path in written if path.suffix == ".png"]
    assert len(pictures) == sum(path.suffix == ".svg" for path in written)
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for path in pictures)


def test_colours_are_named_so_that_they_follow_the_scheme(run):
    source = html.render([run, run])
    used = set(re.findall(r"var\(--([a-z]+)\)", source))
    light, dark = re.findall(r":root \{\s*(?:color-scheme: light dark;)?([^}]*--bg[^}]*)\}", source)
    assert used >= {"ink", "blue", "orange", "track"}
    assert used <= set(PALETTE)
    for name in used:
        assert f"--{name}: {PALETTE[name][0]};" in light
        assert f"--{name}: {PALETTE[name][1]};" in dark


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0, 1.02, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (-3, 3, ["−2", "0", "2"]),
        (93.2, 94.7, ["93.5", "94.0", "94.5"]),
        (5, 5, ["5"]),
    ],
)
def test_ticks_are_round(low, high, labels):
    assert [label for _, label in nice(low, high)] == labels


def test_long_names_lose_their_middle():
    assert shortened("blocks.5.2.se.conv_reduce") == "blocks.5.2…conv_reduce"
    assert shortened("layer1.0.conv1") == "layer1.0.conv1"
