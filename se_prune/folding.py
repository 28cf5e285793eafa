"""Which gates are folded: a request and the predicted losses to a plan of the sites. Pure and deterministic."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from se_prune import text
from se_prune.errors import SurgeryError, UsageError, nearest
from se_prune.gates.summary import FOLD_TOLERANCE, cheapest_within
from se_prune.records import SitePlan
from se_prune.results import SiteSummary
from se_prune.schema import FORBID_EXTRA, record


@record
class FoldRequest:
    """What `--fold-gates` asks for: the sites within a tolerance, the `count` cheapest, all, or those named."""

    mode: Literal["auto", "count", "all", "named"]
    count: int = 0
    names: tuple[str, ...] = ()
    tolerance: float = FOLD_TOLERANCE


@record
class Saving:
    """What goes away with SE blocks: learnable parameters, MACs of one image, operations of one forward pass."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    sites: tuple[str, ...]
    params: int
    macs: int
    operations: int
    predicted_loss: float


@record
class Outlook:
    """What folding would win and cost: of all sites that can be folded, and of those that are advised.

    `state`: every site that can be folded is advised to be (`dead`), some are (`mixed`), none is (`alive`), or there is
    nothing to fold (`none`). `median_std_images` is the sites' median of the gate's deviation over images.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    state: Literal["alive", "mixed", "dead", "none"]
    sites: int
    median_std_images: float
    median_specificity: float
    everything: Saving
    advised: Saving
    refused: dict[str, str]


def parse_request(given: str | int, tolerance: float | None = None) -> FoldRequest | None:
    """Read `--fold-gates`: `none`, `auto`, `all`, a number of sites, or their names with commas between.

    Returns:
        None where nothing is to be folded.

    Raises:
        UsageError: It is none of these, or the tolerance does not go with it.
    """
    words = str(given).strip()
    if tolerance is not None and words != "auto":
        raise UsageError(f"--fold-tolerance goes with --fold-gates auto, got --fold-gates {words}.")
    if words in {"none", "0"}:
        return None
    if words == "auto":
        limit = FOLD_TOLERANCE if tolerance is None else tolerance
        if not (math.isfinite(limit) and limit > 0):
            raise UsageError(f"--fold-tolerance must be above 0, got {limit:g}; {FOLD_TOLERANCE:g} is usual.")
        return FoldRequest(mode="auto", tolerance=limit)
    if words == "all":
        return FoldRequest(mode="all")
    if words.lstrip("+-").isdigit():
        if int(words) < 0:
            raise UsageError(f"--fold-gates takes a number of sites of at least 0, got {words}.")
        return FoldRequest(mode="count", count=int(words))
    names = tuple(dict.fromkeys(name.strip() for name in words.split(",") if name.strip()))
    if not names:
        raise UsageError(
            "--fold-gates takes none, auto, all, a number of sites, or their names, got nothing."
        )
    return FoldRequest(mode="named", names=names)


def plan_sites(
    request: FoldRequest,
    summaries: Sequence[SiteSummary],
    constants: Mapping[str, tuple[float, ...]],
    notes: Mapping[str, str],
    refused: Mapping[str, str],
) -> tuple[SitePlan, ...]:
    """Choose the sites that are folded, cheapest first.

    Args:
        request: What was asked for.
        summaries: The site table, with the predicted losses.
        constants: Per site the best constants (C,).
        notes: Per site that can be folded, where its constants go.
        refused: Per site that cannot, the reason.

    Raises:
        UsageError: A name is unknown, or more sites are asked for than there are.
        SurgeryError: A site that is named cannot be folded.
    """
    losses = {s.name: s.predicted_loss for s in summaries}
    able = {name: loss for name, loss in losses.items() if name in notes}
    folded = set(_chosen(request, losses, able, refused))
    return tuple(
        SitePlan(
            name=name,
            action="fold" if name in folded else "keep",
            loss=loss,
            constants=constants[name] if name in folded else (),
            note=notes[name] if name in folded else _kept_note(refused.get(name)),
        )
        for name, loss in losses.items()
    )


def _kept_note(reason: str | None) -> str | None:
    return None if reason is None else f"cannot be folded: {reason}"


def _chosen(
    request: FoldRequest, losses: Mapping[str, float], able: Mapping[str, float], refused: Mapping[str, str]
) -> Sequence[str]:
    if request.mode == "auto":
        return cheapest_within(able, request.tolerance)
    if request.mode == "all":
        return tuple(able)
    if request.mode == "count":
        if request.count > len(able):
            cannot = f", {len(refused)} cannot be folded" if refused else ""
            raise UsageError(
                f"--fold-gates {request.count} asks for more sites than the {len(able)} that can be folded "
                f"(of {len(losses)} gate sites{cannot}); --fold-gates all takes these."
            )
        return sorted(able, key=lambda name: able[name])[: request.count]
    for name in request.names:
        if name not in losses:
            raise UsageError(
                f"the network has no gate site '{name}'{nearest(name, losses)}; `se-prune inspect` lists them."
            )
        if name in refused:
            raise SurgeryError(f"the gate of '{name}' cannot be folded: {refused[name]}.")
    return request.names


def look_ahead(
    summaries: Sequence[SiteSummary], savings: Mapping[str, Saving], refused: Mapping[str, str]
) -> Outlook:
    """Say what folding would win and cost.

    Args:
        summaries: The site table.
        savings: Per site that can be folded, what goes away with it.
        refused: Per site that cannot, the reason.
    """
    advised = [s.name for s in summaries if s.advice == "fold" and s.name in savings]
    state: Literal["alive", "mixed", "dead", "none"] = "none"
    if savings:
        state = "dead" if len(advised) == len(savings) else "mixed" if advised else "alive"
    return Outlook(
        state=state,
        sites=len(summaries),
        median_std_images=statistics.median([s.std_images for s in summaries] or [0.0]),
        median_specificity=statistics.median([s.class_specificity for s in summaries] or [0.0]),
        everything=_total([savings[s.name] for s in summaries if s.name in savings]),
        advised=_total([savings[name] for name in advised]),
        refused=dict(refused),
    )


def _total(savings: Sequence[Saving]) -> Saving:
    return Saving(
        sites=tuple(name for s in savings for name in s.sites),
        params=sum(s.params for s in savings),
        macs=sum(s.macs for s in savings),
        operations=sum(s.operations for s in savings),
        predicted_loss=sum(s.predicted_loss for s in savings),
    )


def liveness(outlook: Outlook) -> str:
    """Return one sentence or two on how alive the gates are, and what folding them would win and cost."""
    if outlook.sites == 0:
        return "This network has no gate sites."
    head = (
        f"{outlook.sites} gate sites, {{}}: median standard deviation over images {outlook.median_std_images:.3f}, "
        f"class specificity {outlook.median_specificity:.2f}"
    )
    every, advised = outlook.everything, outlook.advised
    if outlook.state == "none":
        return f"{head.format('none of which can be folded')}."
    if outlook.state == "dead":
        return f"{head.format('dead')}. Fold them all (--fold-gates all): {_worth(every)}."
    if outlook.state == "alive":
        return f"{head.format('alive')}. Folding none is free; folding {_all_of(outlook)} {_worth(every)}."
    alive = f"{outlook.sites - len(advised.sites)} of them alive"
    return (
        f"{head.format(alive)}. Folding {len(advised.sites)} (--fold-gates auto) {_worth(advised)}; "
        f"folding {_all_of(outlook)} {_worth(every)}."
    )


def _all_of(outlook: Outlook) -> str:
    return (
        f"all {outlook.sites}" if not outlook.refused else f"the {len(outlook.everything.sites)} that can be"
    )


def _worth(saving: Saving) -> str:
    return (
        f"saves {text.scaled(saving.params)} parameters, {text.scaled(saving.macs)} MACs and {saving.operations} "
        f"operations, and is predicted to move the logits by {text.percent(saving.predicted_loss, 2)} of their energy"
    )
