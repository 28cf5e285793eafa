"""`--data` references to splits of images.

Training images serve analysis, scores, repair and fine-tuning; the test split is read by evaluation alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from se_prune.data import idx
from se_prune.data.batches import Batch, TensorImages
from se_prune.data.folders import FolderImages
from se_prune.errors import DataError
from se_prune.records import Preprocessing, TrainSettings

FASHION_MNIST = "fashion-mnist"
FASHION_PREPROCESSING = Preprocessing(input_size=(1, 28, 28), mean=(0.2860,), std=(0.3530,))


class Split(Protocol):
    """Images with labels that can be read in batches."""

    @property
    def labels(self) -> torch.Tensor:
        """Labels (N,) as int64."""
        ...

    def __len__(self) -> int: ...

    def take(self, indices: torch.Tensor) -> Split:
        """Return the images at `indices`, in that order."""
        ...

    def batches(self, batch_size: int, preprocessing: Preprocessing) -> Iterator[Batch]:
        """Yield (images, labels) in order, without augmentation."""
        ...

    def training_batches(
        self, settings: TrainSettings, preprocessing: Preprocessing, *, seed: int, epoch: int
    ) -> Iterator[Batch]:
        """Yield one epoch of shuffled, augmented full batches."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSource:
    """A data set: its reference, class names, the two splits, and its own preprocessing where it has one."""

    ref: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    preprocessing: Preprocessing | None = None

    @property
    def name(self) -> str:
        """The reference without the path of a folder: what may stand in files that travel."""
        folder = Path(self.ref)
        return folder.resolve().name if folder.is_dir() else self.ref


def open_data(ref: str) -> DataSource:
    """Open a data set by reference.

    Args:
        ref: `fashion-mnist` (the bundled part), a folder with the four idx files, a folder in
            `train/CLASS/…` + `val/CLASS/…` form, or any scheme of `timm.data.create_dataset`.

    Raises:
        DataError: Nothing is there, a split is empty, or a file is broken.
    """
    if ref == FASHION_MNIST:
        return _fashion(ref, ("train-12k", "t10k"), idx.BUNDLED)
    folder = Path(ref)
    if folder.is_dir():
        if idx.find_pair(folder, "train"):
            return _fashion(ref, ("train", "t10k"), folder)
        return _images(ref, *FolderImages.open_pair(folder))
    if "/" in ref and not folder.is_absolute() and not ref.startswith("."):
        return _images(ref, *FolderImages.open_scheme(ref))
    raise DataError(
        f"no data at '{ref}': give '{FASHION_MNIST}', a folder with train/CLASS/… and val/CLASS/…, "
        "a folder with the four idx files, or a timm scheme such as torch/cifar10."
    )


def _fashion(ref: str, prefixes: tuple[str, str], folder: Path) -> DataSource:
    splits = []
    for prefix in prefixes:
        pair = idx.find_pair(folder, prefix)
        if pair is None:
            raise DataError(
                f"{folder} has no {prefix}-images-idx3-ubyte with its labels; give all four idx files."
            )
        images, labels = idx.read_pair(*pair)
        if labels.max() >= len(idx.CLASSES):
            raise DataError(f"{pair[1]} has label {int(labels.max())}; Fashion-MNIST has ten classes.")
        splits.append(TensorImages(images=images, labels=labels))
    return DataSource(
        ref=ref, classes=idx.CLASSES, train=splits[0], test=splits[1], preprocessing=FASHION_PREPROCESSING
    )


def _images(ref: str, train: Any, test: Any) -> DataSource:
    if train.classes != test.classes:
        differ = sorted(set(train.classes) ^ set(test.classes))[:3]
        raise DataError(
            f"{ref}: train and val have different classes ({', '.join(differ)} …); make them equal."
        )
    return DataSource(ref=ref, classes=train.classes, train=train, test=test)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassSplit:
    """Some images of a split with their classes numbered anew: `number` (K,) holds the new class of each old one."""

    split: Split
    number: torch.Tensor

    @property
    def labels(self) -> torch.Tensor:
        """New labels (N,)."""
        return self.number[self.split.labels]

    def __len__(self) -> int:
        return len(self.split)

    def take(self, indices: torch.Tensor) -> ClassSplit:
        """Return the images at `indices`, in that order."""
        return ClassSplit(split=self.split.take(indices), number=self.number)

    def batches(self, batch_size: int, preprocessing: Preprocessing) -> Iterator[Batch]:
        """Yield (images, labels) in order, without augmentation."""
        for images, labels in self.split.batches(batch_size, preprocessing):
            yield images, self.number[labels]

    def training_batches(
        self, settings: TrainSettings, preprocessing: Preprocessing, *, seed: int, epoch: int
    ) -> Iterator[Batch]:
        """Yield one epoch of shuffled, augmented full batches."""
        for images, labels in self.split.training_batches(settings, preprocessing, seed=seed, epoch=epoch):
            yield images, self.number[labels]


def of_classes(data: DataSource, kept: Sequence[int]) -> DataSource:
    """Return the images of some classes, which are numbered 0 to k - 1 in the order of `kept`."""
    number = torch.full((len(data.classes),), -1)
    number[list(kept)] = torch.arange(len(kept))

    def part(split: Split) -> Split:
        chosen = split.take(torch.nonzero(number[split.labels] >= 0).flatten())
        if isinstance(chosen, TensorImages):
            return TensorImages(images=chosen.images, labels=number[chosen.labels])
        return ClassSplit(split=chosen, number=number)

    return DataSource(
        ref=data.ref,
        classes=tuple(data.classes[i] for i in kept),
        train=part(data.train),
        test=part(data.test),
        preprocessing=data.preprocessing,
    )


def balanced_subset(split: Split, count: int, seed: int) -> Split:
    """Return `count` images spread evenly over the classes, chosen by `seed`; all of them if fewer are there."""
    if count >= len(split):
        return split
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(split), generator=generator)
    labels = split.labels[order]
    rank = torch.zeros(len(labels), dtype=torch.long)
    for label in torch.unique(labels):
        mask = labels == label
        rank[mask] = torch.arange(int(mask.sum()))
    chosen = torch.sort(rank, stable=True).indices[:count]
    return split.take(order[chosen])
