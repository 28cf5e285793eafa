"""What a report says of the gates, of a run's two networks or of one alone."""

from __future__ import annotations

from collections.abc import Sequence

from se_prune import text
from se_prune.records import Plan
from se_prune.report import gate_figures, tables
from se_prune.report.content import Figure, Section
from se_prune.report.plot import Plot
from se_prune.results import GateProfile, GateReport, Run, SiteSummary

WORDS = (
    "Class specificity is the between-class share of the gate's variance; saturated is the share of gates above 0.95 "
    "or below 0.05; fold loss is the share of recalibrated energy that the best constant gate misses"
)


def of_run(run: Run, profile_chars: float | None) -> Section | None:
    """Return the section on the gates of a run, or None where nothing is known; arguments as `sections.of_run`."""
    table = tables.sites(run.sites, run.plan)
    if table is None and not run.profiles:
        return None
    after = tables.sites(run.sites_after, None, caption="Gate sites of the pruned network")
    paragraphs = [_advice(run.sites, run.plan)] if run.sites else []
    if after is not None:
        paragraphs.append(
            f"The pruned network's gates were measured on {text.count(run.gate_images)} training images."
        )
    charts = _figures(
        run.sites,
        run.profiles,
        run.sites_after,
        run.profiles_after,
        chars=profile_chars,
        paragraphs=paragraphs,
    )
    return Section(
        key="gates",
        title="What the gates do",
        paragraphs=tuple(paragraphs),
        figures=charts,
        tables=tuple(t for t in (table, after) if t is not None),
    )


def of_gates(report: GateReport, profile_chars: float | None) -> list[Section]:
    """Return the sections of a page on one network's gates."""
    table = tables.sites(report.sites, None)
    paragraphs = [_advice(report.sites, None)]
    charts = _figures(report.sites, report.profiles, (), (), chars=profile_chars, paragraphs=paragraphs)
    environment = tables.environment(report.environment, {})
    return [
        Section(
            key="gates",
            title="What the gates do",
            paragraphs=tuple(paragraphs),
            figures=charts,
            tables=() if table is None else (table,),
        ),
        *_sensitivity(report),
        Section(
            key="reproduce",
            title="How to reproduce",
            paragraphs=(f"Data {report.data}, {text.count(report.n)} training images, seed {report.seed}.",),
            command=report.command,
            tables=environment,
        ),
    ]


def _sensitivity(report: GateReport) -> list[Section]:
    """Return the section on what channel groups are predicted to lose; none where that is not known."""
    rows = report.sensitivity
    if not rows:
        return []
    said = (
        f"What is predicted to be lost with some of a group's channels, the lowest of {report.criterion} first, "
        "as a share of the recalibrated signal of the layers that read them; the most sensitive groups stand "
        f"first. {text.PREDICTS.get(report.criterion, '')}"
    )
    return [
        Section(
            key="sensitivity",
            title="What channel groups would lose",
            paragraphs=(said.strip(),),
            tables=(tables.sensitivity(rows),),
        )
    ]


def _advice(sites: Sequence[SiteSummary], plan: Plan | None) -> str:
    fold = sum(site.advice == "fold" for site in sites)
    done = f", and {plan.sites_folded} were folded" if plan is not None and plan.sites else ""
    moved = any(site.logit_shift is not None for site in sites)
    shift = "; logit shift is the share of the logits' energy by which they then move, to first order"
    return f"The advice is to fold {fold} of {len(sites)} gate sites{done}. {WORDS}{shift if moved else ''}."


def _figures(
    sites: Sequence[SiteSummary],
    profiles: Sequence[GateProfile],
    sites_after: Sequence[SiteSummary],
    profiles_after: Sequence[GateProfile],
    *,
    chars: float | None,
    paragraphs: list[str],
) -> tuple[Figure, ...]:
    """Return the figures of gates; where the profiles are not among them, `paragraphs` says why."""
    chart = None if chars is None else _profiles(profiles, profiles_after, chars, len(sites))
    if profiles and chart is None:
        reason = "are drawn in the HTML report" if chars is None else "are too large for this page"
        paragraphs.append(
            f"The profiles of {len(profiles)} gates by channel and class {reason}; the JSON has them."
        )
    charts = [chart] if chart is not None else []
    if len(sites) > 1:
        charts += [_depth(sites, sites_after, what) for what in ("class_specificity", "saturated")]
    return tuple(charts)


def _depth(before: Sequence[SiteSummary], after: Sequence[SiteSummary], what: str) -> Figure:
    title = {
        "class_specificity": "Class specificity of each gate site, from the first to the last",
        "saturated": "Share of saturated gates of each site, from the first to the last",
    }[what]
    return Figure(
        key=what.replace("_", "-"),
        caption=title,
        description=f"{title}; the table below has the same numbers.",
        panels=((gate_figures.depth(before, after, what),),),
        keys=gate_figures.depth_keys(after),
    )


def _profiles(
    profiles: Sequence[GateProfile], after: Sequence[GateProfile], chars: float, sites: int
) -> Figure | None:
    """Return the gate profiles with as many classes as fit, or None where not even the means do."""
    channels = sum(len(profile.mean) for profile in (*profiles, *after))
    if not channels:
        return None
    spread = any(profile.per_class_std for profile in profiles)
    line = channels * (gate_figures.CHARS_PER_GATE + gate_figures.CHARS_PER_SPREAD * spread)
    room = (chars - 3 * channels * gate_figures.CHARS_PER_GATE) / line  # the mean and two edges of its band
    if room < 0:
        return None
    known = len({name for profile in profiles for name in profile.per_class})
    names = gate_figures.lively_classes(profiles, int(min(room, gate_figures.MAX_LINES)))
    which = "" if len(names) == known else f"; the {len(names)} of {known:,} classes that differ most from it"
    pruned = {profile.site: profile for profile in after}
    return Figure(
        key="gates",
        caption="Gate by channel: one line a class, bold the mean of all classes with a band of one standard "
        f"deviation over images (Figure 5 of the paper){which}"
        + (f"; {len(profiles)} of {sites} sites, spread evenly" if len(profiles) < sites else "")
        + ("; a class that is brought forward shows its spread within the class" if spread else ""),
        description="Line chart of the gate by channel index, one line a class; arrow keys move along the channels; "
        "the JSON beside this file has the numbers.",
        panels=tuple(_panel(profile, pruned.get(profile.site), names, bool(after)) for profile in profiles),
        choices=tuple(profile.site for profile in profiles),
        first=gate_figures.lively_site(profiles),
        keys=(gate_figures.mean_key(),),
        classes=gate_figures.class_keys(names),
    )


def _panel(
    profile: GateProfile, after: GateProfile | None, names: Sequence[str], both: bool
) -> tuple[Plot, ...]:
    dense = gate_figures.gate_profile(profile, names, subtitle="Dense network" if both else "")
    if after is None:
        return (dense,)
    width = len(profile.mean)
    kept = f"Pruned network, {len(after.mean)} of {width} channels"
    return dense, gate_figures.gate_profile(after, names, dense=width, subtitle=kept)


def within_class(profiles: Sequence[GateProfile], after: Sequence[GateProfile]) -> list[Figure]:
    """Return a figure a site of mean and spread within each of the liveliest classes, for files."""
    names = gate_figures.lively_classes(profiles, gate_figures.WITHIN)
    width = {profile.site: len(profile.mean) for profile in profiles}
    found = []
    for prefix, group in (("", profiles), ("pruned-", after)):
        for profile in group:
            plots = gate_figures.within(profile, names, dense=width.get(profile.site))
            if plots:
                title = f"{profile.site}: gate within classes, mean and one standard deviation over images"
                found.append(
                    Figure(
                        key=f"{prefix}within-{profile.site}",
                        caption=title,
                        description=title,
                        panels=(plots,),
                    )
                )
    return found
