"""The registry of criteria, and the evidence that they may look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from se_prune.errors import UsageError, nearest
from se_prune.gates.energies import ChannelEnergies
from se_prune.gates.statistics import Statistics
from se_prune.records import REFITTING, Coupling, GateSite, RepairMode, Scores

if TYPE_CHECKING:
    from se_prune.data.batches import Batch


@dataclass(slots=True, kw_only=True)
class Evidence:
    """What a criterion may read; `batches` yields the first so many training images, or all for None.

    It is only called by criteria that need it, and yields this process's share where there are several: sums over
    images are then to be added up.
    `repair` is what follows the cut: a criterion may count on it.
    """

    model: nn.Module
    example: torch.Tensor
    sites: tuple[GateSite, ...]
    couplings: tuple[Coupling, ...]
    seed: int
    device: torch.device
    statistics: Statistics | None = None
    energies: ChannelEnergies | None = None
    batches: Callable[[int | None], Iterator[Batch]] | None = None
    repair: RepairMode = "refit"


Rule = Callable[[Evidence, Sequence[Coupling]], dict[str, tuple[float, ...]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Criterion:
    """A rule, what it needs (more where least squares follows), whether its scores are in one unit for all groups."""

    name: str
    summary: str
    rule: Rule
    comparable: bool
    needs: frozenset[str]
    needs_for_refit: frozenset[str] = frozenset()

    def wants(self, repair: RepairMode) -> frozenset[str]:
        """Return which evidence it reads where `repair` follows the cut."""
        return self.needs | self.needs_for_refit if repair in REFITTING else self.needs


CRITERIA: dict[str, Criterion] = {}


def criterion(
    name: str,
    summary: str,
    *,
    comparable: bool = False,
    needs: Sequence[str] = (),
    needs_for_refit: Sequence[str] = (),
) -> Callable[[Rule], Rule]:
    """Register a rule under a name; a name twice is our mistake."""

    def register(rule: Rule) -> Rule:
        assert name not in CRITERIA, f"criterion {name} is registered twice"
        CRITERIA[name] = Criterion(
            name=name,
            summary=summary,
            rule=rule,
            comparable=comparable,
            needs=frozenset(needs),
            needs_for_refit=frozenset(needs_for_refit),
        )
        return rule

    return register


def find(name: str) -> Criterion:
    """Return a criterion by name.

    Raises:
        UsageError: There is none; the message lists all.
    """
    load_all()
    if name not in CRITERIA:
        raise UsageError(
            f"no criterion is called '{name}'{nearest(name, CRITERIA)}; there are: {', '.join(CRITERIA)}."
        )
    return CRITERIA[name]


def load_all() -> None:
    """Import the files that register criteria."""
    from se_prune.scoring import baselines, excitation, fisher

    assert baselines
    assert excitation
    assert fisher


def score(name: str, evidence: Evidence) -> Scores:
    """Score every group that can be cut.

    Raises:
        UsageError: No such criterion, or it needs data that was not given.
    """
    chosen = find(name)
    have = {
        "energies": evidence.energies is not None,
        "batches": evidence.batches is not None,
    }
    missing = [need for need in sorted(chosen.wants(evidence.repair)) if not have[need]]
    if missing:
        raise UsageError(
            f"--criterion {name} measures images; add --data (or --stats of `se-prune analyze`)."
        )
    wanted = [c for c in evidence.couplings if c.group.prunable]
    groups = chosen.rule(evidence, wanted)
    for coupling in wanted:
        values = groups[coupling.group.name]
        assert len(values) == coupling.group.channels, coupling.group.name
    return Scores(criterion=name, comparable=chosen.comparable, groups=groups)
