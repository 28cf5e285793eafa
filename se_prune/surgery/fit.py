"""The least-squares fit of one layer to what the dense network computed, from sums over images.

Shapes: N images, P positions of each, R rows (an image's position each), G groups of a layer, I inputs of a group (its
input channels × kernel positions, and 1 for the bias), O outputs of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from se_prune import distributed
from se_prune.gates.moments import PATCH_ELEMENTS, grouped_weights, in_float64, input_rows, solve_definite
from se_prune.records import LayerRefit

#: λ, as a share of the mean diagonal of the Gram matrix.
RIDGE = 1e-3
#: Bytes of a layer's Gram matrices, one per gated output; where more would be needed, its outputs share a mean weight.
GATED_BYTES = 1 << 28
#: Bytes of Gram matrices that are solved at a time.
SOLVED_BYTES = 1 << 25
#: Least weight of an output: a gate that is always shut leaves its filter as it is.
LEAST_WEIGHT = 1e-6


@dataclass(slots=True, kw_only=True)
class _Moments:
    """Weighted sums over rows of xᵀx (G, I, I), xᵀy (G, I, O) and y² (G, O); the last input is 1.

    Where every output has weights of its own, it is a group by itself: G × O of them, of one output each.
    """

    xx: torch.Tensor
    xy: torch.Tensor
    yy: torch.Tensor

    @classmethod
    def like(cls, weights: torch.Tensor) -> _Moments:
        """Return empty sums for weights (G, I, O)."""
        groups, inputs, outputs = weights.shape
        return cls(
            xx=weights.new_zeros(groups, inputs, inputs),
            xy=torch.zeros_like(weights),
            yy=weights.new_zeros(groups, outputs),
        )

    @property
    def rows(self) -> torch.Tensor:
        """The sum of the weights (G, 1): the count of rows where there are none."""
        return self.xx[:, -1:, -1]

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add rows x (G, R, I) and y (G, R, O)."""
        self.xx += in_float64(x.mT @ x)
        self.xy += in_float64(x.mT @ y)
        self.yy += in_float64(y.square().sum(1))

    def add_weighted(self, x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> None:
        """Add rows x (G, N × P, I) and y (G, N × P, O) with the weights (N, G, O) of each image's outputs.

        The Gram matrix of an image is taken once, and added to every output's by its weight.
        """
        groups, count, inputs = x.shape
        step = max(1, PATCH_ELEMENTS // (groups * inputs**2))
        for part in torch.split(torch.arange(len(weights), device=x.device), step):
            rows, target = (t.view(groups, len(weights), count // len(weights), -1)[:, part] for t in (x, y))
            own = weights[part].permute(1, 2, 0)  # (G, O, N)
            grams = (own @ (rows.mT @ rows).flatten(2)).view(-1, inputs, inputs)
            scaled = target * own.mT[:, :, None]
            self.xx += in_float64(grams)
            self.xy += in_float64((rows.flatten(1, 2).mT @ scaled.flatten(1, 2)).mT.reshape(-1, inputs, 1))
            self.yy += in_float64((target * scaled).sum((1, 2)).view(-1, 1))

    def merge(self) -> None:
        """Put the sums over the images of all processes in the place of this one's."""
        distributed.add_up(self.xx, self.xy, self.yy)

    def error(self, weights: torch.Tensor) -> float:
        """Return Σ‖x·W − y‖² relative to Σ‖y − E[y]‖² for weights (G, I, O)."""
        fitted = ((self.xx @ weights - 2 * self.xy) * weights).sum() + self.yy.sum()
        spread = self.yy.sum() - (self.xy[:, -1].square() / self.rows).sum()
        return float(fitted / spread.clamp_min(torch.finfo(torch.float64).tiny))


class LayerFit:
    """The fit of one layer to the dense responses, from batches of images as they come; never from all at once.

    Each output is weighted by the square of its gate, where gates are given with every batch.
    """

    def __init__(
        self, name: str, module: nn.Conv2d | nn.Linear, *, norm: nn.Module | None, gated: bool
    ) -> None:
        self.name, self.module, self.norm = name, module, norm
        weight = in_float64(grouped_weights(module))  # (G, I, O)
        self.shape = weight.shape
        groups, inputs, outputs = weight.shape
        self.separate = gated and 8 * groups * outputs * (inputs + 1) ** 2 <= GATED_BYTES
        if self.separate:  # every output is a group by itself
            weight = weight.mT.reshape(-1, inputs, 1)
        self.bias = weight.new_zeros(weight.shape[0], 1, weight.shape[2])
        if module.bias is not None:
            self.bias = in_float64(module.bias).view_as(self.bias)
        self.current = torch.cat([weight, self.bias], 1)
        self.fitting, self.checking = (_Moments.like(self.current) for _ in range(2))

    def add(
        self,
        features: torch.Tensor,
        responses: torch.Tensor,
        gates: torch.Tensor | None,
        *,
        held_out: torch.Tensor,
    ) -> None:
        """Add a batch.

        Args:
            features: What the layer reads.
            responses: What the dense network computed there: (N, O, P) of a convolution, (…, O) of a linear layer.
            gates: The gates (N, O) that scale it in the dense network.
            held_out: Which images (N,) only check the fit.
        """
        weights = None if gates is None else self._weights(gates)
        for sums, chosen in ((self.fitting, ~held_out), (self.checking, held_out)):
            if bool(chosen.any()):
                own = None if weights is None else weights[chosen]
                self._add(sums, features[chosen], responses[chosen], own)

    def _weights(self, gates: torch.Tensor) -> torch.Tensor:
        """Return the weights of the outputs (N, G, O) by their gates (N, G × O); (N, 1, 1) where memory is short."""
        squares = gates.square().clamp_min(LEAST_WEIGHT)
        return (
            squares.view(-1, self.shape[0], self.shape[2])
            if self.separate
            else squares.mean(1)[:, None, None]
        )

    def _add(
        self, sums: _Moments, features: torch.Tensor, responses: torch.Tensor, weights: torch.Tensor | None
    ) -> None:
        for part, rows in input_rows(self.module, features):
            target = responses[part]
            if isinstance(self.module, nn.Conv2d):
                grouped = target.view(len(target), len(rows), -1, target.shape[2])  # (N, G, O, P)
                target = grouped.permute(1, 0, 3, 2)
            target = target.reshape(*rows.shape[:2], -1)
            if weights is None:
                sums.add(rows, target)
            elif self.separate:
                sums.add_weighted(rows, target, weights[part])
            else:
                root = weights[part].sqrt().view(-1, 1, 1).expand(-1, rows.shape[1] // len(weights[part]), 1)
                sums.add(rows * root.reshape(1, -1, 1), target * root.reshape(1, -1, 1))

    def finish(self) -> LayerRefit:
        """Solve with the sums of all processes; the layer's weights change where the held-out error falls."""
        for sums in (self.fitting, self.checking):
            sums.merge()
        module, norm, current, fitting = self.module, self.norm, self.current, self.fitting
        if norm is not None:  # what BN recalibration does for any weights
            current[:, -1] += (fitting.xy[:, -1] - (fitting.xx[:, -1:] @ current)[:, 0]) / fitting.rows
        new = current + _step(fitting, current, constant=module.bias is not None or norm is not None)
        before, after = self.checking.error(current), self.checking.error(new)
        kept = bool(torch.isfinite(new).all()) and after < before
        best = new if kept else current
        module.weight.copy_(best[:, :-1].mT.reshape(module.weight.shape))
        if norm is not None:
            mean = norm.running_mean
            assert isinstance(mean, torch.Tensor)
            mean.sub_((best[:, -1:] - self.bias).flatten().to(mean))
        elif module.bias is not None:
            module.bias.copy_(best[:, -1].flatten())
        return LayerRefit(layer=self.name, error_before=before, error_after=after, kept=kept)


def _step(moments: _Moments, current: torch.Tensor, *, constant: bool) -> torch.Tensor:
    """Return the change (G, I, O) of the weights; without a constant the last row stays 0."""
    inputs = current.shape[1]
    free = inputs if constant else inputs - 1
    step = torch.zeros_like(current)
    each = max(1, SOLVED_BYTES // (8 * inputs**2))
    for part in torch.split(torch.arange(len(current), device=current.device), each):
        some = slice(int(part[0]), int(part[-1]) + 1)
        gram, own = moments.xx[some], current[some]
        residual = (moments.xy[some] - gram @ own)[:, :free]
        penalised = gram[:, :free, :free].clone()
        diagonal = penalised.diagonal(dim1=1, dim2=2)
        ridge = RIDGE * diagonal[:, : inputs - 1].mean(1, keepdim=True).clamp_min(1e-12)
        diagonal[:, : inputs - 1] += ridge  # never on the constant
        step[some, :free] = solve_definite(penalised, residual)
    return step
