"""`gate-obs`: what is lost with a channel after the best re-fit of its consumers without it (Optimal Brain Surgeon).

For a consumer with inputs x and weights W (I, O), whose outputs BN and gates scale by √g, let H = E[xxᵀ] about the
mean where a bias or BN takes the mean up. Removing the inputs K of one channel and re-fitting the others by least
squares adds tr(Wᵀ_K·(H⁻¹_KK)⁻¹·W_K·diag g) to the squared error of the outputs (Hassibi and Stork 1993). Divided by
the energy of the signal that the outputs are a part of, it is in the unit of `gate-energy`. Channels leave greedily,
the cheapest of all consumers' sums first; H⁻¹ and W follow each removal, so that a channel whose twin has left is
dear. The score is the loss at the removal, never below an earlier one's.

Channels that leave together (`ChannelGroup.tied`) are removed as one and share the loss; a grouped convolution is a
consumer per group. Consumers whose inputs are no plain rows (`moments.has_rows`) and hidden units are scored by energy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from se_prune.gates.moments import (
    LAYER_TYPES,
    collect_grams,
    definite_factor,
    grouped_weights,
    has_rows,
    solve_definite,
)
from se_prune.records import Coupling, LayerSlice
from se_prune.scoring.energy import add_energy
from se_prune.scoring.registry import Evidence, criterion
from se_prune.scoring.signal import Signal, describe

#: Added to the diagonal of H, as a share of its mean.
RIDGE = 1e-3
#: Images that the Gram matrices are taken on.
IMAGES = 512
#: Greedy steps per group; wider groups lose several channels a step.
STEPS = 64


@dataclass(slots=True, kw_only=True)
class _Consumer:
    """H⁻¹ (I, I), weights (I, O) as shares of the signal, and the inputs of each unit of channels (U, K)."""

    inverse: torch.Tensor
    weights: torch.Tensor
    inputs: torch.Tensor

    def losses(self, units: torch.Tensor) -> torch.Tensor:
        """Return the loss with each of some units (n,) alone."""
        chosen = self.inputs[units]  # (n, K)
        own = self.inverse[chosen[:, :, None], chosen[:, None, :]]
        weights = self.weights[chosen]
        fitted = solve_definite(own, weights)
        return (weights * fitted).sum((1, 2))

    def remove(self, units: torch.Tensor) -> float:
        """Remove units, re-fit the others, and return the loss."""
        chosen = self.inputs[units].flatten()
        columns = self.inverse[:, chosen]
        weights = self.weights[chosen]
        step = solve_definite(columns[chosen], torch.cat([weights, columns.T], 1))
        fitted, update = torch.split(step, [weights.shape[1], len(columns)], 1)
        self.weights -= columns @ fitted
        self.inverse -= columns @ update
        return float((weights * fitted).sum())


@criterion(
    "gate-obs",
    "share of the recalibrated signal that no re-fit brings back, per MAC",
    comparable=True,
    needs=("energies", "batches"),
)
def gate_obs(evidence: Evidence, wanted: Sequence[Coupling]) -> dict[str, tuple[float, ...]]:
    """Score channels by what their consumers lose after the best re-fit without them."""
    return obs_scores(evidence, describe(evidence), wanted)


def obs_scores(
    evidence: Evidence, signal: Signal, wanted: Sequence[Coupling]
) -> dict[str, tuple[float, ...]]:
    """Return the scores of `gate-obs`."""
    grams = _grams(evidence, signal, wanted)
    return {c.group.name: _scores(c, signal, grams) for c in wanted}


def _grams(evidence: Evidence, signal: Signal, wanted: Sequence[Coupling]) -> dict[str, torch.Tensor]:
    assert evidence.batches is not None
    layers = {
        piece.layer
        for coupling in wanted
        if coupling.group.kind != "hidden"
        for piece in signal.consumers(coupling)
        if has_rows(signal.modules[piece.layer])
    }
    model = evidence.model.to(evidence.device).eval()
    with torch.no_grad(), collect_grams(model, layers) as grams:
        for images, _ in evidence.batches(IMAGES):
            model(images.to(evidence.device, non_blocking=True))
    return grams


def _scores(coupling: Coupling, signal: Signal, grams: dict[str, torch.Tensor]) -> tuple[float, ...]:
    """Return the loss at each channel's removal (C,)."""
    count, tied = coupling.group.channels, coupling.group.tied
    by_channel = torch.zeros(count, dtype=torch.float64)
    consumers: list[_Consumer] = []
    for piece in signal.consumers(coupling):
        regular = coupling.group.kind != "hidden" and not coupling.group.units
        if regular and piece.layer in grams and _is_even(piece, count):
            consumers.extend(_consumers(piece, count // tied, signal, grams[piece.layer]))
        else:
            add_energy(by_channel, piece, signal)
    if not consumers:
        return tuple(by_channel.tolist())
    fixed = by_channel.view(tied, -1).sum(0)
    return tuple((_greedy(fixed, consumers) / tied).repeat(tied).tolist())


def _greedy(fixed: torch.Tensor, consumers: Sequence[_Consumer]) -> torch.Tensor:
    """Return the loss at the removal of each of U units, `fixed` (U,) and that of the consumers."""
    scores, reached = fixed.clone(), 0.0
    left = torch.arange(len(fixed))
    while len(left):
        alone = fixed[left] + sum(consumer.losses(left).cpu() for consumer in consumers)
        order = alone.argsort(stable=True)
        going = order[: max(1, len(fixed) // STEPS)]
        units = left[going]
        together = float(fixed[units].sum()) + sum(consumer.remove(units) for consumer in consumers)
        reached = max(reached, together / len(units))
        scores[units] = reached
        left = left[order[len(going) :].sort().values]
    return scores


def _consumers(piece: LayerSlice, units: int, signal: Signal, grams: torch.Tensor) -> Iterator[_Consumer]:
    """Yield a consumer per group of the layer: what one group reads, the others do not."""
    module = signal.modules[piece.layer]
    assert isinstance(module, LAYER_TYPES)
    weights = grouped_weights(module).detach().to(grams)
    gains = signal.gain(piece.layer).to(grams).view(len(weights), -1)
    whole = signal.whole(piece.layer)
    moments = grams[:, :-1, :-1] / grams[:, -1:, -1:]
    if whole is None:
        whole = float((gains * (weights * (moments @ weights)).sum(1)).sum())
    if module.bias is not None or signal.norm(piece.layer) is not None:
        mean = grams[:, :-1, -1:] / grams[:, -1:, -1:]
        moments = moments - mean @ mean.mT
    inputs = _inputs(piece, units, module, len(weights))
    for second, weight, gain in zip(moments, weights, gains, strict=True):
        ridge = (RIDGE * second.diagonal().mean()).clamp_min(1e-12)
        yield _Consumer(
            inverse=torch.cholesky_inverse(
                definite_factor(second + ridge * torch.eye(len(second)).to(second))
            ),
            weights=weight * (gain / max(whole, 1e-30)).sqrt(),
            inputs=inputs,
        )


def _is_even(piece: LayerSlice, count: int) -> bool:
    """Say whether every channel of the group makes the same number of the layer's input channels."""
    times = torch.bincount(torch.tensor(piece.root), minlength=count)
    return len(times) == count and bool((times == times[0]).all())


def _inputs(piece: LayerSlice, units: int, module: nn.Module, groups: int) -> torch.Tensor:
    """Return which inputs of a layer's group each of U units makes (U, K)."""
    assert isinstance(module, LAYER_TYPES)
    kernel = module.weight[0, 0].numel()
    width = len(piece.index) // groups if groups > 1 else len(piece.index)
    index, unit = torch.tensor(piece.index)[:width], torch.tensor(piece.root)[:width] % units
    channels = index[unit.argsort(stable=True)].view(units, -1)
    return (channels[:, :, None] * kernel + torch.arange(kernel)).flatten(1)
