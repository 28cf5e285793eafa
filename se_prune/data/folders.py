"""Images in folders, and every data set that timm's readers open."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Subset

from se_prune.data.batches import Batch
from se_prune.errors import DataError
from se_prune.records import Preprocessing, TrainSettings

VALIDATION_NAMES = ("val", "validation", "test")


@dataclass(slots=True)
class _Transformed(Dataset[tuple[torch.Tensor, int]]):
    source: Any
    indices: torch.Tensor | None
    transform: Any

    def __len__(self) -> int:
        return len(self.source) if self.indices is None else len(self.indices)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        where = index if self.indices is None else int(self.indices[index])
        try:
            image, label = self.source[where]
            return self.transform(image.convert(self.transform.mode)), int(label)
        except (OSError, SyntaxError) as error:  # Pillow raises both for a broken file
            files = getattr(self.source, "samples", None)
            name = files[where][0] if files else f"image {where}"
            raise DataError(f"{name} cannot be read ({error}); copy it again or remove it.") from error


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


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderImages:
    """Images decoded on demand, in the order of their data set."""

    source: Any
    labels: torch.Tensor
    classes: tuple[str, ...]
    indices: torch.Tensor | None = None
    workers: int = 2

    @classmethod
    def open_pair(cls, folder: Path) -> tuple[FolderImages, FolderImages]:
        """Open `train/` and `val/` below a folder.

        Raises:
            DataError: One of them is missing or has no image.
        """
        val = next((name for name in VALIDATION_NAMES if (folder / name).is_dir()), None)
        if not (folder / "train").is_dir() or val is None:
            raise DataError(
                f"{folder} holds no data set: it needs train/CLASS/… and val/CLASS/…, or the four idx files."
            )
        return cls._folder(folder / "train"), cls._folder(folder / val)

    @classmethod
    def _folder(cls, folder: Path) -> FolderImages:
        from torchvision.datasets import ImageFolder

        try:
            source = ImageFolder(str(folder))
        except (FileNotFoundError, OSError) as error:
            first = str(error).splitlines()[0]
            raise DataError(f"{folder} has no images in class folders: {first}") from error
        return cls(source=source, labels=torch.tensor(source.targets), classes=tuple(source.classes))

    @classmethod
    def open_scheme(cls, ref: str) -> tuple[FolderImages, FolderImages]:
        """Open a scheme of `timm.data.create_dataset`, such as `torch/cifar10`, below the working folder.

        Raises:
            DataError: timm cannot open it.
        """
        from timm.data import create_dataset

        parts = []
        for split in ("train", "validation"):
            try:
                source = create_dataset(ref, root=".", split=split)
                labels = getattr(source, "targets", None)
                if labels is None:
                    labels = [int(source[i][1]) for i in range(len(source))]
            except Exception as error:
                raise DataError(f"timm cannot open '{ref}' ({split}): {error}.") from error
            targets = torch.as_tensor(labels)
            names = getattr(source, "classes", None) or [str(i) for i in range(int(targets.max()) + 1)]
            parts.append(cls(source=source, labels=targets, classes=tuple(map(str, names))))
        return parts[0], parts[1]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: torch.Tensor) -> FolderImages:
        """Return the images at `indices`, in that order."""
        inner = indices if self.indices is None else self.indices[indices]
        return FolderImages(
            source=self.source,
            labels=self.labels[indices],
            classes=self.classes,
            indices=inner,
            workers=self.workers,
        )

    def batches(self, batch_size: int, preprocessing: Preprocessing) -> Iterator[Batch]:
        """Yield batches in order with timm's evaluation transform."""
        data = _Transformed(self.source, self.indices, _Transform(preprocessing, None))
        yield from _loaded(DataLoader(data, batch_size=batch_size, num_workers=self.workers))

    def training_batches(
        self, settings: TrainSettings, preprocessing: Preprocessing, *, seed: int, epoch: int
    ) -> Iterator[Batch]:
        """Yield one epoch of shuffled full batches with timm's training transform."""
        generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
        data = _Transformed(self.source, self.indices, _Transform(preprocessing, settings))
        order = torch.randperm(len(self), generator=generator).tolist()
        loader = DataLoader(
            Subset(data, order),
            batch_size=min(settings.batch_size, len(self)),
            num_workers=self.workers,
            drop_last=True,
            generator=generator,
        )
        yield from _loaded(loader)


def _loaded(loader: Any) -> Iterator[Batch]:
    """Yield batches; a worker's `DataError` arrives as its whole traceback, of which the last line is the sentence."""
    try:
        yield from loader
    except DataError as error:
        raise DataError(str(error).strip().rpartition("DataError: ")[2]) from error
