"""Files appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from se_prune.errors import SePruneError

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path` in one step, else it is removed.

    Raises:
        SePruneError: The folder cannot be written, or the disk is full; `path` is left as it was.
    """
    target = Path(path).resolve()  # a link stays a link
    temporary: Path | None = None
    try:
        _require_regular(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=target.suffix, dir=target.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(target)
    except OSError as error:
        raise _refused(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all.

    Raises:
        SePruneError: The folder cannot be written, or the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    with whole_file(path) as temporary:
        try:
            save_file(plain, temporary, metadata=metadata)
        except SafetensorError as error:
            raise OSError(errno.EIO, str(error)) from error


def _require_regular(target: Path) -> None:
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "it is a device or a pipe, not a file")


def _refused(path: str | Path, error: OSError) -> SePruneError:
    return SePruneError(
        f"cannot write {path}: {error.strerror or error}. Nothing was changed; free space there or choose "
        "another place with -o."
    )


def require_writable(path: str | Path) -> None:
    """Fail before hours of work rather than after them, where a file could not be written in the end.

    Raises:
        SePruneError: The folder cannot be made or written, or `path` is a folder.
    """
    target = Path(path).resolve()
    try:
        _require_regular(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise _refused(path, error) from error


def make_folder(path: str | Path) -> None:
    """Make a folder where it is missing.

    Raises:
        SePruneError: It cannot be made, or a file stands in its place.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SePruneError(
            f"cannot make the folder {path}: {error.strerror or error}; choose another place."
        ) from error


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
