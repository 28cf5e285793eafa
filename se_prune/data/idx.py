"""The idx files of MNIST and Fashion-MNIST, plain or gzipped."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
import torch

from se_prune.errors import DataError

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
#: The file beside idx files that names their classes, one a line; without it they are Fashion-MNIST's.
NAMES = "classes.txt"
BUNDLED = Path(__file__).parent / "fashion_mnist"


def read_idx(path: Path) -> torch.Tensor:
    """Read one idx file of unsigned bytes.

    Raises:
        DataError: The file is missing, truncated, or no idx file.
    """
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
        zero, kind, rank = struct.unpack_from(">HBB", raw)
        shape = struct.unpack_from(f">{rank}I", raw, 4)
        values = np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)
    except (OSError, EOFError, zlib.error, struct.error, ValueError) as error:
        raise DataError(f"{path} is not a whole idx file ({error}); copy it again.") from error
    if zero != 0 or kind != 8:
        raise DataError(
            f"{path} is not an idx file of bytes; give a folder with the four Fashion-MNIST files."
        )
    return torch.from_numpy(values.copy())


def find_pair(folder: Path, prefix: str) -> tuple[Path, Path] | None:
    """Return the image and label files of a split in a folder, or None."""
    for suffix in ("", ".gz"):
        images = folder / f"{prefix}-images-idx3-ubyte{suffix}"
        labels = folder / f"{prefix}-labels-idx1-ubyte{suffix}"
        if images.exists() and labels.exists():
            return images, labels
    return None


def read_classes(folder: Path) -> tuple[str, ...] | None:
    """Return the class names that stand beside idx files, or None where there is no such file.

    Raises:
        DataError: The file is not text, or a name is missing or stands twice.
    """
    path = folder / NAMES
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); write one class name a line.") from error
    if not names or not all(names) or len(set(names)) < len(names):
        raise DataError(f"{path} needs one class name a line, no line empty and no name twice.")
    return names


def read_pair(images: Path, labels: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Read a split: images (N, 1, H, W) as bytes, labels (N,) as int64.

    Raises:
        DataError: A file is broken or the two do not belong together.
    """
    x, y = read_idx(images), read_idx(labels)
    if x.ndim != 3 or y.ndim != 1 or len(x) != len(y) or len(x) == 0:
        raise DataError(f"{images} and {labels} do not belong together: {len(x)} images, {len(y)} labels.")
    return x.unsqueeze(1), y.long()
