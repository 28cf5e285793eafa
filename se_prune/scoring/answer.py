"""What a layer's outputs are worth to the network's answer, instead of to the signal that they are a part of.

Shapes: N images, K classes, C_out channels of a layer.

With p = softmax(z/T) of the logits z, squared errors δ of a layer's outputs move the answer by about E[Σ_c F_c·δ_c²],
F_c = E[Σ g_c²] over positions, g the gradient of vᵀz for a v of covariance diag(p) − p·pᵀ: the Fisher information of
the network's answer, with errors taken as independent of gradients and of each other (as K-FAC does, Martens and
Grosse 2015). v = onehot(y) − p does it, y drawn from p, so that no labels are read. T = 4, as in distillation: at
T = 1 the images that are answered with confidence, most of those of the training set, say nothing. Divided by
E[Σ_k p_k·(z_k − Σ p·z)²], which is what goes when all logits become equal, it is the share of the answer that is lost.

The gradient runs through every gate behind the layer: a channel that gates close on the images which it would move is
worth little, whatever its energy.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields

import torch
from torch import nn

from se_prune import distributed
from se_prune.records import Coupling
from se_prune.scoring.gradients import parts
from se_prune.scoring.obs import obs_scores
from se_prune.scoring.registry import Evidence
from se_prune.scoring.signal import Signal

#: Images whose gradients are taken, and the pixels that they have together at most.
IMAGES, ALL_PIXELS = 512, 256 * 224**2
TEMPERATURE = 4.0
#: Of the labels that are drawn.
SEED = 0


@dataclass(slots=True, kw_only=True)
class Answer(Signal):
    """A signal whose layers are worth their Fisher information; one that no gradient reaches counts as before."""

    information: dict[str, torch.Tensor]  # per layer (C_out,)
    total: float

    def gain(self, layer: str) -> torch.Tensor:
        """Return F per output channel (C_out,): what a squared error of it is worth."""
        return self.information[layer] if layer in self.information else Signal.gain(self, layer)

    def whole(self, layer: str) -> float | None:
        """Return what the whole answer is worth."""
        return self.total if layer in self.information else Signal.whole(self, layer)


def answer_scores(
    evidence: Evidence, signal: Signal, wanted: Sequence[Coupling]
) -> dict[str, tuple[float, ...]]:
    """Return what no re-fit of a channel's consumers brings back, as a share of the answer."""
    layers = {piece.layer for coupling in wanted for piece in signal.consumers(coupling)}
    return obs_scores(evidence, answered(evidence, signal, layers), wanted)


def answered(evidence: Evidence, signal: Signal, layers: Collection[str]) -> Answer:
    """Return a signal with the Fisher information of some layers, measured on images."""
    sums: dict[str, torch.Tensor] = {}
    handles = [signal.modules[name].register_forward_hook(_adding(sums, name)) for name in layers]
    try:
        whole = _run(evidence)
    finally:
        for handle in handles:
            handle.remove()
        evidence.model.cpu()
    distributed.add_up(whole)
    sums = distributed.add_up_tables(sums)
    told = {name: total for name, total in sums.items() if float(whole) > 0 and bool(total.any())}
    own = {field.name: getattr(signal, field.name) for field in fields(signal)}
    return Answer(**own, information=told, total=float(whole))


def _run(evidence: Evidence) -> torch.Tensor:
    """Run images forwards and backwards, and return Σ Σ_k p_k·(z_k − Σ p·z)² over them, float64."""
    assert evidence.batches is not None
    model = evidence.model.to(evidence.device).eval()
    whole = torch.zeros((), dtype=torch.float64)
    limit = max(1, min(IMAGES, ALL_PIXELS // evidence.example[0, 0].numel()))
    with torch.enable_grad():
        for batch in evidence.batches(limit):
            # the same numbers for each batch, so that several processes draw what one would
            generator = torch.Generator().manual_seed(SEED)
            for part, _ in parts(*batch):
                images = part.to(evidence.device).detach().requires_grad_(True)
                logits = model(images)
                z = logits.detach().cpu().double()
                p = (z / TEMPERATURE).softmax(1)
                drawn = torch.rand(len(z), 1, generator=generator)
                label = (p.cumsum(1) < drawn).sum(1).clamp_max(z.shape[1] - 1)
                away = (nn.functional.one_hot(label, z.shape[1]) - p).to(logits)
                if logits.requires_grad:
                    torch.autograd.grad((logits * away).sum(), images, allow_unused=True)
                whole += (p * (z - (p * z).sum(1, keepdim=True)).square()).sum()
    return whole


def _adding(sums: dict[str, torch.Tensor], name: str) -> Callable[..., None]:
    """Return a forward hook that adds the squared gradient of a layer's output (N, C_out, …) to its sum (C_out,)."""

    def add(gradient: torch.Tensor) -> None:
        axis = 1 if gradient.ndim == 4 else gradient.ndim - 1
        others = [i for i in range(gradient.ndim) if i != axis]
        total = gradient.detach().float().square().sum(others).double().cpu()
        sums[name] = sums[name] + total if name in sums else total

    def hook(_: nn.Module, inputs: object, output: torch.Tensor) -> None:
        del inputs
        if output.requires_grad:
            # on the tensor, before an activation may write over it
            output.register_hook(add)  # type: ignore[no-untyped-call]

    return hook
