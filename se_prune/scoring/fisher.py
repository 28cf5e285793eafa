"""Criteria of the gates alone: their mean (the literature's), and their Fisher information.

Shapes: N images, C channels, H×W positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from se_prune import channels, distributed
from se_prune.records import Coupling, LayerSlice
from se_prune.scoring.gradients import parts, thawed
from se_prune.scoring.registry import Evidence, criterion
from se_prune.scoring.signal import describe

#: Images whose gradients are taken.
IMAGES = 1024


@criterion(
    "gate-mean",
    "mean gate over the images (Song et al. 2018); the group's L2 norm where nothing is gated",
    needs=("energies",),
)
def gate_mean(evidence: Evidence, wanted: Sequence[Coupling]) -> dict[str, tuple[float, ...]]:
    """Score gated channels and streams by the mean of their gates, summed over the group's sites."""
    statistics = evidence.statistics
    gates = {site.expand: site.name for site in evidence.sites}
    fallback = channels.importance(
        evidence.model, evidence.example, "l2", seed=evidence.seed, wanted=wanted, sites=evidence.sites
    )
    scores = {}
    for coupling in wanted:
        total = torch.zeros(coupling.group.channels, dtype=torch.float64)
        pieces = [p for p in coupling.slices if p.role == "out" and p.layer in gates]
        for piece in pieces if statistics is not None else ():
            assert statistics is not None
            mean = statistics.sums[gates[piece.layer]].s.sum(0) / statistics.n
            total.index_add_(0, torch.tensor(piece.root), mean[list(piece.index)])
        name = coupling.group.name
        scores[name] = tuple(total.tolist()) if pieces and statistics is not None else fallback[name]
    return scores


@criterion(
    "gate-fisher",
    "Fisher information of a gate of 1 on each channel (Theis et al. 2018)",
    comparable=True,
    needs=("energies", "batches"),
)
def gate_fisher(evidence: Evidence, wanted: Sequence[Coupling]) -> dict[str, tuple[float, ...]]:
    """Score channels by E[(∂L/∂m)²] of a mask m = 1 on what the consumers read.

    The gradient of a mask is Σ a·∂L/∂a over positions and consumers; for a gated channel it is s·∂L/∂s.
    """
    assert evidence.batches is not None
    signal = describe(evidence)
    pieces = {c.group.name: signal.consumers(c) for c in wanted}
    sums = {c.group.name: torch.zeros(c.group.channels, dtype=torch.float64) for c in wanted}
    model = evidence.model.to(evidence.device).eval()
    watched = _Watched(model, {piece.layer for values in pieces.values() for piece in values})
    seen = torch.zeros((), dtype=torch.float64)
    try:
        with thawed(model), torch.enable_grad():
            for images, labels in itertools.chain.from_iterable(
                parts(*batch) for batch in evidence.batches(IMAGES)
            ):
                watched.inputs.clear()
                loss = F.cross_entropy(
                    model(images.to(evidence.device)), labels.to(evidence.device), reduction="sum"
                )
                masks = watched.mask_gradients(loss)
                for name, total in sums.items():
                    total.add_(_of_group(len(total), pieces[name], masks).square().sum(0))
                seen += len(images)
    finally:
        watched.close()
        model.cpu()
    distributed.add_up(seen, *sums.values())
    return {name: tuple((total / seen.clamp_min(1)).tolist()) for name, total in sums.items()}


def _of_group(count: int, pieces: Sequence[LayerSlice], masks: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the gradient of each channel's mask (N, C), summed over the layers that read it."""
    images = len(next(iter(masks.values())))
    total = torch.zeros(images, count, dtype=torch.float64)
    for piece in pieces:
        if piece.layer in masks:
            total.index_add_(1, torch.tensor(piece.root), masks[piece.layer][:, list(piece.index)])
    return total


class _Watched:
    """Keeps the inputs of layers while a network runs."""

    def __init__(self, model: nn.Module, layers: set[str]) -> None:
        self.inputs: dict[str, torch.Tensor] = {}
        modules = dict(model.named_modules())
        self.handles = [modules[name].register_forward_pre_hook(self._hook(name)) for name in layers]

    def _hook(self, name: str) -> Callable[..., None]:
        def keep(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            self.inputs[name] = inputs[0]

        return keep

    def mask_gradients(self, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return Σ a·∂L/∂a over positions per layer (N, C_in), float64 on the CPU."""
        names = [name for name, value in self.inputs.items() if value.requires_grad]
        values = [self.inputs[name] for name in names]
        gradients = torch.autograd.grad(loss, values, allow_unused=True)
        return {
            name: (value * gradient).detach().flatten(2).sum(2).cpu().double()
            if value.ndim > 2
            else (value * gradient).detach().cpu().double()
            for name, value, gradient in zip(names, values, gradients, strict=True)
            if gradient is not None
        }

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
