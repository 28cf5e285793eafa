"""Gradual sparsity: a group lasso on the channels that can leave, so that those which do carry little by then.

The group of a channel is everything that scales it: its factor in every BN behind the layers that make it, and the
rows of the gates' `expand` layers that set its gate. A lasso over such groups (Yuan and Lin 2006) shrinks the weak ones
most, and all numbers of a group alike. Shapes: C channels of a channel group, k of them in a parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from se_prune.settings import TrainSettings

#: Below this norm a group is as good as zero, and is not pushed any more.
TINY = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelScale:
    """A parameter that scales channels: its entry or row `index[i]` belongs to channel `root[i]`, both (k,)."""

    parameter: str
    index: torch.Tensor
    root: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledGroup:
    """The channels of one group, and every parameter that scales them."""

    name: str
    channels: int
    scales: tuple[ChannelScale, ...]


class GroupLasso:
    """The penalty: the sum over channels of the norm of all that scales them; zero at first, then ramped up."""

    def __init__(self, model: nn.Module, groups: Sequence[ScaledGroup], settings: TrainSettings) -> None:
        self.parameters = dict(model.named_parameters())
        self.strength, self.ramp = settings.group_lasso, settings.group_lasso_ramp
        device = next(model.parameters()).device
        self.groups = [
            (group.channels, [(s.parameter, s.index.to(device), s.root.to(device)) for s in group.scales])
            for group in groups
        ]

    def at(self, step: int, total: int) -> float:
        """Return the strength in step `step` (from 0) of `total`."""
        rising = self.ramp * total
        return self.strength * (min(1.0, (step + 1) / rising) if rising > 0 else 1.0)

    def norms(self) -> list[torch.Tensor]:
        """Return the norm (C,) of what scales each channel, per group."""
        found = []
        for channels, scales in self.groups:
            squares = torch.full((channels,), TINY**2, device=scales[0][1].device)
            for name, index, root in scales:
                values = self.parameters[name].float()
                rows = values.reshape(len(values), -1).square().sum(1)
                squares = squares.index_add(0, root, rows[index])
            found.append(squares.sqrt())
        return found

    def __call__(self, step: int, total: int) -> torch.Tensor:
        """Return the penalty of a step."""
        return self.at(step, total) * torch.cat(self.norms()).sum()
