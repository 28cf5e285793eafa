"""Mixup and CutMix through timm, as a pure function of the seed and the step.

Shapes: N images, K classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from se_prune import distributed
from se_prune.errors import UsageError
from se_prune.records import Preprocessing
from se_prune.settings import TrainSettings


class Mixing:
    """Mixes each image of a batch with another, and its label with the other's (Zhang 2018, Yun 2019).

    The other is the one as far from the other end of the batch; a process's share of it holds both.
    """

    def __init__(self, settings: TrainSettings, classes: int, seed: int) -> None:
        from timm.data import Mixup

        self.seed = seed
        self.inner = Mixup(
            mixup_alpha=settings.mixup,
            cutmix_alpha=settings.cutmix,
            prob=settings.mix_prob,
            label_smoothing=settings.label_smoothing,
            num_classes=classes,
        )

    def __call__(
        self, images: torch.Tensor, labels: torch.Tensor, batch: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix images (N, C, H, W) in place; return them with smoothed targets (N, K). `batch` numbers the batch."""
        with _numpy_seeded(self.seed, batch):
            mixed, targets = self.inner(images, labels)
        return mixed, targets


@torch.no_grad()
def outputs(model: nn.Module, preprocessing: Preprocessing, device: torch.device) -> int:
    """Return how many classes a network in training mode has; its BN statistics stay as they are."""
    model.eval()
    outputs = model(torch.zeros(1, *preprocessing.input_size, device=device)).shape[1]
    model.train()
    return int(outputs)


def require_batches(settings: TrainSettings, images: int) -> None:
    """Check that batches can be shared by the processes, and mixed.

    Raises:
        UsageError: A batch cannot be shared equally, or a share is to be mixed and has an odd number of images.
    """
    size, sharing = min(settings.batch_size, images), distributed.size()
    pairs = bool(settings.mixup or settings.cutmix)
    if sharing > 1 and (size % sharing or (pairs and size // sharing % 2)):
        raise UsageError(
            f"{sharing} processes cannot share a batch of {size} images equally{' and in pairs' if pairs else ''}; "
            f"choose a batch_size that {sharing * (1 + pairs)} divides, of at most the {images} training images, or "
            "another number of processes."
        )
    if sharing > 1 and settings.sync_bn == "on" and settings.compile:
        raise UsageError('sync_bn = "on" cannot be compiled; set compile = false, or sync_bn = "off".')
    if (settings.mixup or settings.cutmix) and size % 2:
        raise UsageError(
            f"mixup and cutmix mix pairs, but a batch has {size} images; choose an even batch_size of at most {images}."
        )


@contextlib.contextmanager
def _numpy_seeded(seed: int, batch: int) -> Iterator[None]:
    """Give numpy's global generator, which timm draws from, a seed of its own for one batch."""
    before = np.random.get_state()
    np.random.seed([seed % 2**32, batch])
    try:
        yield
    finally:
        np.random.set_state(before)
