"""Latency as a budget: a plan from the measured table of layers, timed, corrected by what was measured.

The dense network and each cut one run in turn, so that their ratio holds on a busy machine; a time in milliseconds is
that ratio times the lowest median of the dense network.
"""

from __future__ import annotations

import logging
import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from se_prune import distributed
from se_prune.artifact import Network
from se_prune.errors import BudgetError, UsageError
from se_prune.latency import interleaved
from se_prune.pipeline.measure import Reporter, Silent, Structure
from se_prune.planning import fastest, predicted
from se_prune.preprocessing import example_input
from se_prune.records import Budget, Coupling, LayerCost, Plan, PlannedLatency
from se_prune.runtimes import Runtime, latency_model, require_runtime, shapes_of
from se_prune.runtimes.base import Runner
from se_prune.runtimes.bench import WARMUP, ratio_of_medians
from se_prune.runtimes.ort import lower_quartile
from se_prune.runtimes.table import measure_grids, odd_multiple
from se_prune.timing import LatencyModel, LayerShape

LOG = logging.getLogger("se_prune")
CPU = torch.device("cpu")
PROFILE_RUNS = 20
#: One comparison of two networks takes about so long, within these numbers of rounds.
SECONDS, ROUNDS = 4.0, (25, 2000)
#: So many neighbouring limits are tried until one gives a plan that was not timed yet.
NUDGES = 12
#: A budget is refused before anything is scored where the table says that the fastest network takes so many times more;
#: for tiny networks, most of whose time is no layer's, the table has been 1.45 times too high.
TRUST = 2.0
#: Widths that `--round-to auto` tries; the smallest is taken that costs at most `SLACK` more per MAC than the best.
CANDIDATES, SLACK = (1, 4, 8, 16), 0.05
#: Groups must have at least so many widths to choose from, in the median.
CHOICES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Where a latency budget is measured, and how closely and in how many attempts it is to be met."""

    runtime: str = "onnxruntime"
    threads: int = 1
    batch: int = 1
    tolerance: float = 0.05
    attempts: int = 6

    def __post_init__(self) -> None:
        """Refuse a runtime that there is not, and numbers below 1."""
        require_runtime(self.runtime)
        if min(self.threads, self.batch, self.attempts) < 1:
            raise UsageError(
                f"threads, batch and attempts must be at least 1, got {self.threads}, {self.batch} and {self.attempts}."
            )


@dataclass(slots=True, kw_only=True)
class Comparison:
    """A network beside the dense one: the ratio of medians, its interval, and the rounds."""

    share: float
    ci95: tuple[float, float]
    rounds: int


@dataclass(slots=True, kw_only=True)
class Stopwatch:
    """The dense network in a runtime, with its latency model; `dense_ms` is the lowest median so far."""

    timing: Timing
    runtime: Runtime
    images: torch.Tensor
    run: Runner
    model: LatencyModel
    dense_ms: float

    def compare(self, network: Network, *, effort: float = 1.0) -> Comparison:
        """Time a network and the dense one in turn."""
        with tempfile.TemporaryDirectory() as folder:
            source = self.runtime.source(network, Path(folder), "cut", self.images)
            run = self.runtime.open(source, self.images, self.timing.threads)
        (first,) = interleaved([run], 3, 1, device=CPU)
        least, most = ROUNDS
        rounds = round(effort * 1e3 * SECONDS / (self.dense_ms + min(first)))
        rounds = min(max(rounds, least), most)
        dense, cut = interleaved([self.run, run], rounds, WARMUP, device=CPU)
        self.dense_ms = min(self.dense_ms, statistics.median(dense))
        ratio, interval = ratio_of_medians(cut, dense)
        return Comparison(share=ratio, ci95=interval, rounds=rounds)


def stopwatch(
    network: Network, found: Structure, timing: Timing, round_to: int, reporter: Reporter | None = None
) -> Stopwatch:
    """Open the dense network in the runtime, profile it, and measure its layers at the widths that a plan may give.

    Raises:
        UsageError: The runtime is unknown.
        SePruneError: The network cannot be exported for it.
    """
    runtime, show = require_runtime(timing.runtime), reporter or Silent()
    images = example_input(network.header.preprocessing, timing.batch)
    with (
        show.stage(f"dense network in {runtime.name}", None),
        tempfile.TemporaryDirectory() as folder,
    ):
        source = runtime.source(network, Path(folder), "dense", images)
        run = runtime.open(source, images, timing.threads)
        operations = (
            () if runtime.profile is None else runtime.profile(source, images, timing.threads, PROFILE_RUNS)
        )
    (times,) = interleaved([run], PROFILE_RUNS, WARMUP, device=CPU)
    shapes = shapes_of(network.module, found.example)
    with show.stage(f"layer times in {runtime.name}", len({s.key() for s in shapes.values()})) as update:
        grids = measure_grids(
            runtime,
            shapes.values(),
            round_to=round_to,
            batch=timing.batch,
            threads=timing.threads,
            on_shape=update,
        )
    model = latency_model(shapes, grids, operations, lower_quartile(times))
    return Stopwatch(
        timing=timing,
        runtime=runtime,
        images=images,
        run=run,
        model=model,
        dense_ms=statistics.median(times),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """What a plan may range over: groups and layers that folding leaves, options on widths, and those of the dense."""

    groups: Sequence[Coupling]
    left: Mapping[str, LayerCost]
    dense: tuple[Sequence[Coupling], Mapping[str, LayerCost]]
    widths: Mapping[str, Any]

    def whole(self, model: LatencyModel) -> float:
        """Return the dense network's milliseconds, as the model says."""
        return predicted(*self.dense, model)

    def least(self, model: LatencyModel) -> float:
        """Return those of the network with every group at its floor."""
        return fastest(self.groups, self.left, model, **self.widths)

    def share(self, model: LatencyModel, plan: Plan) -> float:
        """Return what fraction of the dense latency a plan is predicted to take."""
        return predicted(self.groups, self.left, model, plan) / self.whole(model)


@dataclass(slots=True, kw_only=True)
class _Try:
    limit: float
    plan: Plan
    seen: Comparison
    verified: bool = False

    def off(self, goal: float) -> float:
        """Return how far the measurement is from the target, as a fraction of it."""
        return abs(self.seen.share / goal - 1)


def target_share(budget: Budget, dense_ms: float) -> float:
    """Return what fraction of the dense latency a budget allows."""
    return budget.value if budget.kind == "latency" else budget.value / dense_ms


def check_fastest(watch: Stopwatch, budget: Budget, span: Span) -> None:
    """Refuse a budget that is far below the fastest network that the floors allow, as the table predicts it.

    Raises:
        BudgetError: It is; the message says what is reachable.
    """
    least = span.least(watch.model) / span.whole(watch.model)
    if least > TRUST * target_share(budget, watch.dense_ms):
        raise BudgetError(_unreachable(watch, budget, span, least, takes="is predicted to take"))


def _unreachable(watch: Stopwatch, budget: Budget, span: Span, share: float, *, takes: str) -> str:
    floors = " ".join(f"--{key.replace('_', '-')} {span.widths[key]}" for key in ("round_to", "min_channels"))
    return (
        f"{budget.option} cannot be met: with {floors} the fastest network {takes} {share * watch.dense_ms:.3g} ms, "
        f"{share:.3g} of the dense one's {watch.dense_ms:.3g} ms in {watch.runtime.name}; ask for more than that."
    )


def meet(
    watch: Stopwatch,
    budget: Budget,
    span: Span,
    choose: Callable[[Budget, LatencyModel], Plan],
    build: Callable[[Plan], Network],
    *,
    reporter: Reporter | None = None,
) -> Plan:
    """Return the plan whose measured latency is nearest to the budget, with what was predicted and measured.

    Each attempt is planned for what the table must say so that the measurement comes out right, judging by the attempts
    before it; it ends when a measurement of twice the length confirms that the result is within the tolerance.

    Args:
        watch: The dense network in the runtime.
        budget: What is asked for.
        span: What a plan may range over.
        choose: Returns the plan of a budget in milliseconds of the model.
        build: Cuts and folds by a plan.
        reporter: Shows progress.

    Raises:
        BudgetError: Even the narrowest network is slower; the message says what it takes.
    """
    whole, least = span.whole(watch.model), span.least(watch.model) * (1 + 1e-9)
    tolerance, attempts = watch.timing.tolerance, watch.timing.attempts
    limit, tries = target_share(budget, watch.dense_ms) * whole, list[_Try]()
    with (reporter or Silent()).stage(f"plan and time in {watch.runtime.name}", attempts) as update:
        for _ in range(attempts):
            goal = target_share(budget, watch.dense_ms)
            fresh = _fresh(
                lambda ms: choose(Budget(kind="latency_ms", value=ms), watch.model),
                tries,
                limit,
                goal,
                (least, whole),
            )
            if fresh is None:
                break
            network = build(fresh[1])
            tries.append(_Try(limit=fresh[0], plan=fresh[1], seen=watch.compare(network)))
            if tries[-1].off(goal) <= tolerance:
                tries[-1].seen, tries[-1].verified = watch.compare(network, effort=2.0), True
            share, goal = tries[-1].seen.share, target_share(budget, watch.dense_ms)
            update(note=f"{share * watch.dense_ms:.3g} of {watch.dense_ms:.3g} ms")
            if tries[-1].verified and tries[-1].off(goal) <= tolerance:
                break
            limit = _next_limit(tries, goal)
    best = min(tries, key=lambda t: t.off(target_share(budget, watch.dense_ms)))
    if not best.verified:
        best.seen = watch.compare(build(best.plan), effort=2.0)
    goal = target_share(budget, watch.dense_ms)
    if best.limit <= least * (1 + 1e-6) and best.seen.share > goal * (1 + tolerance):
        raise BudgetError(_unreachable(watch, budget, span, best.seen.share, takes="takes"))
    told = span.share(watch.model, best.plan)
    return replace(best.plan, latency=_record(watch, best, goal, told, len(tries)))


def _fresh(
    choose: Callable[[float], Plan],
    tries: Sequence[_Try],
    limit: float,
    goal: float,
    bounds: tuple[float, float],
) -> tuple[float, Plan] | None:
    """Return a limit near the wanted one, and its plan, that was not timed yet; None where there is no other plan.

    Several limits give the same plan; the next one is sought on the side where the target is.
    """
    for _ in range(NUDGES):
        limit = min(max(limit, bounds[0]), bounds[1])
        plan = choose(limit)
        same = next((t for t in tries if t.plan.groups == plan.groups), None)
        if same is None:
            return limit, plan
        step = 0.98 if same.seen.share > goal else 1.02
        if not bounds[0] <= limit * step <= bounds[1]:
            return None
        limit *= step
    return None


def _record(watch: Stopwatch, best: _Try, goal: float, told: float, attempts: int) -> PlannedLatency:
    return PlannedLatency(
        runtime=watch.runtime.name,
        batch_size=watch.timing.batch,
        threads=watch.timing.threads,
        dense_ms=watch.dense_ms,
        target_ms=goal * watch.dense_ms,
        predicted_ms=told * watch.dense_ms,
        measured_ms=best.seen.share * watch.dense_ms,
        share=best.seen.share,
        share_ci95=best.seen.ci95,
        rounds=best.seen.rounds,
        attempts=attempts,
        tolerance=watch.timing.tolerance,
    )


def _next_limit(tries: Sequence[_Try], goal: float) -> float:
    """Return what to plan for next: between the nearest attempts above and below, else on from the nearest."""
    above = [t for t in tries if t.seen.share > goal]
    below = [t for t in tries if t.seen.share <= goal]
    if above and below:
        high, low = min(above, key=lambda t: t.seen.share), max(below, key=lambda t: t.seen.share)
        part = (goal - low.seen.share) / (high.seen.share - low.seen.share)
        return low.limit + min(max(part, 0.1), 0.9) * (high.limit - low.limit)
    nearest, *rest = sorted(tries, key=lambda t: abs(t.seen.share - goal))
    if rest and (slope := (nearest.seen.share - rest[0].seen.share) / (nearest.limit - rest[0].limit)) > 0:
        return nearest.limit + (goal - nearest.seen.share) / slope
    return nearest.limit * goal / nearest.seen.share


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """What `--round-to auto` took: `ms_per_gmac` of each candidate at about half of the dense widths, and why."""

    round_to: int
    ms_per_gmac: dict[int, float]
    reason: str


def choose_rounding(
    network: Network, found: Structure, timing: Timing, reporter: Reporter | None = None
) -> Rounding:
    """Pick the multiple of channels that the runtime likes, by timing the network's own layers at half width.

    Every layer is timed with its cuttable widths at the odd multiple of each candidate that is nearest to half. Of the
    candidates that leave the median group at least `CHOICES` widths, the smallest within `SLACK` of the least time per
    MAC is taken: finer widths follow the scores more closely.
    """
    runtime = require_runtime(timing.runtime)
    sizes = [c.group.channels for c in found.couplings if c.group.prunable and c.group.kind != "hidden"]
    usual = statistics.median(sizes) if sizes else 1
    allowed = [r for r in CANDIDATES if r == 1 or CHOICES * r <= usual]
    shapes = list(shapes_of(network.module, found.example).values())
    wanted = [_halved(shape, r) for shape in shapes for r in allowed]
    with (reporter or Silent()).stage(f"widths in {runtime.name}", None):
        times = runtime.layers(wanted, timing.batch, timing.threads)
    count = len(allowed)
    cost = {
        r: sum(times[i::count]) / (1e-9 * timing.batch * sum(s.macs for s in wanted[i::count]))
        for i, r in enumerate(allowed)
    }
    least = min(cost.values())
    chosen = next(r for r in allowed if cost[r] <= (1 + SLACK) * least)
    listed = ", ".join(f"{r}: {ms:.3g}" for r, ms in cost.items())
    left_out = [str(r) for r in CANDIDATES if r not in allowed]
    reason = (
        f"--round-to auto took {chosen}: milliseconds per GMAC of this network's layers at half width in "
        f"{runtime.name}, threads {timing.threads}: {listed}; the smallest within {SLACK:.0%} of the least"
    )
    if left_out:
        reason += (
            f"; {', '.join(left_out)} would leave the usual group of {usual:.0f} channels too few widths"
        )
    return Rounding(round_to=chosen, ms_per_gmac=cost, reason=reason)


def _halved(shape: LayerShape, round_to: int) -> LayerShape:
    step = math.lcm(round_to, 1 if shape.depthwise else shape.groups)

    into, out = (odd_multiple(width, 1 / 2, step) for width in (shape.into, shape.out))
    if shape.depthwise:
        return shape.at(into, into)
    return shape.at(into, out if shape.kind == "conv" else shape.out)


def first_rounding(round_to: int | Literal["auto"]) -> int:
    """Return a number to check before the network is opened, for one that is measured on it."""
    return 1 if round_to == "auto" else round_to


def resolve_rounding(
    round_to: int | Literal["auto"],
    network: Network,
    found: Structure,
    timing: Timing,
    reporter: Reporter | None = None,
) -> int:
    """Return a number of channels as it is, and `auto` as what `choose_rounding` takes, which is logged."""
    if round_to != "auto":
        return round_to

    def measured() -> int:
        chosen = choose_rounding(network, found, timing, reporter)
        LOG.warning("%s", chosen.reason)
        return chosen.round_to

    return int(distributed.from_main(measured))
