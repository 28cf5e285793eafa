"""Scales and shifts of BN and of the classifier: what the outputs' slopes are of each of them, image by image.

Shapes: N images, K classes, C channels of a module, P scales and shifts in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from se_prune.artifact import NORM_TYPES

#: Least spread of a channel, in whose units it is shifted.
LEAST_SPREAD = 1e-6
#: A BN whose scale is smaller lets nothing through; its input tells nothing of its shift, which stays.
LEAST_SCALE = 1e-12


@dataclass(slots=True)
class Knob:
    """A module whose channels y are scaled around their shift and moved: y + a·(y − β) + b·σ.

    Of a BN, y is what its own scale and shift give, whatever activation the same module puts behind them.
    """

    module: Any
    spread: torch.Tensor  # σ (C,)
    slopes: torch.Tensor | None = None  # of a, then of b: (N, 2·C), of the batch that runs
    leaves: list[torch.Tensor] = field(default_factory=list)  # where gradients end, of all knobs

    @property
    def channels(self) -> int:
        """How many channels are scaled and shifted."""
        return len(self.module.weight)

    def watch(self) -> Any:
        """Watch what comes backwards, while the handle that is returned stands."""
        if isinstance(self.module, NORM_TYPES):
            return self.module.register_forward_pre_hook(self._before)
        return self.module.register_forward_hook(self._after)

    def _before(self, module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Watch a BN's input, which BN keeps itself: its scale and shift are one of the input as well.

        With u = (x − μ)/√(σ² + ε), the slope of x is γ/√(σ² + ε) times that of y = γ·u + β.
        """
        seen = inputs[0].detach()

        def backwards(slope: torch.Tensor) -> None:
            moved, scaled = (t.flatten(2).sum(2) if t.ndim > 2 else t for t in (slope, slope * seen))
            factor = (module.running_var + module.eps).sqrt() / module.weight
            shift = torch.where(module.weight.abs() < LEAST_SCALE, 0.0, factor * self.spread)
            self._add(scaled - moved * module.running_mean, moved * shift)

        return (self._watched(inputs[0], backwards), *inputs[1:])

    def _after(self, module: Any, _: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        """Watch a classifier's output."""
        seen = output.detach()

        def backwards(slope: torch.Tensor) -> None:
            self._add(slope * (seen - module.bias), slope * self.spread)

        return self._watched(output, backwards)

    def _add(self, scaled: torch.Tensor, moved: torch.Tensor) -> None:
        slopes = torch.cat([scaled, moved], 1)
        self.slopes = slopes if self.slopes is None else self.slopes + slopes

    def _watched(self, tensor: torch.Tensor, backwards: Callable[[torch.Tensor], None]) -> torch.Tensor:
        """Return the same values, whose slope is told; a leaf where no other knob stands before."""
        if not tensor.requires_grad:
            tensor = tensor.detach().requires_grad_(True)
            self.leaves.append(tensor)
        own = tensor.view_as(tensor)  # others that read the tensor have slopes of their own
        own.register_hook(backwards)  # type: ignore[no-untyped-call]
        return own

    @torch.no_grad()
    def move(self, scale: torch.Tensor, shift: torch.Tensor) -> None:
        """Put a change (C,) of both into the weights."""
        weight, own = self.module.weight, scale.to(self.module.weight)
        weight.mul_((1 + own).view(-1, *(1,) * (weight.ndim - 1)))
        self.module.bias.add_(shift.to(own) * self.spread)


def find_knobs(model: nn.Module, example: torch.Tensor) -> list[Knob]:
    """Return what can be moved: BN with scale and shift, and the linear layer that gives the output.

    The spreads are those of the example.
    """
    found: list[Knob] = []
    seen: dict[str, torch.Tensor] = {}
    spreads: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
            wanted = (len(example), len(module.weight))
            if isinstance(output, torch.Tensor) and output.ndim in {2, 4} and output.shape[:2] == wanted:
                seen[name] = output
                spreads[name] = _spread(module, inputs[0], output).clamp_min(LEAST_SPREAD)

        return hook

    modules: dict[str, Any] = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, (*NORM_TYPES, nn.Linear)) and m.weight is not None and m.bias is not None
        if not isinstance(m, NORM_TYPES) or m.running_var is not None
    }
    handles = [m.register_forward_hook(watch(name)) for name, m in modules.items()]
    try:
        with torch.no_grad():
            logits = model(example)
    finally:
        for handle in handles:
            handle.remove()
    for name, spread in spreads.items():
        if isinstance(modules[name], NORM_TYPES) or seen[name].data_ptr() == logits.data_ptr():
            found.append(Knob(module=modules[name], spread=spread))
    return found


def _spread(module: Any, inputs: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """Return the standard deviation (C,) of what scale and shift give: of a BN, without what stands behind it."""
    if not isinstance(module, NORM_TYPES):
        return output.std(0)
    assert module.running_var is not None
    factor = module.weight.abs() / (module.running_var + module.eps).sqrt()
    return inputs.transpose(0, 1).flatten(1).std(1) * factor


@contextmanager
def _turning(model: nn.Module, knobs: Sequence[Knob]) -> Iterator[None]:
    """Let gradients reach the knobs of every image, and nothing else."""
    needed = [p for p in model.parameters() if p.requires_grad]
    handles = [knob.watch() for knob in knobs]
    try:
        for parameter in needed:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in needed:
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()


def curvature_rows(q: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """Return (diag q − qqᵀ)^½·ξ for probabilities and random signs ξ, both (N, K); its square has that mean."""
    root = q.sqrt() * signs
    return root - q * root.sum(1, keepdim=True)


def slopes_of(
    model: nn.Module,
    knobs: Sequence[Knob],
    batches: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]],
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return a random row (N, P) of the curvature per image, by batches, and the summed gradient (P,).

    A batch is images, the dense network's probabilities (N, K), and the signs (N, K) of the rows, without which it
    gives none.
    """
    rows: list[torch.Tensor] = []
    gradient = torch.zeros(sum(2 * knob.channels for knob in knobs), dtype=torch.float64)
    with _turning(model, knobs), torch.enable_grad():
        for images, wanted, signs in batches:
            leaves: list[torch.Tensor] = []
            for knob in knobs:
                knob.leaves = leaves
            logits = model(images).float()
            q = logits.detach().softmax(1)
            if signs is not None:
                row = curvature_rows(q, signs.to(q))
                rows.append(_backwards(logits, row, knobs, leaves, again=True))
            slope = _backwards(logits, q - wanted, knobs, leaves, again=False)
            gradient += slope.double().sum(0).cpu()
    for knob in knobs:
        knob.slopes = None
        knob.leaves = []
    return rows, gradient


def _backwards(
    logits: torch.Tensor,
    slope: torch.Tensor,
    knobs: Sequence[Knob],
    leaves: Sequence[torch.Tensor],
    *,
    again: bool,
) -> torch.Tensor:
    """Return what a slope (N, K) of the logits is of every scale and shift (N, P)."""
    for knob in knobs:
        knob.slopes = None
    torch.autograd.grad(logits, list(leaves), slope, retain_graph=again, allow_unused=True)
    return torch.cat(
        [
            logits.new_zeros(len(logits), 2 * knob.channels) if knob.slopes is None else knob.slopes
            for knob in knobs
        ],
        1,
    )
