"""Tiny data sets on disk and in memory, and a recorder of the memory that tensors take."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from se_prune.data import open_data
from se_prune.data.batches import TensorImages
from se_prune.data.source import balanced_subset
from se_prune.records import Preprocessing

GREY = Preprocessing(input_size=(1, 8, 8), mean=(0.5,), std=(0.25,))


def idx_bytes(values: torch.Tensor) -> bytes:
    """Return a tensor of bytes as an idx file, written from the format's description."""
    head = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    return head + values.to(torch.uint8).contiguous().numpy().tobytes()


def write_idx(folder: Path, prefix: str, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Write images (N, H, W) and labels (N,) as a pair of idx files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx_bytes(images))
    (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))


def fashion_folder(folder: Path, train: int = 200, test: int = 100) -> Path:
    """Write a small, balanced Fashion-MNIST of real images."""
    data = open_data("fashion-mnist")
    for prefix, split, count in (("train", data.train, train), ("t10k", data.test, test)):
        part: Any = balanced_subset(split, count, 0)
        write_idx(folder, prefix, part.images[:, 0], part.labels)
    return folder


def png_folder(folder: Path, classes: Sequence[str] = ("ant", "bee"), per_class: int = 3) -> Path:
    """Write `train/CLASS/*.png` and `val/CLASS/*.png`: 8×8 RGB, brighter with the class and the image."""
    for split in ("train", "val"):
        for number, name in enumerate(classes):
            place = folder / split / name
            place.mkdir(parents=True)
            for index in range(per_class):
                pixels = np.full((8, 8, 3), 100 * number + 10 * index, np.uint8)
                Image.fromarray(pixels).save(place / f"{index}.png")
    return folder


def stripes(n: int = 96, seed: int = 0) -> TensorImages:
    """Return noisy 8×8 images whose class (of 3) is the third of the image that is bright."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    images = torch.randint(0, 60, (n, 1, 8, 8), generator=generator)
    for index, label in enumerate(labels.tolist()):
        images[index, :, :, 3 * label : 3 * label + 2] += 180
    return TensorImages(images=images.to(torch.uint8), labels=labels)


class LargestTensor(TorchDispatchMode):
    """Records in `bytes` the size of the largest tensor with memory that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [t.nbytes for t in tree_leaves(out) if isinstance(t, torch.Tensor) and not t.is_meta]
        self.bytes = max([self.bytes, *sizes])
        return out
