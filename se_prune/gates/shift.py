"""What folding a gate does to the outputs, before anything is touched: the shift of the logits to first order.

With a constant a (C,) in place of a gate s, the logits z move by J·(a - s) to first order, J their derivative by the
gate. The squared length of that, relative to the logits' own, ranks sites across a whole network as what folding
them really does to the outputs (`reports/folding.md`); energy at the site does not, since layers differ in how much of
their error reaches the output. No labels are needed.

Shapes: N images, C channels, K logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from se_prune import distributed
from se_prune.data.source import shared_batches
from se_prune.errors import DataError
from se_prune.gates.tap import OnGate, tap
from se_prune.records import GateSite, Preprocessing

if TYPE_CHECKING:
    from se_prune.data import Split

#: Random directions of the logits per image, each a backward pass: E[(rᵀd)²] = ‖d‖² for r of independent ±1.
PROBES = 4


def _probe(gates: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> OnGate:
    """Return a callback that adds a zero to every gate, to be differentiated by, and notes both."""

    def add(site: GateSite, _: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        zero = torch.zeros_like(s, requires_grad=True)
        gates[site.name] = (s.detach(), zero)
        return s + zero

    return add


@torch.enable_grad()
def logit_shifts(
    model: nn.Module,
    sites: Sequence[GateSite],
    constants: Mapping[str, torch.Tensor],
    split: Split,
    preprocessing: Preprocessing,
    *,
    device: torch.device,
    batch_size: int = 32,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Return E‖J·(a - s)‖² / E‖z‖² per site: the share of the logits' energy that a constant gate moves.

    Several processes share the images, and all return the result of all of them.

    Args:
        model: The network; its parameters get no gradients.
        sites: Its gate sites.
        constants: Per site the constant a (C,).
        split: Images; some hundreds are enough.
        preprocessing: How the network wants its images.
        device: Where to compute; the model stays on it, in eval mode.
        batch_size: Images per pass.
        on_batch: Called with the count of images that are done.

    Raises:
        DataError: There is no image.
    """
    if len(split) == 0:
        raise DataError("there are no images to measure gates on; check --data.")
    generator = torch.Generator().manual_seed(0)
    moved = {site.name: 0.0 for site in sites}
    energy = 0.0
    model.to(device).eval()
    before = distributed.rank()  # batches that other processes have before the next one of this
    for images, labels in shared_batches(split, batch_size, preprocessing):
        gates: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        with tap(model, sites, _probe(gates)):
            logits = model(images.to(device))
        torch.randint(0, 2, (before, PROBES, batch_size, logits.shape[1]), generator=generator)
        before = distributed.size() - 1
        energy += float(logits.detach().cpu().double().square().sum())
        for number in range(PROBES):
            signs = torch.randint(0, 2, logits.shape, generator=generator).to(logits) * 2 - 1
            slopes = torch.autograd.grad(
                (logits * signs).sum(),
                [added for _, added in gates.values()],
                retain_graph=number < PROBES - 1,
                materialize_grads=True,  # of a gate that does not reach the logits: zeros
            )
            for (name, (s, _)), slope in zip(gates.items(), slopes, strict=True):
                change = constants[name].to(s).view(1, -1, 1, 1) - s
                step = (slope * change).flatten(1).sum(1)
                moved[name] += float(step.cpu().double().square().sum()) / PROBES
        if on_batch is not None:
            on_batch(len(labels) * distributed.size())
    sums = torch.tensor([energy, *moved.values()], dtype=torch.float64)
    distributed.add_up(sums)
    energy, *shifts = sums.tolist()
    return {name: value / max(energy, 1e-300) for name, value in zip(moved, shifts, strict=True)}
