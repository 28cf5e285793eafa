"""Images held out of the training ones: they say which epoch was best and when to stop; the test set never does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from se_prune import distributed
from se_prune.data.source import shared_batches
from se_prune.device import inference_batch
from se_prune.errors import DataError
from se_prune.records import Preprocessing

if TYPE_CHECKING:
    from se_prune.data import Split


def hold_out(split: Split, share: float, seed: int) -> tuple[Split, Split]:
    """Split images into those that are trained on and those held out: `share` of every class, chosen by `seed`.

    Raises:
        DataError: No image would be held out, or none would be left.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(split), generator=generator)
    labels = split.labels[order]
    held = torch.zeros(len(split), dtype=torch.bool)
    for label in torch.unique(labels):
        of_class = torch.nonzero(labels == label).flatten()
        held[order[of_class[: round(share * len(of_class))]]] = True
    count = int(held.sum())
    if not 0 < count < len(split):
        raise DataError(
            f"held_out = {share} holds out {count} of {len(split)} training images; choose another share."
        )
    return split.take(torch.nonzero(~held).flatten()), split.take(torch.nonzero(held).flatten())


@torch.no_grad()
def top1(model: nn.Module, split: Split, preprocessing: Preprocessing, device: torch.device) -> float:
    """Return the share of readable images that the network, in eval mode, gets right; its mode is put back.

    Several processes share the images.
    """
    training = model.training
    model.eval()
    right, seen = torch.zeros((), dtype=torch.long, device=device), 0
    for images, labels in shared_batches(split, inference_batch(device), preprocessing):
        logits = model(images.to(device, non_blocking=True))
        right += (logits.argmax(1) == labels.to(device, non_blocking=True)).sum()
        seen += len(labels)
    model.train(training)
    sums = torch.tensor([int(right), seen])
    distributed.add_up(sums)
    return int(sums[0]) / max(1, int(sums[1]))
