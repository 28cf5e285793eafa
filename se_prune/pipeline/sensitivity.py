"""How much each channel group is predicted to lose with some of its channels, from scores alone."""

from __future__ import annotations

import torch

from se_prune.artifact import Network
from se_prune.data import DataSource
from se_prune.data.source import balanced_subset
from se_prune.errors import UsageError
from se_prune.gates.statistics import Statistics
from se_prune.pipeline.measure import MEASURED_IMAGES, Reporter, Silent, evidence_for, matching, structure
from se_prune.planning import sensitivity
from se_prune.results import SENSITIVITY_SHARES, GroupSensitivity
from se_prune.scoring import score
from se_prune.scoring.registry import CRITERIA, find

#: The criterion that reads nothing but what the statistics pass has measured.
MEASURED = "gate-energy"


def require_comparable(criterion: str) -> None:
    """Check, before anything is measured, that a criterion's scores compare groups.

    Raises:
        UsageError: There is no such criterion, or its scores are in no common unit.
    """
    if not find(criterion).comparable:
        fit = ", ".join(name for name, known in CRITERIA.items() if known.comparable)
        raise UsageError(
            f"criterion '{criterion}' ranks channels within a group only, and predicts no loss; take one of {fit}."
        )


def sensitivities(
    network: Network,
    data: DataSource,
    statistics: Statistics,
    *,
    criterion: str = MEASURED,
    device: torch.device,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> tuple[GroupSensitivity, ...]:
    """Return the predicted loss of every group that can be cut, the most sensitive first.

    Hidden units of gates are left out: they follow the channels that they gate.

    Args:
        network: The network.
        data: Training images, which `criterion` may look at; `gate-energy` does not.
        statistics: What `analyze` measured.
        criterion: What predicts the loss; `gate-energy` without a repair, `excitation` with it.
        device: Where to measure.
        seed: Chooses the images.
        reporter: Shows progress.

    Raises:
        UsageError: The criterion is unknown, or its scores are in no common unit.
        SurgeryError: The groups of the network cannot be traced.
    """
    require_comparable(criterion)
    found = structure(network)
    subset = balanced_subset(matching(network, data).train, MEASURED_IMAGES, seed)
    evidence = evidence_for(
        network,
        found,
        subset,
        device=device,
        seed=seed,
        statistics=statistics,
        energies=statistics.energies,
    )
    with (reporter or Silent()).stage(f"sensitivity by {criterion}", None):
        scores = score(criterion, evidence)
    network.module.cpu()
    groups = {c.group.name: c.group for c in found.couplings if c.group.kind != "hidden"}
    rows = [
        GroupSensitivity(
            name=name,
            kind=groups[name].kind,
            channels=groups[name].channels,
            removed=tuple(count for count, _ in curve),
            predicted_loss=tuple(loss for _, loss in curve),
        )
        for name, curve in sensitivity(found.couplings, scores, SENSITIVITY_SHARES).items()
        if name in groups
    ]
    return tuple(sorted(rows, key=lambda row: (-row.predicted_loss[1], row.name)))
