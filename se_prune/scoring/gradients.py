"""What criteria that take gradients share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

#: Pixels of the images whose gradients are taken at a time: all that layers make of them is kept meanwhile.
PIXELS = 1 << 19


@contextlib.contextmanager
def thawed(model: nn.Module) -> Iterator[None]:
    """Let frozen parameters have gradients too: a frozen layer can be cut like any other."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    try:
        model.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def parts(images: torch.Tensor, labels: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield a batch (N, C, H, W), (N,) in parts of at most `PIXELS`, at least an image each."""
    step = max(1, PIXELS // images[0, 0].numel())
    yield from zip(torch.split(images, step), torch.split(labels, step), strict=True)
