"""Repair: label-free recovery after surgery. Here: BN statistics re-estimated on training images.

Shapes: N images, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from se_prune import distributed
from se_prune.artifact import NORM_TYPES
from se_prune.data.source import shared_batches
from se_prune.device import inference_batch
from se_prune.errors import DataError
from se_prune.gates.moments import in_float64
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
    are not touched; the model stays on `device` in eval mode. Several processes share the batches.

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
        for images, labels in shared_batches(split, batch_size, preprocessing):
            if len(labels) > 1:
                model(images.to(device, non_blocking=True))
            if on_batch is not None:
                on_batch(len(labels) * distributed.size())
        if distributed.size() > 1:
            _average_statistics(norms)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
    return len(norms)


def _average_statistics(norms: Sequence[nn.Module]) -> None:
    """Put the average over the batches of all processes in the place of each BN's own."""
    for norm in norms:
        mean, variance, count = norm.running_mean, norm.running_var, norm.num_batches_tracked
        assert isinstance(mean, torch.Tensor)
        assert isinstance(variance, torch.Tensor)
        assert isinstance(count, torch.Tensor)
        seen = in_float64(count)
        sums = in_float64(torch.stack([mean, variance])) * seen
        distributed.add_up(sums, seen)
        if seen > 0:  # a BN that no image reaches keeps what it has
            mean.copy_(sums[0] / seen)
            variance.copy_(sums[1] / seen)
            count.copy_(seen)


@torch.no_grad()
def recalibrate_where_nearer(
    dense: nn.Module,
    model: nn.Module,
    split: Split,
    held_out: Split,
    preprocessing: Preprocessing,
    *,
    device: torch.device,
    batch_size: int = 250,
    on_batch: Callable[[int], None] | None = None,
) -> tuple[int, float, float]:
    """Recalibrate BN, and take it back unless the outputs come nearer to the dense network's.

    Statistics of a network that was trained on other images, or with other augmentation, are better than those of
    the images at hand: there recalibration alone ruins even the dense network.

    Args:
        dense: The network before the cut.
        model: What is to be recalibrated, in place.
        split: Images that the statistics are taken on.
        held_out: Images that decide.
        preprocessing: How the networks want their images.
        device: Where to compute.
        batch_size: Images of each batch whose statistics are averaged.
        on_batch: Called with the count of images that the statistics have seen.

    Returns:
        How many BN layers were set (0 where it was taken back), and the divergence before and after.
    """
    norms = [m for m in model.modules() if isinstance(m, NORM_TYPES) and m.track_running_stats]
    if not norms:
        return 0, 0.0, 0.0
    kept = [{name: value.clone() for name, value in norm.named_buffers()} for norm in norms]
    before = divergence(dense, model, held_out, preprocessing, device=device)
    count = recalibrate_bn(
        model, split, preprocessing, device=device, batch_size=batch_size, on_batch=on_batch
    )
    after = divergence(dense, model, held_out, preprocessing, device=device)
    if after < before:
        return count, before, after
    for norm, buffers in zip(norms, kept, strict=True):
        for name, value in norm.named_buffers():
            value.copy_(buffers[name])
    return 0, before, after


def divergences(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the KL divergence (N,) of logits (N, K) from log-probabilities (N, K), image by image."""
    got = logits.float().log_softmax(1)
    return functional.kl_div(got, wanted, reduction="none", log_target=True).sum(1)


@torch.no_grad()
def divergence(
    dense: nn.Module, model: nn.Module, split: Split, preprocessing: Preprocessing, *, device: torch.device
) -> float:
    """Return the mean KL divergence of a network's class probabilities (N, K) from the dense network's."""
    dense.to(device).eval()
    model.to(device).eval()
    total = 0.0
    for images, _ in shared_batches(split, inference_batch(device), preprocessing):
        wanted = dense(images.to(device)).float().log_softmax(1)
        total += float(divergences(model(images.to(device)), wanted).sum())
    summed = torch.tensor(total, dtype=torch.float64)
    distributed.add_up(summed)
    return float(summed) / max(1, len(split))
