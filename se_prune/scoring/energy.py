"""`gate-energy`: the share of a layer's recalibrated output energy that is lost with a channel.

A channel with energy E[a²] at the input of a consumer W moves the consumer's output channel c by
E[a²]·‖W[c,k]‖²; BN multiplies that by γ²/σ², the gate by E[s_c²]. Summed over c and divided by the energy of what
the consumer's output is added to (its residual stream, else its own), it is the share of the signal that leaves with
the channel. A channel's score is the sum of these shares over all consumers, so that scores of different groups are
in one unit and one threshold, per MAC saved, sets every layer's width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from se_prune.artifact import CONV_TYPES
from se_prune.records import Coupling, LayerSlice
from se_prune.scoring.registry import Evidence, criterion
from se_prune.scoring.signal import Signal, describe


@criterion(
    "gate-energy",
    "share of the recalibrated energy that leaves with a channel, per MAC",
    comparable=True,
    needs=("energies",),
)
def gate_energy(evidence: Evidence, wanted: Sequence[Coupling]) -> dict[str, tuple[float, ...]]:
    """Score channels by the recalibrated energy that their consumers lose."""
    return energy_scores(describe(evidence), wanted)


def energy_scores(signal: Signal, wanted: Sequence[Coupling]) -> dict[str, tuple[float, ...]]:
    """Return the scores of `gate-energy`."""
    scores = {}
    for coupling in wanted:
        total = torch.zeros(coupling.group.channels, dtype=torch.float64)
        for piece in signal.consumers(coupling):
            add_energy(total, piece, signal)
        scores[coupling.group.name] = tuple(total.tolist())
    return scores


def add_energy(total: torch.Tensor, piece: LayerSlice, signal: Signal) -> None:
    """Add to a group's scores (C,) the energy that one consumer loses with each channel."""
    total.index_add_(0, torch.tensor(piece.root), _share(piece.layer, signal)[list(piece.index)])


def _share(layer: str, signal: Signal) -> torch.Tensor:
    """Return per input channel (C_in,) the share of the layer's recalibrated output that it makes."""
    module = signal.modules[layer]
    assert isinstance(module, (*CONV_TYPES, nn.Linear))
    weight = module.weight.detach().double().cpu()
    energy = signal.energies.mean(layer)
    norms = weight.square().reshape(weight.shape[0], weight.shape[1], -1).sum(2)
    if norms.shape[1] != len(energy):  # grouped: each input channel meets only its own group's outputs
        groups = len(energy) // norms.shape[1]
        norms = torch.block_diag(*norms.chunk(groups))  # type: ignore[no-untyped-call]
    gain = signal.gain(layer)
    whole = signal.whole(layer)
    if whole is None:  # no BN after it: its own output energy, cross terms left out
        whole = float((gain[:, None] * norms * energy).sum())
    return (gain[:, None] * norms).sum(0) * energy / max(whole, 1e-30)
