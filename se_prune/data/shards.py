"""Images in the shards of webdataset: plain tar files of samples, each an image with its label beside it.

The headers of the shards are read once, so that every image has a number, a label and a place. Subsets balanced over
the classes, epochs that depend on seed and epoch alone, and images that are left out are then what they are for
folders. timm's own reader gives none of these; its `_info.json` is understood.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

from se_prune.data.raw import VALIDATION_NAMES
from se_prune.errors import DataError, SePruneError
from se_prune.files import cache_folder, write_tensors

LOG = logging.getLogger("se_prune")
IMAGE_KEYS = frozenset({"jpg", "jpeg", "png", "webp", "ppm", "bmp", "tif", "tiff"})
INFO_NAMES = ("_info.json", "info.json")
CLASSES_FILE = "classes.txt"
#: Splits with more images keep their index on disk, since reading the headers again takes a while.
CACHED_FROM = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """Where a split lies: its shards, their number of samples where that is known, the key of labels in JSON."""

    paths: tuple[Path, ...]
    lengths: tuple[int, ...] = ()
    label_key: str = "label"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardImages:
    """The images of one split: per image its shard, its place and size in it, and its label, (N,) each."""

    paths: tuple[Path, ...]
    shards: torch.Tensor
    offsets: torch.Tensor
    sizes: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]

    def image(self, index: int) -> Image.Image:
        """Open one image."""
        with self.paths[int(self.shards[index])].open("rb") as file:
            file.seek(int(self.offsets[index]))
            content = BytesIO(file.read(int(self.sizes[index])))
        with Image.open(content) as image:
            image.load()
            return image

    def name(self, index: int) -> str:
        """Return its shard and its file name there."""
        path, offset = self.paths[int(self.shards[index])], int(self.offsets[index])
        with tarfile.open(path, "r:") as tar:
            inside = next((m.name for m in tar if m.offset_data == offset), f"byte {offset}")
        return f"{path}:{inside}"


def has_shards(folder: Path) -> bool:
    """Say whether a folder holds shards of a training split."""
    return bool(_by_name(folder, ("train",))) or any((folder / name).is_file() for name in INFO_NAMES)


def open_shards(folder: Path) -> tuple[ShardImages, ShardImages]:
    """Open the training and validation shards of a folder.

    The splits are those of `_info.json`, else told by the names `train` and `val`, `validation` or `test` of the
    shards or of the folders that they lie in. `classes.txt` names the classes, one a line.

    Raises:
        DataError: A split is missing, a shard is damaged, or a sample has no label.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; webdataset shards are read from a disk: mount or copy them.")
    info = _info(folder)
    train = _index(_plan(folder, info, ("train", "training")))
    test = _index(_plan(folder, info, VALIDATION_NAMES))
    classes = _classes(folder, int(train["labels"].max()) + 1)
    return _images(train, classes), _images(test, classes)


def _images(found: dict[str, Any], classes: tuple[str, ...]) -> ShardImages:
    labels, paths = found["labels"], found["paths"]
    outside = torch.nonzero((labels < 0) | (labels >= len(classes))).flatten()
    if len(outside):
        wrong = int(outside[0])
        raise DataError(
            f"{paths[int(found['shards'][wrong])]} has a label {int(labels[wrong])}, but there are {len(classes)} "
            f"classes; labels are numbers from 0, and {CLASSES_FILE} names every class."
        )
    return ShardImages(classes=classes, **found)


def _info(folder: Path) -> dict[str, Any]:
    path = next((folder / name for name in INFO_NAMES if (folder / name).is_file()), None)
    if path is None:
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["splits"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no description of shards ({error}); correct or remove it.") from error


def _plan(folder: Path, info: dict[str, Any], names: Sequence[str]) -> _Plan:
    split = next((info[name] for name in names if name in info), None)
    if split is None:
        paths = _by_name(folder, names)
        if not paths:
            raise DataError(
                f"{folder} has no shards of '{names[0]}': name them {names[0]}-0000.tar, …, or put them in "
                f"{names[0]}/."
            )
        return _Plan(paths=tuple(paths))
    paths = [folder / str(name) for name in split["filenames"]]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(paths)} shards of {folder} are missing, the first is {missing[0].name}; copy them."
        )
    return _Plan(
        paths=tuple(paths),
        lengths=tuple(split.get("shard_lengths", ())),
        label_key=split.get("alt_label") or "label",
    )


def _by_name(folder: Path, names: Sequence[str]) -> list[Path]:
    for name in names:
        inside = sorted((folder / name).glob("*.tar")) if (folder / name).is_dir() else []
        found = inside or sorted(
            p for p in folder.glob("*.tar") if name in p.stem.replace("_", "-").split("-")
        )
        if found:
            return found
    return []


def _classes(folder: Path, count: int) -> tuple[str, ...]:
    path = folder / CLASSES_FILE
    if not path.is_file():
        return tuple(str(i) for i in range(count))
    return tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())


def _index(plan: _Plan) -> dict[str, Any]:
    """Return the place and label of every image of a split, from the cache where it is there."""
    cache = _cache_file(plan)
    table = _cached(cache)
    if table is None:
        rows: list[tuple[int, int, int, int]] = []
        for number, path in enumerate(plan.paths):
            before = len(rows)
            rows += [(number, *row) for row in _read_shard(path, plan.label_key)]
            _require_length(path, len(rows) - before, plan.lengths[number : number + 1])
        if not rows:
            raise DataError(f"{plan.paths[0].parent} has no images in its {len(plan.paths)} shards.")
        table = torch.tensor(rows, dtype=torch.long)
        if len(rows) >= CACHED_FROM:
            _keep(cache, table)
    shards, offsets, sizes, labels = (column.contiguous() for column in table.unbind(1))
    return {"paths": plan.paths, "shards": shards, "offsets": offsets, "sizes": sizes, "labels": labels}


def _require_length(path: Path, found: int, expected: Sequence[int]) -> None:
    if expected and found != expected[0]:
        raise DataError(f"{path} has {found} images, its description says {expected[0]}; copy it again.")


def _read_shard(path: Path, label_key: str) -> Iterator[tuple[int, int, int]]:
    """Yield (offset, size, label) of the images in a shard, in order."""
    try:
        _require_end(path)
        with tarfile.open(path, "r:") as tar:
            key = ""
            parts: dict[str, tarfile.TarInfo] = {}
            for member in tar:
                stem, _, ending = Path(member.name).name.partition(".")
                here = f"{Path(member.name).parent}/{stem}"
                if not member.isfile() or not stem:
                    continue
                if here != key:
                    yield from _sample(path, tar, key, parts, label_key)
                    key, parts = here, {}
                parts[ending.lower()] = member
            yield from _sample(path, tar, key, parts, label_key)
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{path} is not a whole tar file ({error}); copy it again.") from error


def _require_end(path: Path) -> None:
    """Check for the empty block that ends a tar file, since tarfile takes a file cut within a header as whole."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - tarfile.BLOCKSIZE))
        if size % tarfile.BLOCKSIZE or any(file.read()):
            raise tarfile.ReadError("its end is missing")


def _sample(
    path: Path, tar: tarfile.TarFile, key: str, parts: dict[str, tarfile.TarInfo], label_key: str
) -> Iterator[tuple[int, int, int]]:
    image = next((parts[ending] for ending in parts if ending in IMAGE_KEYS), None)
    if image is None:
        return
    try:
        if "cls" in parts:
            label = int(_content(tar, parts["cls"]))
        else:
            label = int(json.loads(_content(tar, parts["json"]))[label_key])
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(
            f"{path}: the sample '{key.removeprefix('./')}' has no label; it needs a number in a .cls file, or as "
            f"'{label_key}' in a .json file."
        ) from error
    yield image.offset_data, image.size, label


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return b"" if file is None else file.read()


def _cache_file(plan: _Plan) -> Path:
    """Return where the index of these shards is kept."""
    digest = hashlib.sha256(f"{plan.label_key} {plan.lengths}".encode())
    for path in plan.paths:
        state = path.stat()
        digest.update(f"{path.resolve()} {state.st_size} {state.st_mtime_ns}\n".encode())
    return cache_folder() / f"shards-{digest.hexdigest()[:32]}.safetensors"


def _cached(path: Path) -> torch.Tensor | None:
    try:
        with safe_open(str(path), framework="pt") as file:
            table = file.get_tensor("table")
    except (OSError, SafetensorError):
        return None
    return table if table.ndim == 2 and table.shape[1] == 4 and len(table) else None


def _keep(path: Path, table: torch.Tensor) -> None:
    try:
        write_tensors(path, {"table": table}, {})
    except SePruneError as error:
        LOG.warning("the index of the shards is not kept for the next time: %s", error)
