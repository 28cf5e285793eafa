"""Mixup and CutMix through timm, as a pure function of the seed and the step.

Shapes: N images, K classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch

from se_prune.errors import UsageError
from se_prune.settings import TrainSettings


class Mixing:
    """Mixes each image of a batch with another, and its label with the other's (Zhang 2018, Yun 2019)."""

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


def require_pairs(settings: TrainSettings, images: int) -> None:
    """Check that batches can be mixed.

    Raises:
        UsageError: A batch has an odd number of images.
    """
    size = min(settings.batch_size, images)
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
