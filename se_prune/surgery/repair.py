"""Repair: label-free recovery after surgery. Here: BN statistics re-estimated on training images."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from se_prune.artifact import NORM_TYPES
from se_prune.errors import DataError
from se_prune.records import Preprocessing

if TYPE_CHECKING:
    from se_prune.data import Split


@torch.no_grad()
def recalibrate_bn(
    model: nn.Module,
    split: Split,
    preprocessing: Preprocessing,
    *,
    device: torch.device,
    batch_size: int = 250,
    on_batch: Callable[[int], None] | None = None,
) -> int:
    """Set every BN's running mean and variance to their average over the batches of `split`.

    The averages are cumulative (each batch counts the same), so the result does not depend on a momentum. Weights
    are not touched; the model stays on `device` in eval mode.

    Returns:
        How many BN layers were set.

    Raises:
        DataError: There are fewer than two images, of which no variance can be taken.
    """
    norms = [m for m in model.modules() if isinstance(m, NORM_TYPES) and m.track_running_stats]
    if not norms:
        return 0
    if min(len(split), batch_size) < 2:
        raise DataError(
            f"BN recalibration needs batches of 2 images or more, got {len(split)}; check --data."
        )
    model.to(device).eval()
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        for images, labels in split.batches(batch_size, preprocessing):
            if len(labels) > 1:
                model(images.to(device, non_blocking=True))
            if on_batch is not None:
                on_batch(len(labels))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
    return len(norms)
