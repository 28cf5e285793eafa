"""`excitation`, the default: what a channel means to signal and answer, knowing which repair follows the cut.

Where least squares follows, the score is the geometric mean of two shares: of the network's answer, what no re-fit of
the channel's consumers brings back (`gate-obs`, each output weighted by its Fisher information instead of its part of
the signal, `answer.py`), and of the signal, the energy that leaves (`gate-energy`). A channel that others can stand in
for is cheap, but the re-fit is not perfect, and what is large is riskier to replace. Without least squares nothing
stands in, and the energy counts alone. Chosen on held-out training images of five networks (`reports/scores.md`).
"""

from __future__ import annotations

from collections.abc import Sequence

from se_prune.records import REFITTING, Coupling
from se_prune.scoring.answer import answer_scores
from se_prune.scoring.energy import energy_scores
from se_prune.scoring.registry import Evidence, criterion
from se_prune.scoring.signal import describe


@criterion(
    "excitation",
    "share of answer and signal that is lost with a channel after repair, per MAC",
    comparable=True,
    needs=("energies",),
    needs_for_refit=("batches",),
)
def excitation(evidence: Evidence, wanted: Sequence[Coupling]) -> dict[str, tuple[float, ...]]:
    """Score channels by the share of answer and signal that is lost with them after repair."""
    signal = describe(evidence)
    energy = energy_scores(signal, wanted)
    if evidence.repair not in REFITTING:
        return energy
    residual = answer_scores(evidence, signal, wanted)
    return {
        name: tuple((max(a, 0.0) * b) ** 0.5 for a, b in zip(residual[name], values, strict=True))
        for name, values in energy.items()
    }
