"""What a report and the command line say of a search for the smallest network within a drop."""

from __future__ import annotations

from se_prune import text
from se_prune.report.tables import Table
from se_prune.results import Drop, MaxDrop


def sentence(found: MaxDrop) -> str:
    """Say what the final network loses, and whether that is kept, without a full stop."""
    proof = found.proof
    kept = "is kept" if found.kept else "is NOT kept"
    low, high = proof.ci95
    upper = (
        ""
        if found.confidence == 0.5
        else (f", at most {100 * proof.upper:.2f} at a confidence of {found.confidence:g}")
    )
    return (
        f"a drop of at most {100 * found.max_drop:g} points {kept}: top-1 falls by {100 * proof.drop:.2f} points "
        f"(95 % interval {100 * low:.2f} to {100 * high:.2f}{upper}) on {text.count(proof.n)} test images"
    )


def tries(found: MaxDrop) -> Table:
    """Return the networks of a search, in the order in which they were tried."""
    split = "training" if found.images == "train" else "test"
    return Table(
        caption=f"Networks of the search, decided on held-out {split} images",
        head=("budget", "MACs kept", "images", "drop", "95 % interval", "counts as", "kept"),
        align="rrrrrrl",
        rows=tuple(
            (
                text.percent(t.budget),
                text.MISSING if t.macs is None else text.percent(t.macs),
                *_drop(t.drop),
                "yes" if t.keeps else "no" if t.refused is None else t.refused,
            )
            for t in found.tries
        ),
    )


def _drop(drop: Drop | None) -> tuple[str, ...]:
    if drop is None:
        return (text.MISSING,) * 4
    low, high = (f"{100 * value:.2f}" for value in drop.ci95)
    return text.count(drop.n), f"{100 * drop.drop:.2f}", f"{low} to {high}", f"{100 * drop.upper:.2f}"
