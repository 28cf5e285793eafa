"""Tensors that are put down in a temporary file and taken up again: what a pass over images leaves for the next.

The file has no name and goes with the process, however that ends. It is written and read, not mapped into memory.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from typing import IO

import torch

from se_prune.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Spilled:
    """Where a tensor lies: its file, its place there, and what it was."""

    spill: Spill
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def into(self, tensor: torch.Tensor) -> torch.Tensor:
        """Read it into a tensor of its size, which is returned."""
        if tensor.device.type == "cpu" and tensor.is_contiguous():
            self.spill.read(self.offset, tensor)
        else:
            tensor.copy_(self.spill.read(self.offset, torch.empty(self.shape, dtype=self.dtype)))
        return tensor

    def load(self, device: torch.device) -> torch.Tensor:
        """Return it."""
        return self.into(torch.empty(self.shape, dtype=self.dtype, device=device))


def _temporary() -> IO[bytes]:
    return tempfile.TemporaryFile()


@dataclass(slots=True, kw_only=True)
class Spill:
    """A temporary file that is closed, and so gone, with the last tensor in it."""

    file: IO[bytes] = field(default_factory=_temporary)
    size: int = 0

    def put(self, tensor: torch.Tensor) -> Spilled:
        """Write a tensor to the end.

        Raises:
            DataError: The disk is full.
        """
        own = tensor.detach().cpu().contiguous()
        place = Spilled(spill=self, offset=self.size, shape=tuple(tensor.shape), dtype=tensor.dtype)
        try:
            self.file.seek(self.size)
            self.file.write(_bytes_of(own))
            self.file.flush()
        except OSError as error:
            raise DataError(
                f"the repair cannot write its temporary file in {tempfile.gettempdir()} ({error.strerror}); make "
                "room there, or name a folder with more in TMPDIR."
            ) from error
        self.size += own.nbytes
        return place

    def read(self, offset: int, tensor: torch.Tensor) -> torch.Tensor:
        """Fill a contiguous tensor on the CPU from `offset` on, and return it."""
        self.file.seek(offset)
        got = self.file.readinto(_bytes_of(tensor))  # type: ignore[attr-defined]
        assert got == tensor.nbytes, f"{got} of {tensor.nbytes} bytes are there"
        return tensor

    def __del__(self) -> None:
        self.file.close()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data


def room() -> int:
    """Return the bytes that are free where temporary files go."""
    return shutil.disk_usage(tempfile.gettempdir()).free
