"""Reading somebody else's checkpoint file: tensors are read from it, and nothing in it is run."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import warnings
import zipfile
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file

from se_prune.errors import CheckpointError, first_line

#: Where training scripts put the weights in their file, and where their running average (EMA).
WRAPPERS = ("state_dict", "model", "model_state_dict", "module", "net", "network")
AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema")
#: Where they write the architecture's name: beside the weights, or among the options of the run.
OPTIONS = ("args", "config", "hyper_parameters")
NAMES = ("arch", "architecture", "model", "model_name")
#: What counters and averages leave beside the weights; by the last part of the tensor's name.
LEFT_BESIDE = frozenset({"n_averaged", "total_ops", "total_params"})
SAVE_WEIGHTS = (
    "save its weights alone where the model was made: torch.save(model.state_dict(), 'weights.pth')"
)
#: How pickles of protocols 3 to 5 begin; torch.save writes protocol 2.
PLAIN_PICKLES = frozenset({b"\x80\x03", b"\x80\x04", b"\x80\x05"})
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"7z\xbc\xaf": "7z", b"Rar!": "rar"}
SUFFIXES = frozenset({".pth", ".pt", ".pkl", ".bin", ".tar", ".ckpt", ".safetensors"})
ONNX = ".onnx"
#: Weights hardly compress: an archive that unpacks to a hundred times its size is none of ours.
SWELL, SMALL_BYTES = 100, 2**26
AGAIN = "copy or download it again"
SHOWN = 3


class _Beside:
    """Stands for a value beside the weights, such as a NumPy scalar: takes whatever a file gives it, and drops it."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


#: What scripts save beside the weights and torch refuses. Their own code is not called: `_Beside` is, in its place.
BESIDE = (
    *("numpy.ndarray", "numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
    *("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"),
    *("pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.PurePosixPath", "pathlib.PureWindowsPath"),
    *("datetime.datetime", "datetime.date", "datetime.timedelta"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What was read from a foreign file.

    Attributes:
        tensors: The weights by name, as the file names them.
        stated: Architecture names that the file, or a `config.json` beside it, states.
        averaged: Whether these are the running average of the training.
        average_beside: Whether the file holds such an average beside them.
    """

    tensors: dict[str, torch.Tensor]
    stated: frozenset[str] = frozenset()
    averaged: bool = False
    average_beside: bool = False


def read_start(path: Path) -> bytes:
    """Return the first bytes of a file.

    Raises:
        CheckpointError: The file is empty or cannot be read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error
    if not start:
        raise CheckpointError(f"{path} is empty; {AGAIN}.")
    return start


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, for the history."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_weights(path: Path, start: bytes, *, ema: bool = False) -> Weights:
    """Return the weights in a file by name, out of whatever dictionaries a training script wrapped them in.

    Args:
        path: A torch or safetensors file, or a zip archive of one.
        start: Its first bytes, as `read_start` returns them.
        ema: Take the running average instead of the weights of the last step.

    Raises:
        CheckpointError: The file is broken, would run code, or holds no such weights.
    """
    return _unwrapped(_read(str(path), path, start), path, ema)


def _read(what: str, file: Path | io.BytesIO, start: bytes) -> object:
    """Read a file by what its first bytes say it is; suffixes are often wrong."""
    if all(byte >= 32 or byte in b"\t\n\f\r\x1b" for byte in start):
        shown = start.decode("utf-8", errors="replace").strip()[:40]
        raise CheckpointError(
            f"{what} is a text file that starts with {shown!r}, not a checkpoint; if a web page or a Git LFS "
            "pointer was saved in its place, download the file itself."
        )
    packer = (
        "tar"
        if start[257:262] == b"ustar"
        else next((PACKED[m] for m in PACKED if start.startswith(m)), None)
    )
    if packer is not None:
        raise CheckpointError(f"{what} is packed with {packer}; unpack it and give the file inside.")
    if what.lower().endswith(".safetensors") or start[8:9] == b"{":
        try:
            return load_file(file, device="cpu") if isinstance(file, Path) else load(file.getvalue())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{what} is not a whole safetensors file ({error}); {AGAIN}.") from error
    if start.startswith(b"PK"):
        inner = _packed(what, file)
        if inner is not None:
            name, content = inner
            return _read(f"{what}/{name}", io.BytesIO(content), content[:512])
        if isinstance(file, io.BytesIO):
            file.seek(0)
    return _read_tensors(what, file, start)


def _packed(what: str, file: Path | io.BytesIO) -> tuple[str, bytes] | None:
    """Return name and content of the one checkpoint in a zip archive; None where the archive is torch's own.

    Raises:
        CheckpointError: The archive is damaged, a program, not to be trusted, or holds no or several checkpoints.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            _check_entries(what, entries, file)
            if any(Path(entry.filename).name == "data.pkl" for entry in entries):
                return None
            _check_places(what, entries)
            inside = [e for e in entries if Path(e.filename).suffix.lower() in SUFFIXES and _is_visible(e)]
            if len(inside) != 1 or isinstance(file, io.BytesIO):
                names = some(sorted(Path(entry.filename).name for entry in entries)) or "nothing"
                raise CheckpointError(
                    f"{what} is a zip archive of {names}, not a checkpoint; unpack it and give the file inside."
                )
            content = archive.read(inside[0])
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{what} is damaged or cut short ({first_line(error)}); {AGAIN}.") from error
    if not content:
        raise CheckpointError(f"{what} holds an empty {_printable(inside[0].filename)}; {AGAIN}.")
    return _printable(Path(inside[0].filename).name), content


def _check_entries(what: str, entries: Sequence[zipfile.ZipInfo], file: Path | io.BytesIO) -> None:
    if any(Path(entry.filename).name == "constants.pkl" for entry in entries):
        raise CheckpointError(
            f"{what} is a TorchScript program, which runs code when opened; {SAVE_WEIGHTS}."
        )
    packed = file.stat().st_size if isinstance(file, Path) else file.getbuffer().nbytes
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > SWELL * packed + SMALL_BYTES:
        raise CheckpointError(
            f"{what} of {packed / 1e6:.3g} MB claims to unpack to {unpacked / 1e6:.3g} MB, which no weights do, so "
            f"nothing of it was read; {AGAIN} from a source you trust."
        )


def _check_places(what: str, entries: Sequence[zipfile.ZipInfo]) -> None:
    """Refuse an archive that an unpacker would write outside of its folder; nothing here unpacks one to disk."""
    for entry in entries:
        name = entry.filename.replace("\\", "/")
        if name.startswith("/") or ".." in name.split("/"):
            raise CheckpointError(
                f"{what} holds {_printable(entry.filename)}, a path outside of the archive, as no honest archive does, "
                f"so nothing of it was read; {AGAIN} from a source you trust."
            )


def _is_visible(entry: zipfile.ZipInfo) -> bool:
    return not entry.filename.startswith("__MACOSX/") and not Path(entry.filename).name.startswith(".")


def _read_tensors(what: str, file: Path | io.BytesIO, start: bytes) -> object:
    """Read a torch file without running anything in it.

    `argparse.Namespace` is let through, because training scripts save their options in one and setting its
    attributes runs nothing.
    """
    harmless: list[Any] = [argparse.Namespace, *((_Beside, name) for name in BESIDE)]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(harmless):
            warnings.simplefilter("ignore")  # what torch warns of here ends in an error below
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(_refusal(what, start, error)) from error


def _refusal(what: str, start: bytes, error: Exception) -> str:
    """Say why torch refused a file: code in it, a pickle that is not torch's, or damage."""
    called = re.search(r"GLOBAL (\S+)", str(error))
    unsafe = "opening it could run any code, so nothing of it was read"
    if called:
        return f"{what} is a pickle that calls {called[1]}; {unsafe}; {SAVE_WEIGHTS}."
    if start[:2] in PLAIN_PICKLES:
        return f"{what} is a pickle that torch.save did not write; {unsafe}; {SAVE_WEIGHTS}."
    kind = type(error).__name__
    return f"{what} is damaged or cut short, or no torch file ({kind}); {AGAIN}, or {SAVE_WEIGHTS}."


def _unwrapped(value: object, path: Path, ema: bool) -> Weights:
    """Return the tensors by name, out of the dictionaries that training scripts wrap around them."""
    order = AVERAGES + WRAPPERS if ema else WRAPPERS + AVERAGES
    stated = _config_beside(path)
    taken, found = set(), set()
    for _ in order:  # no deeper: a dictionary may hold itself
        if not isinstance(value, Mapping):
            break
        stated |= _stated(value)
        held = [key for key in order if isinstance(value.get(key), Mapping)]
        if not held:
            break
        taken.add(held[0])
        found.update(held)
        value = value[held[0]]
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not named weights; {SAVE_WEIGHTS}.")
    tensors = {str(key): tensor for key, tensor in value.items() if isinstance(tensor, torch.Tensor)}
    if tensors and not any(tensor.is_floating_point() for tensor in tensors.values()):
        name, tensor = next(iter(tensors.items()))
        raise CheckpointError(_not_floats(path, name, tensor))
    if not tensors:
        held_here = some([str(key) for key in value]) if value else "nothing"
        raise CheckpointError(f"{path} holds {held_here}, but no weights by name; {SAVE_WEIGHTS}.")
    averaged = bool(taken.intersection(AVERAGES)) or "n_averaged" in tensors
    if ema and not averaged:
        raise CheckpointError(
            f"{path} holds no averaged weights (under {', '.join(AVERAGES)}); leave --ema out to open its others."
        )
    return Weights(
        tensors=tensors,
        stated=frozenset(stated),
        averaged=averaged,
        average_beside=not averaged and bool(found.intersection(AVERAGES)),
    )


def _stated(value: Mapping[object, object]) -> set[str]:
    """Return the architecture names that stand beside the weights or among the options of the run."""
    places = [value, *(value.get(key) for key in OPTIONS)]
    tables = [vars(place) if isinstance(place, argparse.Namespace) else place for place in places]
    words = [table.get(key) for table in tables if isinstance(table, Mapping) for key in NAMES]
    return {word.rpartition("/")[2].partition(".")[0] for word in words if isinstance(word, str)}


def _config_beside(path: Path) -> set[str]:
    """Return what a `config.json` beside the file states, as model hubs lay their files."""
    try:
        config = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return set()
    return _stated(config) if isinstance(config, dict) else set()


def check_values(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Refuse weights that are not finite or all zero, negative variances, and tensors that only pretend to hold values.

    Raises:
        CheckpointError: The message names the tensor.
    """
    for name, tensor in state.items():
        plain = tensor.layout == torch.strided and not (
            tensor.is_meta or tensor.is_quantized or tensor.is_nested
        )
        if not plain:
            raise CheckpointError(f"{path}: '{name}' is no plain tensor with values; {SAVE_WEIGHTS}.")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{path}: '{name}' claims more values than the file holds; {AGAIN}.")
        if tensor.is_floating_point() and not bool(torch.isfinite(_wide(tensor)).all()):
            raise CheckpointError(
                f"{path}: '{name}' holds NaN or infinite values, so its training failed; "
                "open an earlier checkpoint."
            )
        if name.endswith("running_var") and tensor.is_floating_point() and bool((_wide(tensor) < 0).any()):
            raise CheckpointError(
                f"{path}: '{name}' is negative, and no variance is; the file is damaged: {AGAIN}."
            )
    weights = [tensor for tensor in state.values() if tensor.ndim > 1]
    if weights and not any(bool(_wide(tensor).any()) for tensor in weights):
        raise CheckpointError(
            f"{path} holds no weight other than zero, so it was saved before it was filled; open another checkpoint."
        )


def check_floats(own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Refuse weights that are integers, complex or flags where the architecture has floats.

    Raises:
        CheckpointError: The message names the tensor.
    """
    for name, tensor in own.items():
        stored = state.get(name)
        if stored is not None and tensor.is_floating_point() and not stored.is_floating_point():
            raise CheckpointError(_not_floats(path, name, stored))


def _not_floats(path: Path, name: str, tensor: torch.Tensor) -> str:
    kind = str(tensor.dtype).removeprefix("torch.")
    return (
        f"{path}: '{name}' is of type {kind}, and weights are floats, so it was quantised or converted; "
        "open the float checkpoint that it was made from."
    )


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor as torch can look into it, which it cannot where floats have 8 bits."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def renamed(state: Mapping[str, torch.Tensor], own: Collection[str] = ()) -> dict[str, torch.Tensor]:
    """Take off what `torch.compile`, DataParallel, trainers and weight averaging put before or beside the names.

    Args:
        state: Tensors as a file names them.
        own: The architecture's own names, which keep a first part that all tensors share; none where it is unknown.
    """
    result = {}
    for key, tensor in state.items():
        name = key.replace("_orig_mod.", "")
        if key in own or name.rpartition(".")[2] not in LEFT_BESIDE:
            result[name] = tensor
    while (prefix := _shared_prefix(result)) and not any(key.startswith(prefix) for key in own):
        result = {key.removeprefix(prefix): tensor for key, tensor in result.items()}
    return result


def _shared_prefix(names: Collection[str]) -> str:
    """Return the first part of all names with its dot, or nothing where they differ in it."""
    heads = {name.partition(".")[0] + "." for name in names}
    (head,) = heads if len(heads) == 1 else {""}
    return head if all(name.startswith(head) for name in names) else ""


def differences(own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> str:
    """Return in one line what is missing, left over and of another shape."""
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(tensor.shape)}"
        for key, tensor in own.items()
        if key in state and state[key].shape != tensor.shape
    ]
    parts = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    return "; ".join(f"{len(found)} {label} ({some(found)})" for label, found in parts.items() if found)


def some(items: Sequence[str], shown: int = SHOWN) -> str:
    """Return the first few items, and how many more there are."""
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return ", ".join(_printable(item) for item in items[:shown]) + more


def _printable(text: str) -> str:
    """Return the start of a name from a file without what would move a terminal's cursor."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:80])
