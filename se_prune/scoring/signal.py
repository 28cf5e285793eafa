"""What a layer's outputs are worth: how BN and gates scale them, and the signal that they are a part of.

Shapes: C_in and C_out channels of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from se_prune.artifact import CONV_TYPES, NORM_TYPES
from se_prune.gates.energies import ChannelEnergies
from se_prune.gates.statistics import Statistics
from se_prune.gates.trace import norms_after, trace
from se_prune.records import Coupling, GateSite, LayerSlice
from se_prune.scoring.registry import Evidence


@dataclass(slots=True, kw_only=True)
class Signal:
    """The layers of a network with what stands behind each of them."""

    modules: dict[str, nn.Module]
    norm_after: dict[str, str]
    site_of: dict[str, GateSite]
    reader_of: dict[str, str]  # layer -> a layer that reads the stream it writes
    gate_layers: frozenset[str]
    statistics: Statistics | None
    energies: ChannelEnergies

    def consumers(self, coupling: Coupling) -> list[LayerSlice]:
        """Return the slices that read a group; squeezes are left out, a site follows its channels."""
        hidden = coupling.group.kind == "hidden"
        return [p for p in coupling.slices if p.role == "in" and (hidden or p.layer not in self.gate_layers)]

    def gain(self, layer: str) -> torch.Tensor:
        """Return γ²/σ²·E[s²] per output channel (C_out,): what BN and gate make of a squared output."""
        gain = self._gates(layer)
        norm = self.norm(layer)
        if norm is None:
            return gain
        if norm.affine:
            gain = gain * norm.weight.detach().double().cpu().square()
        assert norm.running_var is not None
        return gain / (norm.running_var.double().cpu() + norm.eps)

    def whole(self, layer: str) -> float | None:
        """Return the energy of what the layer's output is added to, else of its own; None where nothing tells it."""
        reader = self.reader_of.get(layer)
        if reader is not None:
            return float(self.energies.mean(reader).sum())
        norm = self.norm(layer)
        if norm is None:
            return None
        gates = self._gates(layer)
        if not norm.affine:
            return float(gates.sum())
        gamma, beta = (value.detach().double().cpu() for value in (norm.weight, norm.bias))
        return float(((gamma.square() + beta.square()) * gates).sum())

    def norm(self, layer: str) -> nn.BatchNorm2d | None:
        """Return the BN that alone reads a layer, if there is one with running statistics."""
        name = self.norm_after.get(layer)
        norm = None if name is None else self.modules[name]
        return norm if isinstance(norm, NORM_TYPES) and norm.running_var is not None else None  # type: ignore[return-value]

    def _gates(self, layer: str) -> torch.Tensor:
        site = self.site_of.get(layer)
        if site is not None and self.statistics is not None:
            return self.statistics.sums[site.name].s2.sum(0) / self.statistics.n
        weight = self.modules[layer].weight
        assert isinstance(weight, torch.Tensor)
        return torch.ones(weight.shape[0], dtype=torch.float64)


def describe(evidence: Evidence) -> Signal:
    """Return the signal of a network whose energies were measured."""
    assert evidence.energies is not None
    gates = frozenset(name for site in evidence.sites for name in site.layers)
    modules = dict(evidence.model.named_modules())
    reader_of: dict[str, str] = {}
    for coupling in evidence.couplings:
        # a layer behind the global pool reads means, whose energy is not that of the stream
        readers = [n for n in coupling.layers("in") if n not in gates and isinstance(modules[n], CONV_TYPES)]
        if coupling.group.kind == "stream" and readers:
            reader_of |= dict.fromkeys(coupling.layers("out"), readers[-1])
    return Signal(
        modules=modules,
        norm_after=norms_after(trace(evidence.model, evidence.example)),
        site_of={s.features: s for s in evidence.sites if s.features is not None},
        reader_of=reader_of,
        gate_layers=gates,
        statistics=evidence.statistics,
        energies=evidence.energies,
    )
