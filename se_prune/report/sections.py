"""What a report says, section by section; the web page and the Markdown are two ways of writing it down.

A section that the record has nothing for does not appear.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from se_prune import text
from se_prune.report import figures, search, tables
from se_prune.report.figures import Key, Spec
from se_prune.report.tables import Table
from se_prune.results import GateProfile, Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One or several specs under one caption; with several, `choices` names each and the reader picks one.

    `first` is the spec that is shown at first; `description` says in words what is drawn. `keys` is the legend;
    `classes` is the part of it that the reader may bring forward, in the order of the classes' lines.
    """

    caption: str
    description: str
    specs: tuple[Spec, ...]
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
class Section:
    """A heading with paragraphs, figures, tables and a command line, in this order."""

    key: str
    title: str
    paragraphs: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    command: str | None = None


def verdict(run: Run) -> str:
    """Return the result of a run in one sentence."""
    macs = text.share(run.cost_after.macs, run.cost_before.macs)
    params = text.share(run.cost_after.params, run.cost_before.params)
    kept = f"{run.arch.ref} keeps {macs} of its MACs and {params} of its parameters"
    pair = tables.dense_and_last(run)
    if pair is None:
        return f"{kept}."
    dense, last = pair
    change = text.points(last.top1 - dense.top1)
    test = f", exact McNemar p {text.p_value(run.paired.p_value)}" if run.paired else ""
    images = f"{text.count(last.n)} test images"
    return (
        f"{kept}; top-1 {text.percent(dense.top1, 2)} → {text.percent(last.top1, 2)} "
        f"(difference {change}{test}) on {images}."
    )


def tiles(run: Run) -> list[Tile]:
    """Return the key numbers of a run, for the top of its page."""
    before, after = run.cost_before, run.cost_after
    result = [
        _kept_tile("MACs kept", before.macs, after.macs, text.scaled),
        _kept_tile("parameters kept", before.params, after.params, text.scaled),
        _kept_tile("size kept", run.bytes_before, run.bytes_after, text.file_size),
    ]
    pair = tables.dense_and_last(run)
    if pair is not None:
        dense, last = pair
        detail = f"{text.percent(dense.top1, 2)} → {text.percent(last.top1, 2)}"
        result.append(Tile(name="top-1", value=text.points(last.top1 - dense.top1), detail=detail))
    if run.latency is not None:
        first, second = run.latency
        detail = f"{text.milliseconds(first.median_ms)} → {text.milliseconds(second.median_ms)}"
        result.append(Tile(name="latency", value=text.speed(second.ratio), detail=detail))
    return result


def _kept_tile(name: str, before: int, after: int, write: Callable[[int], str]) -> Tile:
    return Tile(name=name, value=text.share(after, before), detail=f"{write(before)} → {write(after)}")


def compare(runs: Sequence[Run]) -> Section:
    """Return the section that sets several runs side by side."""
    paragraphs = []
    data = list(dict.fromkeys(run.data for run in runs))
    if len(data) > 1:
        paragraphs.append(
            f"The runs use different data ({', '.join(data)}); their accuracies do not compare."
        )
    chart: tuple[Figure, ...] = ()
    if any(run.stages for run in runs):
        chart = (
            Figure(
                caption="Top-1 against MACs with 95 % Wilson intervals; numbers as in the table, diamonds are dense",
                description="Scatter plot of accuracy against MACs; the table below has the same numbers.",
                specs=(figures.tradeoff(runs),),
                keys=figures.tradeoff_keys(runs),
            ),
        )
    return Section(
        key="comparison",
        title="Comparison",
        paragraphs=tuple(paragraphs),
        figures=chart,
        tables=(tables.comparison(runs),),
    )


def of_run(run: Run, profile_chars: float | None) -> list[Section]:
    """Return the sections of one run.

    Args:
        run: The record.
        profile_chars: How many characters of the page the gate profiles may take; None where there are no
            figures.
    """
    candidates = [
        _before_after(run),
        _stages(run),
        _search(run),
        _channels(run),
        _gates(run, profile_chars),
        _classes(run),
        _exported(run),
        _left_out(run),
        _reproduce(run),
    ]
    return [section for section in candidates if section is not None]


def _before_after(run: Run) -> Section:
    size = text.shape(run.cost_before.input_size)
    paragraphs = [
        f"MACs count convolutions and fully connected layers for one image of {size}, one multiply-add = 1. "
        "Parameters are the learnable ones. 1 MB is 10⁶ bytes."
    ]
    if run.latency is not None:
        conditions = dict.fromkeys(tables.latency_conditions(value) for value in run.latency)
        paragraphs.append(
            f"Latency: {'; '.join(conditions)}. The ratio is the median over rounds of dense / pruned, "
            "so it can differ a little from the ratio of the two medians."
        )
    folded = run.plan.sites_folded
    paragraphs.append(
        f"Removing the channels{f' and {folded} SE blocks' if folded else ''} changed no logit by more than "
        f"{text.tiny(run.max_abs_diff_masked)} against the dense network with the same channels masked"
        f"{' and those gates constant' if folded else ''}."
    )
    chosen = [tables.before_after(run), tables.layers(run)]
    return Section(
        key="before-after",
        title="Before and after",
        paragraphs=tuple(paragraphs),
        tables=tuple(table for table in chosen if table is not None),
    )


def _stages(run: Run) -> Section | None:
    table = tables.stages(run)
    if table is None:
        return None
    paragraphs = []
    if run.paired is not None:
        paragraphs.append(
            f"On the same images, {text.count(run.paired.only_first_right)} are right in the dense network only and "
            f"{text.count(run.paired.only_second_right)} in the pruned one only: a difference of "
            f"{text.points(run.paired.top1_difference)}, exact two-sided McNemar p {text.p_value(run.paired.p_value)}."
        )
    return Section(
        key="stages",
        title="Accuracy at each stage",
        paragraphs=tuple(paragraphs),
        figures=(
            Figure(
                caption=f"Top-1 with 95 % Wilson intervals; the dotted line is the {run.stages[0].stage} network",
                description="Line chart of top-1 after each stage; the table below has the same numbers.",
                specs=(figures.stages(run),),
            ),
        ),
        tables=(table,),
    )


def _search(run: Run) -> Section | None:
    if run.max_drop is None:
        return None
    told = search.sentence(run.max_drop)
    return Section(
        key="search",
        title="The smallest network within a drop",
        paragraphs=(f"{told[0].upper()}{told[1:]}. Drops are in points; positive is a loss.",),
        tables=(search.tries(run.max_drop),),
    )


def _channels(run: Run) -> Section | None:
    table = tables.groups(run)
    if table is None:
        return None
    plan = run.plan
    return Section(
        key="channels",
        title="Channels kept",
        paragraphs=(
            f"Criterion {plan.criterion}, budget {tables.budget(plan.budget)}, widths in multiples of "
            f"{plan.round_to}, at least {plan.min_channels} channels: {text.count(plan.channels_removed)} of "
            f"{text.count(plan.channels_total)} channels leave, hidden units not counted.",
        ),
        figures=(
            Figure(
                caption="Channels kept in each group: pale before, coloured by kind after",
                description="Bar chart of the share of channels kept; the table below has the same numbers.",
                specs=(figures.channels(plan.groups),),
                keys=figures.group_keys(plan.groups),
            ),
        ),
        tables=(table,),
    )


def _gates(run: Run, profile_chars: float | None) -> Section | None:
    table = tables.sites(run)
    chart = None if profile_chars is None else _profile_figure(run.profiles, profile_chars)
    if table is None and not run.profiles:
        return None
    paragraphs = []
    if run.sites:
        fold = sum(site.advice == "fold" for site in run.sites)
        done = f", and {run.plan.sites_folded} were folded" if run.plan.sites else ""
        paragraphs.append(
            f"The advice is to fold {fold} of {len(run.sites)} gate sites{done}. Class specificity is the "
            "between-class share of the gate's variance; saturated is the share of gates above 0.95 or below 0.05; "
            "fold loss is the share of recalibrated energy that the best constant gate misses"
            + (
                "; logit shift is the share of the logits' energy by which they then move, to first order."
                if any(site.logit_shift is not None for site in run.sites)
                else "."
            )
        )
    if run.profiles and chart is None:
        reason = "are drawn in the HTML report" if profile_chars is None else "are too large for this page"
        paragraphs.append(
            f"The profiles of {len(run.profiles)} gates by channel and class {reason}; the JSON has them."
        )
    return Section(
        key="gates",
        title="What the gates do",
        paragraphs=tuple(paragraphs),
        figures=() if chart is None else (chart,),
        tables=() if table is None else (table,),
    )


def _profile_figure(profiles: Sequence[GateProfile], chars: float) -> Figure | None:
    """Return the gate profiles with as many classes as fit, or None where not even the means do."""
    channels = sum(len(profile.mean) for profile in profiles)
    if not channels:
        return None
    curves = int(chars / (channels * figures.CHARS_PER_GATE)) - 3  # beside the mean and two edges of its band
    if curves < 0:
        return None
    known = len({name for profile in profiles for name in profile.per_class})
    names = figures.lively_classes(profiles, min(curves, figures.MAX_LINES))
    which = "" if len(names) == known else f"; the {len(names)} of {known:,} classes that differ most from it"
    return Figure(
        caption="Gate by channel: one line a class, bold the mean of all classes with a band of one standard "
        f"deviation over images (Figure 5 of the paper){which}",
        description="Line chart of the gate by channel index, one line a class; the JSON beside this file has the "
        "numbers.",
        specs=tuple(figures.gate_profile(profile, names) for profile in profiles),
        choices=tuple(profile.site for profile in profiles),
        first=figures.lively_site(profiles),
        keys=(figures.mean_key(),),
        classes=figures.class_keys(names),
    )


def _classes(run: Run) -> Section | None:
    table = tables.classes(run)
    if table is None:
        return None
    changes = tables.class_changes(run)
    return Section(
        key="classes",
        title="Accuracy of each class",
        paragraphs=(
            f"{sum(last < dense for _, dense, last in changes)} of {text.count(len(changes))} classes lose accuracy "
            f"and {sum(last > dense for _, dense, last in changes)} gain from {run.stages[0].stage} to "
            f"{run.stages[-1].label}. A class has only its part of the images, so its change is less certain than "
            "that of top-1.",
        ),
        figures=(
            Figure(
                caption="Change of accuracy, in percentage points",
                description="Bar chart of the change of accuracy of each class; the table below has the numbers.",
                specs=(figures.classes(run),),
            ),
        ),
        tables=(table,),
    )


def _exported(run: Run) -> Section | None:
    table = tables.exported(run)
    if table is None:
        return None
    return Section(key="exported", title="Exported files", tables=(table,))


def _left_out(run: Run) -> Section:
    return Section(
        key="left-out",
        title="What the cost leaves out",
        paragraphs=(
            "The MACs above follow the paper: they leave out the squeeze, activation and multiply of the gates, and "
            "every operation below. These take time all the same, so only measured latency says how fast a network is.",
        ),
        tables=(tables.uncounted(run),),
    )


def _reproduce(run: Run) -> Section:
    table = tables.environment(run)
    return Section(
        key="reproduce",
        title="How to reproduce",
        paragraphs=(f"Data {run.data}, architecture {run.arch.ref}, seed {run.seed}.",),
        tables=() if table is None else (table,),
        command=run.command,
    )
