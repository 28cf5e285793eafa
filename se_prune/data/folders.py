"""Images on a disk, decoded on demand by worker processes: folders, shards, and the data sets of libraries.

What a batch holds depends on seed, epoch and settings alone, whatever the number of workers: the random numbers of each
image are its own. Shapes: N images, C channels, H×W positions.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset

from se_prune import distributed
from se_prune.data.batches import Batch
from se_prune.data.raw import BROKEN, VALIDATION_NAMES, FileImages, RawImages, decoded
from se_prune.data.unreadable import Unreadable
from se_prune.errors import DataError
from se_prune.records import Preprocessing
from se_prune.settings import MAX_BAD_IMAGES, TrainSettings

#: Worker processes at most, unless told otherwise.
MOST_WORKERS = 8
#: Shards whose images are shuffled together: enough to mix, few enough to be read about once.
SHARDS_TOGETHER = 16


def default_workers() -> int:
    """Return a worker per core, at most `MOST_WORKERS`; the processes of torchrun share a machine's cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    sharing = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return min(MOST_WORKERS, max(1, cores // max(1, int(sharing) if sharing.isdigit() else 1)))


@dataclass(frozen=True, slots=True)
class _Read:
    """One image (C, H, W), or None and the reason why it cannot be read."""

    index: int
    label: int
    image: torch.Tensor | None
    name: str = ""
    reason: str = ""


@dataclass(slots=True)
class _Transformed(Dataset[_Read]):
    source: RawImages
    labels: torch.Tensor
    transform: Any
    seed: tuple[int, int] | None
    skipped: frozenset[int]

    def __getitem__(self, index: int) -> _Read:
        label = int(self.labels[index])
        if index in self.skipped:
            return _Read(index, label, None)
        try:
            picture = decoded(self.source.image(index), self.transform.mode)
        except BROKEN as error:
            return _Read(index, label, None, self.source.name(index), _reason(error))
        with _own_randomness(self.seed, index):
            return _Read(index, label, self.transform(picture))


def _reason(error: BaseException) -> str:
    """Return an error in one line, without the path or the address that Pillow adds."""
    if isinstance(error, UnidentifiedImageError):
        return "no image of a known kind"
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def _own_randomness(seed: tuple[int, int] | None, index: int) -> Iterator[None]:
    """Seed the generators that transforms draw from with seed, epoch and image; put them back afterwards."""
    if seed is None:
        yield
        return
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = np.random.SeedSequence([seed[0] % 2**63, seed[1], index]).generate_state(2)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.default_generator.manual_seed(int(words[0]) << 31 ^ int(words[1]))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class _Transform:
    """timm's evaluation or training transform for one input size, with the image mode it needs."""

    def __init__(self, preprocessing: Preprocessing, settings: TrainSettings | None) -> None:
        from timm.data import create_transform

        channels = preprocessing.input_size[0]
        self.mode = "L" if channels == 1 else "RGB"
        training: dict[str, Any] = (
            {} if settings is None else {"hflip": settings.flip, "re_prob": settings.erase}
        )
        if settings is not None and settings.rand_augment > 0:
            strength, count = settings.rand_augment_magnitude, settings.rand_augment
            training["auto_augment"] = f"rand-m{strength}-n{count}-mstd0.5-inc1"
        self.inner = create_transform(
            preprocessing.input_size,
            is_training=settings is not None,
            mean=preprocessing.mean,
            std=preprocessing.std,
            color_jitter=None,
            **training,
        )

    def __call__(self, image: Any) -> torch.Tensor:
        result: torch.Tensor = self.inner(image)
        return result


Loaded = tuple[torch.Tensor | None, torch.Tensor, list[_Read]]


def _left_out(reads: Sequence[_Read]) -> Loaded:
    """Stack the images that could be read; the others come as a list."""
    good = [(read.image, read.label) for read in reads if read.image is not None]
    images = torch.stack([image for image, _ in good]) if good else None
    return images, torch.tensor([label for _, label in good]), [r for r in reads if r.image is None]


def _replaced(reads: Sequence[_Read]) -> Loaded:
    """Stack the images with the next one that could be read in the place of one that could not."""
    good = [read for read in reads if read.image is not None]
    if not good:
        return None, torch.zeros(0, dtype=torch.long), list(reads)
    following = [next((r for r in reads[i:] if r.image is not None), good[0]) for i in range(len(reads))]
    images = torch.stack([read.image for read in following if read.image is not None])
    return images, torch.tensor([r.label for r in following]), [r for r in reads if r.image is None]


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderImages:
    """Images decoded on demand; `indices` (N,) are their numbers in the source, in the order in which they are read."""

    source: RawImages
    indices: torch.Tensor
    workers: int
    unreadable: Unreadable

    @classmethod
    def of(
        cls, source: RawImages, *, workers: int | None = None, max_bad_images: float = MAX_BAD_IMAGES
    ) -> FolderImages:
        """Return all images of a source, in its order."""
        count = len(source.labels)
        return cls(
            source=source,
            indices=torch.arange(count),
            workers=default_workers() if workers is None else workers,
            unreadable=Unreadable.of(count, max_bad_images),
        )

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of the labels."""
        return self.source.classes

    @property
    def labels(self) -> torch.Tensor:
        """Labels (N,)."""
        return self.source.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def take(self, indices: torch.Tensor) -> FolderImages:
        """Return the images at `indices`, in that order."""
        return replace(self, indices=self.indices[indices])

    def readable(self, positions: torch.Tensor) -> torch.Tensor:
        """Return those of `positions` (K,) whose images no pass so far has left out."""
        found = self.unreadable.found
        keep = [int(self.indices[p]) not in found for p in positions.tolist()]
        return positions[torch.tensor(keep, dtype=torch.bool)]

    def batches(self, batch_size: int, preprocessing: Preprocessing) -> Iterator[Batch]:
        """Yield batches in order with timm's evaluation transform; images that cannot be read are left out of theirs.

        Raises:
            DataError: More images than allowed, or all of a batch that is not the last, cannot be read.
        """
        data = self._transformed(preprocessing, None, None)
        places = _parts(self.indices, batch_size)
        yield from self._loaded(data, places, _left_out)

    def training_batches(
        self, settings: TrainSettings, preprocessing: Preprocessing, *, seed: int, epoch: int
    ) -> Iterator[Batch]:
        """Yield one epoch of shuffled full batches, or this process's share of each, with timm's training transform.

        Shards are shuffled, and then the images of a few shards at a time. In the place of an image that cannot be read
        stands the next one of its batch, or of the share.

        Raises:
            DataError: More images than allowed, or all of a batch, cannot be read.
        """
        data = self._transformed(preprocessing, settings, (seed, epoch))
        order = self.indices[self.order(seed, epoch)]
        size = min(settings.batch_size, len(self))
        mine = distributed.share_of_batch(size).tolist()
        places = [[part[i] for i in mine] for part in _parts(order, size) if len(part) == size]
        yield from self._loaded(data, places, _replaced)

    def order(self, seed: int, epoch: int) -> torch.Tensor:
        """Return the order (N,) in which an epoch reads the images."""
        generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
        if self.source.shards is None:
            return torch.randperm(len(self), generator=generator)
        shards = self.source.shards[self.indices]
        present = torch.unique(shards)
        place = torch.zeros(int(present.max()) + 1, dtype=torch.long)
        place[present] = torch.randperm(len(present), generator=generator)
        window = place[shards] // SHARDS_TOGETHER
        mixed = torch.randperm(len(self), generator=generator)
        return mixed[torch.sort(window[mixed], stable=True).indices]

    def _transformed(
        self, preprocessing: Preprocessing, settings: TrainSettings | None, seed: tuple[int, int] | None
    ) -> _Transformed:
        return _Transformed(
            self.source,
            self.source.labels,
            _Transform(preprocessing, settings),
            seed,
            frozenset(self.unreadable.found),
        )

    def _loaded(self, data: _Transformed, places: list[list[int]], collate: Any) -> Iterator[Batch]:
        """Yield the images at `places`, one list a batch, and note those that cannot be read."""
        known = len(self.unreadable.found)
        loader: DataLoader[Any] = DataLoader(
            data,
            batch_sampler=places,
            collate_fn=collate,
            num_workers=min(self.workers, len(places)) if len(places) > 1 else 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_leave_interrupts,
            generator=torch.Generator().manual_seed(0),  # else torch's own state would be drawn from
        )
        try:
            for number, (images, labels, failed) in enumerate(loader):
                for read in failed:
                    self.unreadable.add(read.index, read.name, read.reason)
                if images is not None:
                    yield images, labels
                elif number < len(places) - 1:
                    raise DataError(
                        f"no image of a whole batch can be read: {self.unreadable.listed()}; check the disk."
                    )
        finally:
            self.unreadable.warn(known)


def _leave_interrupts(_: int) -> None:
    """Let the process that reads the batches decide what Ctrl-C, which its workers receive as well, does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _parts(values: torch.Tensor, size: int) -> list[list[int]]:
    """Return numbers in lists of `size`; the last may be shorter."""
    whole: list[int] = values.tolist()
    return [whole[start : start + size] for start in range(0, len(whole), size)]


def open_folders(folder: Path) -> tuple[FileImages, FileImages]:
    """Open `train/` and `val/` below a folder.

    Raises:
        DataError: One of them is missing or has no image.
    """
    val = next((name for name in ("val", *VALIDATION_NAMES) if (folder / name).is_dir()), None)
    if not (folder / "train").is_dir() or val is None:
        raise DataError(
            f"{folder} holds no data set: it needs train/CLASS/… and val/CLASS/…, the shards train-0000.tar, … and "
            "val-0000.tar, …, or the four idx files."
        )
    return FileImages.scan(folder / "train"), FileImages.scan(folder / val)
