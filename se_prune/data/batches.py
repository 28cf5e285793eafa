"""Batches of images held in memory: preprocessing and augmentation on whole batches of bytes.

Shapes: N images, C channels, H×W positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from se_prune import distributed
from se_prune.errors import UsageError
from se_prune.records import Preprocessing
from se_prune.settings import TrainSettings

Batch = tuple[torch.Tensor, torch.Tensor]
#: Strengths of RandAugment: 0 to 10, as timm counts them.
MAGNITUDES = 11


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorImages:
    """Images (N, C, H, W) as bytes with labels (N,), all in memory."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: torch.Tensor) -> TensorImages:
        """Return the images at `indices`, in that order."""
        return TensorImages(images=self.images[indices], labels=self.labels[indices])

    def batches(self, batch_size: int, preprocessing: Preprocessing) -> Iterator[Batch]:
        """Yield float batches in order, without augmentation."""
        for start in range(0, len(self), batch_size):
            part = slice(start, start + batch_size)
            yield normalise(self.images[part], preprocessing), self.labels[part]

    def training_batches(
        self, settings: TrainSettings, preprocessing: Preprocessing, *, seed: int, epoch: int
    ) -> Iterator[Batch]:
        """Yield one epoch of shuffled, augmented full batches; the same for the same seed and epoch.

        Of several processes each yields its share of every batch, the same images as in one process.
        """
        generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
        order = torch.randperm(len(self), generator=generator)
        size = min(settings.batch_size, len(self))
        mine = distributed.share_of_batch(size)
        for start in range(0, len(self) - size + 1, size):
            chosen = order[start : start + size][mine]
            images = augment(self.images[chosen], settings, generator, mine=mine, whole=size)
            yield normalise(images, preprocessing), self.labels[chosen]


def normalise(images: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """Bytes (N, C, H, W) to the network's input: [0, 1], resized, channels matched, mean and std."""
    channels, height, width = preprocessing.input_size
    x = images.to(torch.float32).div_(255)
    if x.shape[-2:] != (height, width):
        x = F.interpolate(x, size=(height, width), mode="bilinear", antialias=True, align_corners=False)
    if x.shape[1] != channels:
        x = x.mean(1, keepdim=True).expand(-1, channels, -1, -1)
    mean = torch.tensor(preprocessing.mean).view(1, -1, 1, 1)
    std = torch.tensor(preprocessing.std).view(1, -1, 1, 1)
    return (x - mean) / std


def augment(
    images: torch.Tensor,
    settings: TrainSettings,
    generator: torch.Generator,
    *,
    mine: torch.Tensor | None = None,
    whole: int | None = None,
) -> torch.Tensor:
    """RandAugment (Cubuk et al. 2020), random shift (zero padding), horizontal flip, erasing (Zhong et al. 2017).

    Args:
        images: Images of bytes (n, C, H, W).
        settings: What is done to them.
        generator: Gives the numbers of a whole batch, so that they are the same for any number of processes.
        mine: The places (n,) of the images in the batch; all where None.
        whole: The images of the batch.

    Raises:
        UsageError: RandAugment of images that are neither grey nor RGB.
    """
    whole = len(images) if whole is None else whole
    mine = torch.arange(whole) if mine is None else mine
    if settings.rand_augment > 0:
        images = _rand_augment(images, settings, torch.randint(0, 2**31, (whole,), generator=generator)[mine])
    n, _, height, width = images.shape
    rows = torch.arange(height).expand(n, height)
    columns = torch.arange(width).expand(n, width)
    if settings.flip > 0:
        flipped = (torch.rand(whole, generator=generator) < settings.flip)[mine]
        columns = torch.where(flipped[:, None], columns.flip(1), columns)
    pad = settings.crop_padding
    if pad > 0:
        images = F.pad(images, (pad, pad, pad, pad))
        rows = rows + torch.randint(0, 2 * pad + 1, (whole, 1), generator=generator)[mine]
        columns = columns + torch.randint(0, 2 * pad + 1, (whole, 1), generator=generator)[mine]
    picked = images[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    images = picked.permute(0, 3, 1, 2)
    return _erase(images, settings.erase, generator, mine, whole) if settings.erase > 0 else images


def _rand_augment(images: torch.Tensor, settings: TrainSettings, seeds: torch.Tensor) -> torch.Tensor:
    """Change each image (C, H, W) of bytes by operations of its own; torchvision draws from the global generator."""
    if images.shape[1] not in {1, 3}:
        raise UsageError(
            f"rand_augment needs grey or RGB images, and these have {images.shape[1]} channels; set it to 0."
        )
    from torchvision.transforms import v2

    change = v2.RandAugment(
        num_ops=settings.rand_augment,
        magnitude=settings.rand_augment_magnitude,
        num_magnitude_bins=MAGNITUDES,
    )
    changed = []
    with torch.random.fork_rng([]):
        for image, seed in zip(images, seeds.tolist(), strict=True):
            torch.default_generator.manual_seed(seed)
            changed.append(change(image))
    return torch.stack(changed)


def _erase(
    images: torch.Tensor, probability: float, generator: torch.Generator, mine: torch.Tensor, whole: int
) -> torch.Tensor:
    height, width = images.shape[2:]
    area = torch.empty(whole).uniform_(0.02, 0.25, generator=generator) * height * width
    aspect = torch.empty(whole).uniform_(-1.2, 1.2, generator=generator).exp()
    h = (area * aspect).sqrt().clamp(1, height).long()
    w = (area / aspect).sqrt().clamp(1, width).long()
    top = (torch.rand(whole, generator=generator) * (height - h + 1)).long()
    left = (torch.rand(whole, generator=generator) * (width - w + 1)).long()
    y, x = torch.arange(height), torch.arange(width)
    inside_y = (y >= top[:, None]) & (y < (top + h)[:, None])
    inside_x = (x >= left[:, None]) & (x < (left + w)[:, None])
    hit = torch.rand(whole, generator=generator) < probability
    mask = (inside_y[:, :, None] & inside_x[:, None, :] & hit[:, None, None])[mine, None]
    noise = torch.randint(0, 256, (whole, *images.shape[1:]), dtype=torch.uint8, generator=generator)
    return torch.where(mask, noise[mine], images)
