"""`--data` references to splits of images.

Training images serve analysis, scores, repair and fine-tuning; the test split is read by evaluation alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from se_prune import distributed
from se_prune.data import idx
from se_prune.data.batches import Batch, TensorImages
from se_prune.data.folders import FolderImages, open_folders
from se_prune.data.raw import VALIDATION_NAMES, RawImages, as_tensors, open_hugging_face, open_torchvision
from se_prune.data.shards import has_shards, open_shards
from se_prune.errors import DataError, UsageError
from se_prune.records import Preprocessing
from se_prune.settings import MAX_BAD_IMAGES, TrainSettings

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
        """Yield one epoch of shuffled, augmented full batches; of several processes each yields its share of them."""
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
        """The reference as it may stand in files that travel."""
        return reference_name(self.ref)


def reference_name(ref: str) -> str:
    """Return a reference without the path of a folder."""
    folder = Path(ref)
    if folder.is_dir():
        return folder.resolve().name
    scheme, _, rest = ref.partition("/")
    if scheme == "wds" or (scheme == "hfds" and Path(rest).is_absolute()):
        return f"{scheme}/{Path(rest).name}"
    return ref.partition("@")[0]


def open_data(ref: str, *, workers: int | None = None, max_bad_images: float | None = None) -> DataSource:
    """Open a data set by reference.

    Args:
        ref: `fashion-mnist` (the bundled part); a folder with the four idx files (Fashion-MNIST's, or of the classes
            that a `classes.txt` there names, one a line), in `train/CLASS/…` + `val/CLASS/…` form, or with webdataset
            shards (also `wds/FOLDER`); `torch/NAME` or `hfds/NAME` as timm opens them, with `@FOLDER` for where
            they lie.
        workers: Processes that decode images; a core each, at most 8, where None. 0 decodes in this process.
        max_bad_images: How many images of a split may be unreadable and are left out: a share below 1, a number from
            1 on; `MAX_BAD_IMAGES` where None.

    Raises:
        DataError: Nothing is there, a split is empty, or a file is broken.
        UsageError: `workers` or `max_bad_images` is negative.
    """
    if max_bad_images is None:
        max_bad_images = MAX_BAD_IMAGES
    if (workers is not None and workers < 0) or not max_bad_images >= 0:
        raise UsageError(f"workers and max-bad-images must be 0 or more, got {workers} and {max_bad_images}.")
    if ref == FASHION_MNIST:
        return _arrays(ref, ("train-12k", "t10k"), idx.BUNDLED, idx.CLASSES, FASHION_PREPROCESSING)
    with distributed.first_here():  # one process of a machine downloads, or reads the headers of shards
        opened = _opened(ref)
    if isinstance(opened, DataSource):
        return opened
    train, test = (
        FolderImages.of(source, workers=workers, max_bad_images=max_bad_images) for source in opened
    )
    return _images(ref, train, test)


def _opened(ref: str) -> DataSource | tuple[RawImages, RawImages]:
    """Return the two splits of a reference; in-memory sets as a whole data set."""
    folder = Path(ref)
    if folder.is_dir():
        if idx.find_pair(folder, "train"):
            return _idx(ref, folder)
        return open_shards(folder) if has_shards(folder) else open_folders(folder)
    scheme, _, rest = ref.partition("/")
    if scheme == "wds" and rest:
        return open_shards(Path(rest))
    name, _, root = ref.partition("@")
    if scheme == "torch" and rest:
        return _torchvision(ref, name, root or ".")
    if scheme == "hfds" and rest:
        return open_hugging_face(name, root or None, ("train",)), open_hugging_face(
            name, root or None, VALIDATION_NAMES
        )
    raise DataError(
        f"no data at '{ref}': give '{FASHION_MNIST}', a folder with train/CLASS/… and val/CLASS/…, a folder with "
        "webdataset shards or the four idx files, or a timm scheme such as torch/cifar10 or hfds/NAME."
    )


def _torchvision(ref: str, name: str, root: str) -> DataSource | tuple[RawImages, RawImages]:
    """Open a set of torchvision: those that it holds as arrays in memory, the others decoded on demand."""
    train, test = (open_torchvision(name, root, split) for split in ("train", "validation"))
    arrays = [as_tensors(opened.source) for opened in (train, test)]
    if any(images is None for images in arrays):
        return train, test
    splits = [
        TensorImages(images=images, labels=opened.labels)
        for images, opened in zip(arrays, (train, test), strict=True)
        if images is not None
    ]
    data = _images(ref, splits[0], splits[1], classes=(train.classes, test.classes))
    return replace(data, preprocessing=_own_preprocessing(splits[0].images))


def _own_preprocessing(images: torch.Tensor) -> Preprocessing:
    """Return the size of images (N, C, H, W) of bytes, and their mean and deviation per channel."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    shares = [
        torch.bincount(images[:, c].flatten(), minlength=256) / images[:, c].numel()
        for c in range(images.shape[1])
    ]
    means = [float((share * levels).sum()) for share in shares]
    variances = [float((s * (levels - m) ** 2).sum()) for s, m in zip(shares, means, strict=True)]
    channels, height, width = images.shape[1:]
    return Preprocessing(
        input_size=(channels, height, width),
        mean=tuple(round(m, 4) for m in means),
        std=tuple(round(max(v, 1e-8) ** 0.5, 4) for v in variances),
    )


def _idx(ref: str, folder: Path) -> DataSource:
    """Open four idx files: Fashion-MNIST, or the classes that `classes.txt` beside them names."""
    names = idx.read_classes(folder)
    if names is None:
        return _arrays(ref, ("train", "t10k"), folder, idx.CLASSES, FASHION_PREPROCESSING)
    return _arrays(ref, ("train", "t10k"), folder, names, None)


def _arrays(
    ref: str,
    prefixes: tuple[str, str],
    folder: Path,
    classes: tuple[str, ...],
    preprocessing: Preprocessing | None,
) -> DataSource:
    """Open idx files; where no preprocessing is given it is that of the training images."""
    splits = []
    for prefix in prefixes:
        pair = idx.find_pair(folder, prefix)
        if pair is None:
            raise DataError(
                f"{folder} has no {prefix}-images-idx3-ubyte with its labels; give all four idx files."
            )
        images, labels = idx.read_pair(*pair)
        if labels.max() >= len(classes):
            raise DataError(
                f"{pair[1]} has label {int(labels.max())}, but there are {len(classes)} classes (Fashion-MNIST's ten, "
                f"unless {idx.NAMES} beside the files names others, one a line)."
            )
        splits.append(TensorImages(images=images, labels=labels))
    return DataSource(
        ref=ref,
        classes=classes,
        train=splits[0],
        test=splits[1],
        preprocessing=preprocessing or _own_preprocessing(splits[0].images),
    )


def _images(
    ref: str, train: Any, test: Any, *, classes: tuple[tuple[str, ...], tuple[str, ...]] | None = None
) -> DataSource:
    first, second = classes or (train.classes, test.classes)
    if first != second:
        differ = sorted(set(first) ^ set(second))[:3] or ["in another order"]
        raise DataError(
            f"{ref}: train and val have different classes ({', '.join(differ)} …); make them equal."
        )
    for name, split in (("training", train), ("validation", test)):
        if len(split) == 0:
            raise DataError(f"{ref} has no {name} images.")
        if int(split.labels.max()) >= len(first) or int(split.labels.min()) < 0:
            raise DataError(
                f"{ref}: {name} images have labels from {int(split.labels.min())} to {int(split.labels.max())}, but "
                f"there are {len(first)} classes; images without a label (-1) cannot be used."
            )
    return DataSource(ref=ref, classes=first, train=train, test=test)


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


def shared_batches(split: Split, batch_size: int, preprocessing: Preprocessing) -> Iterator[Batch]:
    """Yield this process's share of a split's batches, each as one process would make it.

    When it ends, every process knows the images that any of them could not read.

    Raises:
        DataError: More images than allowed cannot be read.
    """
    mine = split.take(distributed.share(len(split), batch_size)) if distributed.size() > 1 else split
    yield from mine.batches(batch_size, preprocessing)
    share_unreadable(split)


def share_unreadable(split: Split) -> None:
    """Tell all processes which images of a split each of them could not read.

    Raises:
        DataError: Together they are more than allowed.
    """
    inner = split.split if isinstance(split, ClassSplit) else split
    if distributed.size() > 1 and isinstance(inner, FolderImages):
        inner.unreadable.merge(distributed.gather(list(inner.unreadable.found.items())))


def readable(split: Split, positions: torch.Tensor) -> torch.Tensor:
    """Return those of `positions` (K,) in a split whose images no pass so far has left out as unreadable."""
    inner = split.split if isinstance(split, ClassSplit) else split
    return inner.readable(positions) if isinstance(inner, FolderImages) else positions


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
