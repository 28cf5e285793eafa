"""torch-pruning's criteria: random, L1, L2, BN scale, FPGM, LAMP, Taylor and Hessian."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from se_prune import channels, distributed
from se_prune.records import Coupling
from se_prune.scoring.gradients import parts, thawed
from se_prune.scoring.registry import Evidence, criterion


def _torch_pruning(name: str, evidence: Evidence, wanted: Sequence[Coupling]) -> dict[str, tuple[float, ...]]:
    return channels.importance(
        evidence.model, evidence.example, name, seed=evidence.seed, wanted=wanted, sites=evidence.sites
    )


def _register(name: str, summary: str) -> None:
    @criterion(name, summary)
    def rule(evidence: Evidence, wanted: Sequence[Coupling]) -> dict[str, tuple[float, ...]]:
        return _torch_pruning(name, evidence, wanted)


_register("random", "uniform random numbers")
_register("l1", "L1 norm of the group's weights (Li et al. 2017)")
_register("l2", "L2 norm of the group's weights (DepGraph, Fang et al. 2023)")
_register("bn-scale", "scale of the BN layers (network slimming, Liu et al. 2017)")
_register("fpgm", "distance from the geometric median (He et al. 2019)")
_register("lamp", "layer-adaptive magnitude (Lee et al. 2021)")


@criterion("taylor", "first-order Taylor expansion of the loss (Molchanov et al. 2019)", needs=("batches",))
def taylor(evidence: Evidence, wanted: Sequence[Coupling]) -> dict[str, tuple[float, ...]]:
    """|w·∂L/∂w| summed over the group, gradients of the mean loss over all batches."""
    with thawed(evidence.model):
        _accumulate(evidence, squared=False)
    try:
        return _torch_pruning("taylor", evidence, wanted)
    finally:
        evidence.model.zero_grad(set_to_none=True)


@criterion("hessian", "w²·E[(∂L/∂w)²] (optimal brain damage, LeCun et al. 1990)", needs=("batches",))
def hessian(evidence: Evidence, wanted: Sequence[Coupling]) -> dict[str, tuple[float, ...]]:
    """Squared gradients of single images, at most the first 256, as torch-pruning's users do."""
    with thawed(evidence.model):
        _accumulate(evidence, squared=True)
    try:
        return _torch_pruning("hessian", evidence, wanted)
    finally:
        evidence.model.zero_grad(set_to_none=True)


def _accumulate(evidence: Evidence, *, squared: bool, limit: int = 256) -> None:
    """Leave the mean gradient, or the mean squared gradient of single images, in `.grad` on the CPU."""
    assert evidence.batches is not None
    model, device = evidence.model.to(evidence.device).eval(), evidence.device
    parameters = list(model.parameters())
    sums = [torch.zeros_like(p, dtype=torch.float64 if device.type != "mps" else p.dtype) for p in parameters]
    seen = torch.zeros((), dtype=torch.float64)
    for images, labels in evidence.batches(limit if squared else None):
        singly = zip(torch.split(images, 1), torch.split(labels, 1), strict=True)
        for image, target in singly if squared else parts(images, labels):
            loss = F.cross_entropy(model(image.to(device)), target.to(device), reduction="sum")
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for total, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:
                    total.add_(gradient**2 if squared else gradient)
            seen += len(target)
    distributed.add_up(seen, *sums)
    model.cpu()
    for parameter, summed in zip(parameters, sums, strict=True):
        parameter.grad = (summed.cpu() / seen.clamp_min(1)).to("cpu", parameter.dtype)
