"""A model card in Hugging Face's form: YAML front matter, then what a network is, how it was made, what it costs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from se_prune import text
from se_prune.records import ArtifactHeader, Cost, HistoryEntry
from se_prune.report import tables
from se_prune.report.markdown import escape
from se_prune.results import Evaluation, Exported, Latency, PairedTest, Run

#: Classes that are named in the card, and that stand in the table of the weakest ones.
NAMED, WEAKEST = 20, 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What a card is written from; what is not known is left out of it.

    `file` is the artifact's name, `dense` and `paired` compare with the network it was cut from, or with `other`.
    """

    name: str
    file: str
    header: ArtifactHeader
    data: str
    evaluation: Evaluation
    cost: Cost
    bytes: int | None
    dense: Evaluation | None = None
    dense_cost: Cost | None = None
    dense_bytes: int | None = None
    paired: PairedTest | None = None
    other: str = "dense network"
    latency: tuple[Latency, Latency] | None = None
    exported: tuple[Exported, ...] = ()
    command: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)


def of_run(run: Run, header: ArtifactHeader, file: str) -> Card:
    """Return the card of the network that a run ended with."""
    assert run.stages, "a run is evaluated"
    return Card(
        name=run.name,
        file=file,
        header=header,
        data=run.data,
        evaluation=run.stages[-1].evaluation,
        cost=run.cost_after,
        bytes=run.bytes_after,
        dense=run.stages[0].evaluation,
        dense_cost=run.cost_before,
        dense_bytes=run.bytes_before,
        paired=run.paired,
        latency=run.latency,
        exported=run.exported,
        command=run.command,
        environment=run.environment,
        hashes=run.hashes,
    )


def render(card: Card) -> str:
    """Return the card."""
    parts = [
        _front(card),
        f"# {escape(card.name)}",
        _summary(card),
        *_uses(card),
        *_making(card),
        *_evaluation(card),
        *_cost(card),
        *_reproduce(card),
    ]
    return "\n\n".join(parts).rstrip() + "\n"


def _front(card: Card) -> str:
    """Return the front matter; JSON is YAML, so every value is written as that."""
    value = card.evaluation
    result = {
        "task": {"type": "image-classification", "name": "Image classification"},
        "dataset": {"type": card.data, "name": card.data, "split": "test"},
        "metrics": [
            {"type": "accuracy", "value": round(value.top1, 6), "name": "top-1"},
            {"type": "accuracy", "value": round(value.top5, 6), "name": "top-5"},
        ],
    }
    fields: dict[str, Any] = {
        "library_name": "se-prune",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "squeeze-and-excitation", "pruning", "model-compression"],
        "datasets": [card.data],
        "metrics": ["accuracy"],
        "model-index": [{"name": card.name, "results": [result]}],
    }
    lines = [f"{key}: {json.dumps(content, ensure_ascii=False)}" for key, content in fields.items()]
    return "\n".join(["---", *lines, "---"])


def _summary(card: Card) -> str:
    plan, arch = card.header.plan, escape(card.header.arch.ref)
    classes = card.header.classes
    of = f"{text.count(len(classes))} classes" if classes else "its classes"
    what = f"An image classifier for {of}: {arch}, a Squeeze-and-Excitation network"
    if plan is None and not card.header.folded:
        return f"{what}, as it was trained."
    kept = text.share(plan.macs_after, plan.macs_before) if plan is not None else None
    cut = f", cut by se-prune to {kept} of its MACs" if kept is not None else ", changed by se-prune"
    folded = f", {len(card.header.folded)} of its gates replaced by constants" if card.header.folded else ""
    return f"{what}{cut}{folded}."


def _uses(card: Card) -> Iterator[str]:
    size = text.shape(card.header.preprocessing.input_size)
    mean, std = (
        ", ".join(f"{value:g}" for value in values)
        for values in (card.header.preprocessing.mean, card.header.preprocessing.std)
    )
    yield "## Intended use"
    yield (
        f"Classifying images that look like those of {escape(card.data)}. Input: {size} (channels, height, width), "
        f"pixels in [0, 1], minus {mean}, over {std}, per channel. Output: one logit a class."
    )
    classes = card.header.classes
    if classes:
        more = f" … ({text.count(len(classes))} in all)" if len(classes) > NAMED else ""
        yield f"Classes: {escape(', '.join(classes[:NAMED]))}{more}."
    yield "\n".join(
        [
            "```python",
            "import se_prune",
            "",
            f"network = se_prune.open_model({json.dumps(card.file)})",
            "network.module  # a torch.nn.Module; network.header has classes and preprocessing",
            "```",
        ]
    )
    yield "## Limits"
    yield (
        f"The figures below hold for the test images of {escape(card.data)} and for images drawn like them; nothing "
        "else was measured: no other data, no shifted or corrupted images, no calibration of the probabilities, no "
        "fairness between groups of people. A cut network can lose more on rare classes than its average says; the "
        "weakest classes are listed. Weights carry the licence of the network and the data that they come from."
    )


def _making(card: Card) -> Iterator[str]:
    yield "## How it was made"
    steps = [_step(entry) for entry in card.header.history]
    told = [f"{i}. {step}" for i, step in enumerate((s for s in steps if s), start=1)]
    yield "\n".join(told) if told else "Nothing is recorded."


def _step(entry: HistoryEntry) -> str | None:
    """Return one sentence on a thing that was done, or None where it changed nothing."""
    d = entry.details
    if entry.stage == "evaluate":
        return None
    if entry.stage == "opened":
        return f"Opened: {escape(_told(d))}."
    if entry.stage == "classes":
        return f"Cut down to {len(d.get('kept', ()))} of {d.get('of')} classes."
    if entry.stage == "apply":
        budget = d.get("budget") or {}
        macs = d.get("macs") or [0, 0]
        sentence = (
            f"Channels removed by the criterion {escape(str(d.get('criterion')))} for the budget "
            f"{budget.get('kind')} {budget.get('value')}: {text.scaled(macs[0])} → {text.scaled(macs[1])} MACs"
        )
        repaired = d.get("repair")
        return f"{sentence}{', then repaired without labels' if repaired else ''}."
    if "train_images" in d:
        settings = d.get("settings") or {}
        how = "with the dense network as teacher" if d.get("distilled") else "on labels"
        return (
            f"{escape(entry.stage.capitalize())}: {settings.get('epochs')} epochs {how} on "
            f"{text.count(int(d['train_images']))} training images of {escape(str(d.get('data')))}, seed "
            f"{d.get('seed')}."
        )
    return f"{escape(entry.stage)}: {escape(_told(d))}."


def _told(details: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {value}" for key, value in details.items() if isinstance(value, str | int | float)
    )


def _evaluation(card: Card) -> Iterator[str]:
    value, dense = card.evaluation, card.dense
    yield "## Evaluation"
    yield f"On {text.count(value.n)} test images of {escape(card.data)}, with 95 % Wilson intervals:"
    head = ["", "this network", *([card.other] if dense is not None else [])]
    both = [value] if dense is None else [value, dense]
    yield _table(
        head,
        [
            ["top-1", *(text.percent(e.top1, 2) for e in both)],
            ["top-1, 95 % interval", *(text.interval(e.top1_ci95) for e in both)],
            ["top-5", *(text.percent(e.top5, 2) for e in both)],
            ["cross-entropy", *(f"{e.loss:.4f}" for e in both)],
        ],
    )
    if card.paired is not None:
        yield (
            f"Against the {escape(card.other)} on the same images: {text.points(card.paired.top1_difference)}, exact "
            f"two-sided McNemar p {text.p_value(card.paired.p_value)}."
        )
    weakest = sorted(value.per_class, key=lambda name: value.per_class[name])[:WEAKEST]
    if weakest:
        yield "Its weakest classes:"
        rows = [
            [name, *(text.percent(e.per_class[name]) if name in e.per_class else "" for e in both)]
            for name in weakest
        ]
        yield _table(["class", *head[1:]], rows)


def _cost(card: Card) -> Iterator[str]:
    yield "## Cost"
    cost, dense = card.cost, card.dense_cost
    columns = [(cost, card.bytes), *([(dense, card.dense_bytes)] if dense is not None else [])]
    rows = [
        ["MACs for one image", *(text.scaled(c.macs) for c, _ in columns)],
        ["learnable parameters", *(text.scaled(c.params) for c, _ in columns)],
        ["size on disk", *(text.MISSING if size is None else text.file_size(size) for _, size in columns)],
    ]
    if card.latency is not None and dense is not None:
        first, second = card.latency
        rows.append(
            ["latency, median", text.milliseconds(second.median_ms), text.milliseconds(first.median_ms)]
        )
    yield _table(["", "this network", *(["dense network"] if dense is not None else [])], rows)
    if card.latency is not None:
        yield (
            f"Latency: {tables.latency_conditions(card.latency[1])}; {text.speed(card.latency[1].ratio)} as the dense "
            "network, median over rounds."
        )
    for item in card.exported:
        size = f"Exported for {escape(item.target)}, {text.file_size(item.bytes)}"
        if item.max_abs_diff is None or item.top1_agreement is None:
            yield f"{size}: converted, not run on this machine."
            continue
        yield (
            f"{size}: same top-1 as in torch on {text.percent(item.top1_agreement)} of "
            f"{text.count(item.images_checked)} images, logits within {text.tiny(item.max_abs_diff)}."
        )


def _reproduce(card: Card) -> Iterator[str]:
    if card.command is None and not card.environment and not card.hashes:
        return
    yield "## How to reproduce"
    if card.command is not None:
        yield f"```sh\n{card.command}\n```"
    for table in tables.environment(card.environment, card.hashes):
        yield _table(table.head, table.rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head)]
    return "\n".join(
        f"| {' | '.join(cells if i == 1 else [escape(cell) for cell in cells])} |"
        for i, cells in enumerate([*lines, *rows])
    )
