"""What a report says, section by section; the web page and the Markdown are two ways of writing it down.

A section that the record has nothing for does not appear.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from se_prune import text
from se_prune.report import changes, class_tables, figures, gate_sections, search, tables
from se_prune.report.content import Figure, Picture, Section, Tile
from se_prune.results import Run


def verdict(run: Run) -> str:
    """Return the result of a run in one sentence."""
    macs = text.share(run.cost_after.macs, run.cost_before.macs)
    params = text.share(run.cost_after.params, run.cost_before.params)
    kept = f"{run.arch.ref} keeps {macs} of its MACs and {params} of its parameters"
    pair = changes.dense_and_last(run)
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
    pair = changes.dense_and_last(run)
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
    charts = [_tradeoff(runs, unit) for unit in ("MACs", "ms")]
    left_out = [str(i) for i, run in enumerate(runs, start=1) if _is_timed_otherwise(run, runs)]
    if left_out:
        paragraphs.append(
            f"Runs {', '.join(left_out)} were timed elsewhere or in another way; the figure of latency leaves them out."
        )
    return Section(
        key="comparison",
        title="Comparison",
        paragraphs=tuple(paragraphs),
        figures=tuple(chart for chart in charts if chart is not None),
        tables=(tables.comparison(runs),),
    )


def _tradeoff(runs: Sequence[Run], unit: str) -> Figure | None:
    plot = figures.tradeoff(runs, unit)
    if plot is None:
        return None
    cost, how = "MACs", ""
    if unit == "ms":
        runtime, device, threads, batch = figures.timed_alike(runs) or ("", "", 0, 0)
        cost, how = "measured latency", f" ({runtime} on {device}, batch {batch}, threads {threads})"
    return Figure(
        key=f"tradeoff-{'latency' if unit == 'ms' else 'macs'}",
        caption=f"Top-1 against {cost}{how} with 95 % Wilson intervals; numbers as in the table, open points are "
        "dense, the line joins those that no other one beats in both",
        description=f"Scatter plot of accuracy against {cost}; the table below has the same numbers.",
        panels=((plot,),),
        keys=figures.tradeoff_keys(runs),
    )


def _is_timed_otherwise(run: Run, runs: Sequence[Run]) -> bool:
    own = figures.conditions_of(run)
    return own is not None and own != figures.timed_alike(runs)


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
        _costs(run),
        _channels(run),
        gate_sections.of_run(run, profile_chars),
        _classes(run),
        _changed(run),
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
                key="stages",
                caption=f"Top-1 with 95 % Wilson intervals; the dotted line is the {run.stages[0].stage} network",
                description="Line chart of top-1 after each stage; the table below has the same numbers.",
                panels=((figures.stages(run),),),
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
                key="channels",
                caption="Channels kept in each group: pale before, coloured by kind after",
                description="Bar chart of the share of channels kept; the table below has the same numbers.",
                panels=((figures.channels(plan.groups),),),
                keys=figures.group_keys(plan.groups),
            ),
        ),
        tables=(table,),
    )


def _costs(run: Run) -> Section | None:
    table = tables.parts(run)
    if table is None:
        return None
    charts = []
    for unit, name in (("MACs", "MACs"), ("ms", "milliseconds")):
        plot = figures.parts(run, unit)
        if plot is not None:
            charts.append(
                Figure(
                    key=f"parts-{'latency' if unit == 'ms' else 'macs'}",
                    caption=f"Where the {name} go",
                    description=f"Stacked bars of the {name} of each part; the table below has the same numbers.",
                    panels=((plot,),),
                    keys=figures.part_keys(run, unit),
                )
            )
    paragraphs = [
        "The stem is what comes before the first stage, a stage is what works at one resolution, the head what comes "
        "after the last; SE blocks are taken out of their stages."
    ]
    if run.operations is not None:
        runtime = "torch" if run.latency is None else run.latency[1].runtime
        paragraphs.append(
            f"Times are of single operations in {runtime}'s profile, batch 1, lower quartiles over runs; profiling "
            "costs time itself, so their sum is above the latency."
        )
    return Section(
        key="costs",
        title="Where the cost is",
        paragraphs=tuple(paragraphs),
        figures=tuple(charts),
        tables=(table,),
    )


def _classes(run: Run) -> Section | None:
    table = class_tables.classes(run)
    if table is None:
        return None
    found = changes.class_changes(run)
    lost, won = (sum(sign * change.difference > 0 for change in found) for sign in (-1, 1))
    sentence = (
        f"{lost} of {text.count(len(found))} classes lose accuracy and {won} gain from {run.stages[0].stage} to "
        f"{run.stages[-1].label}."
    )
    if any(change.interval is not None for change in found):
        certain = [change.name for change in found if change.is_certain and change.difference < 0]
        sentence += (
            f" The 95 % interval of the change (of the same images, Agresti and Min) leaves zero out for "
            f"{len(certain)} that lose{': ' + ', '.join(certain[:8]) if certain else ''}"
            f"{' …' if len(certain) > 8 else ''}. Of twenty "
            "classes without any change one such interval would leave it out by chance."
        )
    else:
        sentence += (
            " A class has only its part of the images, so its change is less certain than that of top-1."
        )
    charts = [
        Figure(
            key="classes",
            caption="Change of accuracy, in percentage points"
            + (", with 95 % intervals" if any(c.interval for c in found) else ""),
            description="Bar chart of the change of accuracy of each class; the table below has the numbers.",
            panels=((figures.classes(run),),),
        )
    ]
    picture = figures.confusion(run)
    if picture is not None:
        charts.append(
            Figure(
                key="confusion",
                caption="Change of the confusion matrix: images of a class (row) with an answer (column), "
                f"{run.stages[-1].label} minus {run.stages[0].stage}; orange is worse, blue is better",
                description="Table of colours; the table of wrong answers below has the largest of its numbers.",
                panels=((picture,),),
            )
        )
    wrong = class_tables.confusions(run)
    return Section(
        key="classes",
        title="Accuracy of each class",
        paragraphs=(sentence,),
        figures=tuple(charts),
        tables=(table,) if wrong is None else (table, wrong),
    )


def _changed(run: Run) -> Section | None:
    if not run.changed:
        return None
    three = changes.answers(run)
    lost = sum(label == a != b for label, a, b in three)
    won = sum(label == b != a for label, a, b in three)
    other = sum(a != b for _, a, b in three) - lost - won
    shown = (
        f"{text.count(lost + won + other)} of {text.count(len(three))} test images have another answer in the pruned "
        f"network: {text.count(lost)} were right before, {text.count(won)} are right now, {text.count(other)} are "
        f"wrong both times. {len(run.changed)} of them, orange where the right answer was lost:"
    )
    pictures = []
    for item in run.changed:
        label, first, second = (
            changes.class_name(run, number) for number in (item.label, item.first, item.second)
        )
        pictures.append(
            Picture(
                source=f"data:{item.mime};base64,{item.data}",
                title=f"{first} → {second}",
                detail=f"is {label}, no. {item.index}",
                is_loss=item.first == item.label,
            )
        )
    return Section(
        key="changed", title="Images whose answer changed", paragraphs=(shown,), pictures=tuple(pictures)
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
    return Section(
        key="reproduce",
        title="How to reproduce",
        paragraphs=(f"Data {run.data}, architecture {run.arch.ref}, seed {run.seed}.",),
        tables=tables.environment(run.environment, run.hashes),
        command=run.command,
    )
