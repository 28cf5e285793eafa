"""Files appear whole or not at all, and what a killed write left behind goes at the next one.

Of several processes (`se_prune.distributed`) the main one alone writes and removes.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from se_prune import distributed
from se_prune.errors import SePruneError, UsageError

if TYPE_CHECKING:
    import torch

#: Seconds until a file that another machine has written must be seen on a shared disk.
SEEN_AFTER = 10.0
#: How temporary folders end, and the file in them that their writer holds locked.
FOLDER, LOCK = ".parts", "writing"


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path` in one step, else it is removed.

    Temporary files of `path` whose writer was killed are removed first.

    Raises:
        SePruneError: The folder cannot be written, or the disk is full; `path` is left as it was.
    """
    if not distributed.is_main():
        with tempfile.TemporaryDirectory() as elsewhere:
            yield Path(elsewhere) / Path(path).name
        return
    target = Path(path).resolve()  # a link stays a link
    temporary: Path | None = None
    handle = -1
    try:
        _require_regular(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_orphans(target)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=target.suffix, dir=target.parent)
        temporary = Path(name)
        _lock(handle)
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
            os.close(handle)


@contextlib.contextmanager
def whole_files(paths: Sequence[Path]) -> Iterator[Path]:
    """Yield a temporary folder; on success, what was written there under the names of `paths` takes their places.

    The first path is the one that others open, and is put in place last: a kill in between leaves no file of its name,
    and an error puts all older ones back. A single file replaces its older self in one step. Paths share one folder,
    and may be folders themselves.

    Raises:
        SePruneError: The folder cannot be written, or the disk is full; all paths are left as they were.
    """
    targets = [Path(path).resolve() for path in paths]
    main = targets[0]
    try:
        for target in targets:
            if target.exists() and not (target.is_file() or target.is_dir()):
                _require_regular(target)
        main.parent.mkdir(parents=True, exist_ok=True)
        _remove_orphans(main)
        with tempfile.TemporaryDirectory(prefix=f".{main.name}.", suffix=FOLDER, dir=main.parent) as name:
            folder = Path(name)
            with _locked(folder):
                new = folder / "new"
                new.mkdir()
                yield new
                _take_places([new / target.name for target in targets], targets, folder / "old")
    except OSError as error:
        raise _refused(paths[0], error) from error


def _take_places(written: Sequence[Path], targets: Sequence[Path], old: Path) -> None:
    """Move what was written to its places, the first last; undo all if one move fails."""
    for path in written:
        _finish(path)
    if len(targets) == 1 and written[0].is_file() and not targets[0].is_dir():
        written[0].replace(targets[0])
        return
    old.mkdir()
    moved: list[tuple[Path, Path]] = []
    try:
        for target in targets:
            if target.exists():
                target.replace(old / target.name)
                moved.append((target, old / target.name))
        for path, target in reversed(list(zip(written, targets, strict=True))):
            path.replace(target)
            moved.append((path, target))
    except OSError:
        for source, place in reversed(moved):
            place.replace(source)
        raise


def _finish(path: Path) -> None:
    """Give a finished file, or all files of a folder, their permissions, and see them on the disk."""
    for part in [path, *path.rglob("*")]:
        part.chmod((0o777 if part.is_dir() else 0o666) & ~_umask())
        if part.is_file():
            with part.open("rb") as written:
                os.fsync(written.fileno())


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock on a temporary folder, so that no other writer takes it for the leftover of a killed one."""
    with (folder / LOCK).open("wb") as handle:
        _lock(handle.fileno())
        yield


def _lock(handle: int) -> bool:
    """Lock an open file until it is closed or its process dies; False where another process holds it."""
    try:
        import fcntl
    except ImportError:  # Windows: nothing says whether the writer lives, so nothing of it is removed
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_orphans(target: Path) -> None:
    """Remove the temporary files of `target` that no living process writes."""
    name, end = glob.escape(target.name), glob.escape(target.suffix)
    for left in target.parent.glob(f".{name}.????????{end}"):
        with contextlib.suppress(FileNotFoundError), left.open("rb") as file:
            if _lock(file.fileno()):
                left.unlink()
    for folder in target.parent.glob(f".{name}.????????{FOLDER}"):
        with contextlib.suppress(FileNotFoundError), (folder / LOCK).open("rb") as file:
            if _lock(file.fileno()):
                shutil.rmtree(folder, ignore_errors=True)


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all.

    Raises:
        SePruneError: The folder cannot be written, or the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if not distributed.is_main():
        return
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
    if not distributed.is_main():
        return
    target = Path(path).resolve()
    try:
        _require_regular(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_orphans(target)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise _refused(path, error) from error


def make_folder(path: str | Path) -> None:
    """Make a folder where it is missing.

    Raises:
        SePruneError: It cannot be made, or a file stands in its place.
    """
    if not distributed.is_main():
        return
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SePruneError(
            f"cannot make the folder {path}: {error.strerror or error}; choose another place."
        ) from error


def remove_folder(path: str | Path) -> None:
    """Remove a folder of ours with all that is in it, where it is there.

    Raises:
        SePruneError: It cannot be removed.
    """
    if not distributed.is_main():
        return
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise SePruneError(
            f"cannot remove {error.filename or path}: {error.strerror or error}; remove it by hand."
        ) from error


def require_shared(folder: Path) -> None:
    """Check that the processes of all machines see what the main one writes in a folder, where it is.

    Raises:
        UsageError: They do not.
    """
    if distributed.machines() == 1:
        return
    name = distributed.from_main(lambda: _left_in(folder))
    deadline, seen = time.monotonic() + SEEN_AFTER, False
    while not seen and time.monotonic() < deadline:
        seen = folder.is_dir() and name in os.listdir(folder)  # noqa: PTH208 - asks the server anew
        time.sleep(0.0 if seen else 0.2)
    everywhere = all(distributed.gather(seen))
    if distributed.is_main():
        (folder / name).unlink()
    if not everywhere:
        raise UsageError(
            f"the machines do not share {folder}; put the output in a folder that all of them have mounted."
        )


def _left_in(folder: Path) -> str:
    """Leave an empty file in a folder and return its name."""
    handle, name = tempfile.mkstemp(prefix=".shared.", dir=folder)
    os.close(handle)
    return Path(name).name


def cache_folder() -> Path:
    """Return where tables that take a while to make are kept: `$SE_PRUNE_CACHE`, else se-prune in the user's cache."""
    named = os.environ.get("SE_PRUNE_CACHE")
    if named:
        return Path(named)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "se-prune"


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
