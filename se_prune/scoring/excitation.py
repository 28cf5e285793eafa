"""`excitation`, the default: the gate-weighted loss of a channel, knowing which repair follows the cut.

Where least squares follows, the score is the geometric mean of what no re-fit brings back (`gate-obs`) and of the
energy that leaves (`gate-energy`): a channel that others can stand in for is cheap, but the re-fit is not perfect, and
what is large is riskier to replace. Without it nothing stands in, and the energy counts alone. On held-out training
images of the bundled networks it does as well as the better of the two within half a point (`reports/scores.md`).
"""

from __future__ import annotations

from collections.abc import Sequence

from se_prune.records import REFITTING, Coupling
from se_prune.scoring.energy import energy_scores
from se_prune.scoring.obs import obs_scores
from se_prune.scoring.registry import Evidence, criterion
from se_prune.scoring.signal import describe


@criterion(
    "excitation",
    "share of the recalibrated signal that is lost with a channel after repair, per MAC",
    comparable=True,
    needs=("energies",),
    needs_for_refit=("batches",),
)
def excitation(evidence: Evidence, wanted: Sequence[Coupling]) -> dict[str, tuple[float, ...]]:
    """Score channels by the share of the recalibrated signal that is lost with them after repair."""
    signal = describe(evidence)
    energy = energy_scores(signal, wanted)
    if evidence.repair not in REFITTING:
        return energy
    residual = obs_scores(evidence, signal, wanted)
    return {
        name: tuple((max(a, 0.0) * b) ** 0.5 for a, b in zip(residual[name], values, strict=True))
        for name, values in energy.items()
    }
