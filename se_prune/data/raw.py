"""Images by number before any preprocessing: files in class folders, torchvision's and Hugging Face's data sets.

EXIF orientation is not applied, as in torchvision and timm, whose networks were trained without it.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from PIL.Image import DecompressionBombError

from se_prune.errors import DataError, first_line

#: What Pillow and its decoders raise for files that are damaged, empty, or no images at all.
BROKEN = (
    OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, OverflowError, struct.error, zlib.error,
    DecompressionBombError,
)  # fmt: skip
VALIDATION_NAMES = ("validation", "val", "valid", "test")


class RawImages(Protocol):
    """N images that are decoded one at a time, by number."""

    @property
    def labels(self) -> torch.Tensor:
        """Labels (N,) as int64."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of the labels."""
        ...

    @property
    def shards(self) -> torch.Tensor | None:
        """The number of the file (N,) that holds each image, where many images share one."""
        ...

    def image(self, index: int) -> Image.Image:
        """Open one image; raises one of `BROKEN` where it cannot be read."""
        ...

    def name(self, index: int) -> str:
        """Return what a message calls the image."""
        ...


def decoded(image: Image.Image, mode: str) -> Image.Image:
    """Return an image of 8 bits in the mode `L` or `RGB`, from any mode that files have.

    16 bits are scaled to 8, where Pillow would cut them off. Transparency is dropped.

    Raises:
        ValueError: The pixels are floating-point numbers, whose range nothing tells.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on metadata, which is not read
        if image.mode == "F":
            raise ValueError("its pixels are floating-point numbers; save it with 8 or 16 bits")
        if image.mode == "I" or image.mode.startswith("I;"):
            wide = np.asarray(image).astype(np.int64).clip(0, 65535)
            image = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
        if image.mode in {"P", "PA", "LA"} and mode == "RGB":
            image = image.convert("RGBA")
        return image.convert(mode)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileImages:
    """Image files in class folders; other and hidden files are ignored."""

    paths: tuple[str, ...]
    labels: torch.Tensor
    classes: tuple[str, ...]
    shards: None = None

    @classmethod
    def scan(cls, folder: Path) -> FileImages:
        """Find the images below a folder, one subfolder a class, in the order of their names.

        Raises:
            DataError: There is no class folder, or one of them holds no image.
        """
        from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

        names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        if not names:
            raise DataError(f"{folder} has no images in class folders; put them in {folder.name}/CLASS/….")
        numbers = {name: number for number, name in enumerate(names)}
        found = make_dataset(
            str(folder), numbers, is_valid_file=lambda path: _is_image(path, IMG_EXTENSIONS), allow_empty=True
        )
        labels = torch.tensor([label for _, label in found], dtype=torch.long)
        empty = [name for name, n in zip(names, _counts(labels, len(names)), strict=True) if not n]
        if empty:
            raise DataError(
                f"{folder} has no images in class folders: {', '.join(empty[:3])}{' …' if len(empty) > 3 else ''}; "
                f"put images ({', '.join(IMG_EXTENSIONS)}) there, or remove the class from train and val."
            )
        return cls(paths=tuple(path for path, _ in found), labels=labels, classes=tuple(names))

    def image(self, index: int) -> Image.Image:
        """Open one image."""
        with Image.open(self.paths[index]) as image:
            image.load()
            return image

    def name(self, index: int) -> str:
        """Return its path."""
        return self.paths[index]


def _is_image(path: str, endings: Sequence[str]) -> bool:
    file = Path(path)
    return file.suffix.lower() in endings and not file.name.startswith(".")


def _counts(labels: torch.Tensor, classes: int) -> list[int]:
    return torch.bincount(labels, minlength=classes).tolist()


@dataclass(frozen=True, slots=True, kw_only=True)
class LibraryImages:
    """A data set of a library, whose items begin with a Pillow image or an open file."""

    source: Any
    title: str
    labels: torch.Tensor
    classes: tuple[str, ...]
    shards: None = None

    def image(self, index: int) -> Image.Image:
        """Open one image."""
        item = self.source[index][0]
        if isinstance(item, Image.Image):
            return item
        with item, Image.open(item) as image:
            image.load()
            return image

    def name(self, index: int) -> str:
        """Return its number in the set."""
        return f"image {index} of {self.title}"


def as_tensors(source: Any) -> torch.Tensor | None:
    """Return the images (N, C, H, W) of a torchvision set that holds them as bytes in memory, such as CIFAR."""
    data = getattr(source, "data", None)
    images = torch.from_numpy(data) if isinstance(data, np.ndarray) else data
    if not isinstance(images, torch.Tensor) or images.dtype is not torch.uint8 or images.ndim not in {3, 4}:
        return None
    return images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()


def open_torchvision(ref: str, root: str, split: str) -> LibraryImages:
    """Open one split of `torch/NAME` through timm.

    Raises:
        DataError: timm does not know it, or its files are not below `root`.
    """
    from timm.data import create_dataset

    try:
        source = create_dataset(ref, root=root, split=split)
    except Exception as error:  # an assertion, or whatever the set's own reader raises
        raise DataError(
            f"timm cannot open '{ref}' ({split}) below {root}: {first_line(error)}; name the folder that holds it "
            f"as {ref}@FOLDER."
        ) from error
    labels = getattr(source, "targets", None)
    if labels is None:  # iNaturalist keeps pairs of category and file
        labels = [pair[0] for pair in getattr(source, "index", [])]
    targets = torch.as_tensor(labels, dtype=torch.long)
    if len(targets) != len(source):
        raise DataError(
            f"'{ref}' gives no list of its labels; use a folder with train/CLASS/… and val/CLASS/…."
        )
    names = getattr(source, "classes", None)
    return LibraryImages(source=source, title=ref, labels=targets, classes=class_names(names, targets))


def open_hugging_face(ref: str, root: str | None, splits: Sequence[str]) -> LibraryImages:
    """Open `hfds/NAME` through timm's reader, whose own data set would put other images in the place of broken ones.

    Args:
        ref: `hfds/` and the name of a data set on the Hub, or the path of one on the disk.
        root: Where the files are kept; the library's own place where None.
        splits: Names of the split, the first that is there is taken.

    Raises:
        DataError: The package `datasets` is missing, or cannot open the set.
    """
    from timm.data import create_reader

    reader, failed = None, ""
    for split in splits:
        try:
            reader = create_reader(ref, root=root, split=split)
        except ImportError as error:
            raise DataError(f"'{ref}' needs the package datasets: pip install 'se-prune[data]'.") from error
        except ValueError as error:  # no split of that name; the first message names those that there are
            failed = failed or first_line(error)
            continue
        except Exception as error:  # the Hub's, the builder's or the disk's
            raise DataError(
                f"timm cannot open '{ref}' ({split}): {first_line(error)}; check the name."
            ) from error
        break
    if reader is None:
        raise DataError(f"timm cannot open '{ref}' ({', '.join(splits)}): {failed}.")
    labels = torch.tensor([int(label) for label in reader.dataset[reader.label_key]], dtype=torch.long)
    names = [name for name, _ in sorted(reader.class_to_idx.items(), key=lambda pair: pair[1])]
    return LibraryImages(source=reader, title=ref, labels=labels, classes=class_names(names, labels))


def class_names(names: Any, labels: torch.Tensor) -> tuple[str, ...]:
    """Return the names of classes, the first of several; numbers where there are none."""
    if not names:
        return tuple(str(i) for i in range(int(labels.max()) + 1 if len(labels) else 0))
    return tuple(str(name[0]) if isinstance(name, tuple | list) else str(name) for name in names)
