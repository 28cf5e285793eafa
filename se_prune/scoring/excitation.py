"""`excitation`: the share of a layer's recalibrated output energy that is lost with a channel.

A channel with energy E[a²] at the input of a consumer W moves the consumer's output channel c by
E[a²]·‖W[c,k]‖²; BN multiplies that by γ²/σ², the gate by E[s_c²]. Summed over c and divided by the energy of what
the consumer's output is added to (its residual stream, else its own), it is the share of the signal that leaves with
the channel. A channel's score is the sum of these shares over all consumers, so that scores of different groups are
in one unit and one threshold, per MAC saved, sets every layer's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from se_prune.artifact import CONV_TYPES, NORM_TYPES
from se_prune.gates.energies import ChannelEnergies
from se_prune.gates.statistics import Statistics
from se_prune.gates.trace import norms_after, trace
from se_prune.records import Coupling, GateSite
from se_prune.scoring.registry import Evidence, criterion


@dataclass(slots=True, kw_only=True)
class _Network:
    modules: dict[str, nn.Module]
    norm_after: dict[str, str]
    site_of: dict[str, GateSite]
    reader_of: dict[str, str]  # layer -> a layer that reads the group it writes
    statistics: Statistics | None
    energies: ChannelEnergies


@criterion(
    "excitation",
    "share of the recalibrated energy that leaves with a channel, per MAC",
    comparable=True,
    needs=("energies",),
)
def excitation(evidence: Evidence, wanted: Sequence[Coupling]) -> dict[str, tuple[float, ...]]:
    """Score channels by the recalibrated energy that their consumers lose."""
    assert evidence.energies is not None
    network = _describe(evidence, evidence.statistics, evidence.energies)
    gate_layers = {name for s in evidence.sites for name in (s.reduce, s.expand)}
    return {c.group.name: _scores(c, network, gate_layers) for c in wanted}


def _describe(evidence: Evidence, statistics: Statistics | None, energies: ChannelEnergies) -> _Network:
    gates = {name for s in evidence.sites for name in (s.reduce, s.expand)}
    modules = dict(evidence.model.named_modules())
    reader_of: dict[str, str] = {}
    for coupling in evidence.couplings:
        # a layer behind the global pool reads means, whose energy is not that of the stream
        readers = [n for n in coupling.layers("in") if n not in gates and isinstance(modules[n], CONV_TYPES)]
        if coupling.group.kind == "stream" and readers:
            reader_of |= dict.fromkeys(coupling.layers("out"), readers[-1])
    return _Network(
        modules=modules,
        norm_after=norms_after(trace(evidence.model, evidence.example)),
        site_of={s.features: s for s in evidence.sites if s.features is not None},
        reader_of=reader_of,
        statistics=statistics,
        energies=energies,
    )


def _scores(coupling: Coupling, network: _Network, gate_layers: set[str | None]) -> tuple[float, ...]:
    total = torch.zeros(coupling.group.channels, dtype=torch.float64)
    for piece in coupling.slices:
        if piece.role != "in" or (piece.layer in gate_layers and coupling.group.kind != "hidden"):
            continue
        lost = _share(piece.layer, network)
        total.index_add_(0, torch.tensor(piece.root), lost[list(piece.index)])
    return tuple(total.tolist())


def _share(layer: str, network: _Network) -> torch.Tensor:
    """Return per input channel (C_in,) the share of the layer's recalibrated output that it makes."""
    module = network.modules[layer]
    assert isinstance(module, (*CONV_TYPES, nn.Linear))
    weight = module.weight.detach().double().cpu()
    energy = network.energies.mean(layer)
    norms = weight.square().reshape(weight.shape[0], weight.shape[1], -1).sum(2)
    if norms.shape[1] != len(energy):  # grouped: each input channel meets only its own group's outputs
        groups = len(energy) // norms.shape[1]
        full = torch.zeros(weight.shape[0], len(energy), dtype=torch.float64)
        rows, columns = weight.shape[0] // groups, norms.shape[1]
        for g in range(groups):
            full[g * rows : (g + 1) * rows, g * columns : (g + 1) * columns] = norms[
                g * rows : (g + 1) * rows
            ]
        norms = full
    gain, own = _output_gain(layer, network)
    if own is None:  # no BN after it: its own output energy, cross terms left out
        own = float((gain[:, None] * norms * energy).sum())
    reader = network.reader_of.get(layer)
    whole = float(network.energies.mean(reader).sum()) if reader is not None else own
    return (gain[:, None] * norms).sum(0) * energy / max(whole, 1e-30)


def _output_gain(layer: str, network: _Network) -> tuple[torch.Tensor, float | None]:
    """Return γ²/σ²·E[s²] per output channel (C_out,), and the recalibrated output's energy where BN tells it."""
    module = network.modules[layer]
    assert isinstance(module.weight, torch.Tensor)
    outputs = module.weight.shape[0]
    gate2 = torch.ones(outputs, dtype=torch.float64)
    site = network.site_of.get(layer)
    if site is not None and network.statistics is not None:
        gate2 = network.statistics.sums[site.name].s2.sum(0) / network.statistics.n
    name = network.norm_after.get(layer)
    norm = network.modules[name] if name is not None else None
    if not isinstance(norm, NORM_TYPES) or norm.running_var is None:
        return gate2, None
    gamma2 = torch.ones(outputs, dtype=torch.float64)
    shift2 = torch.zeros(outputs, dtype=torch.float64)
    if norm.affine:
        gamma2 = norm.weight.detach().double().cpu().square()
        shift2 = norm.bias.detach().double().cpu().square()
    gain = gamma2 / (norm.running_var.double().cpu() + norm.eps) * gate2
    return gain, float(((gamma2 + shift2) * gate2).sum())
