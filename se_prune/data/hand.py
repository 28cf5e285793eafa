"""Images that a caller has in hand: batches of a loader, preprocessed already.

Shapes: N images, C channels, H×W positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from se_prune.data.batches import Batch
from se_prune.errors import DataError, UsageError
from se_prune.records import Preprocessing
from se_prune.settings import TrainSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class HandImages:
    """Float images (N, C, H, W) as the network wants them, with labels (N,), in memory."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: torch.Tensor) -> HandImages:
        """Return the images at `indices`, in that order."""
        return HandImages(images=self.images[indices], labels=self.labels[indices])

    def batches(self, batch_size: int, preprocessing: Preprocessing) -> Iterator[Batch]:
        """Yield (images, labels) in order, as they are."""
        del preprocessing
        for start in range(0, len(self), batch_size):
            part = slice(start, start + batch_size)
            yield self.images[part], self.labels[part]

    def training_batches(
        self, settings: TrainSettings, preprocessing: Preprocessing, *, seed: int, epoch: int
    ) -> Iterator[Batch]:
        """Refuse: images that are preprocessed already cannot be augmented.

        Raises:
            UsageError: Always.
        """
        del settings, preprocessing, seed, epoch
        raise UsageError(
            "images in hand serve analysis and repair; train with your own loop, or with open_data."
        )


def read_batches(batches: Iterable[Any], limit: int) -> tuple[HandImages, bool]:
    """Read up to `limit` images from an iterable of (images, labels) or of images alone.

    Returns:
        The images, and whether they had labels (0 stands in for those that are missing).

    Raises:
        DataError: There is no image, the batches are of another kind, their sizes differ, or values are no floats or
            not finite.
    """
    images: list[torch.Tensor] = []
    labels: list[torch.Tensor] = []
    labelled, count = True, 0
    for batch in batches:
        pair = list(batch) if isinstance(batch, list | tuple) else [batch]
        part = _images(pair[0] if pair else batch)
        if images and part.shape[1:] != images[0].shape[1:]:
            raise DataError(
                f"all images must have one size, got {tuple(images[0].shape[1:])} and {tuple(part.shape[1:])}."
            )
        given = pair[1] if len(pair) > 1 else None
        if isinstance(given, torch.Tensor) and given.shape == (len(part),) and not given.is_floating_point():
            labels.append(given.detach().cpu().long())
        else:
            labelled = False
            labels.append(torch.zeros(len(part), dtype=torch.long))
        images.append(part)
        count += len(part)
        if count >= limit:
            break
    if count == 0:
        raise DataError("there are no images; give a loader that yields at least one batch.")
    return HandImages(images=torch.cat(images)[:limit], labels=torch.cat(labels)[:limit]), labelled


def _images(given: object) -> torch.Tensor:
    """Return a batch's images on the CPU in float32."""
    if not isinstance(given, torch.Tensor) or given.ndim != 4:
        shape = f" of shape {tuple(given.shape)}" if isinstance(given, torch.Tensor) else ""
        raise DataError(
            "each batch must be a tensor of images (N, C, H, W), or a pair of it and labels (N,), "
            f"got {type(given).__name__}{shape}; a tensor of all images goes in a list."
        )
    if not given.is_floating_point():
        raise DataError(
            f"images must be floats, normalised as the network was trained, got {given.dtype}; "
            "give the batches that its training took."
        )
    part = given.detach().cpu().float()
    if not bool(torch.isfinite(part).all()):
        raise DataError(
            "the images hold NaN or infinite values; leave those out, or mend their preprocessing."
        )
    return part
