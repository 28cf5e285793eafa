"""Reading somebody else's checkpoint file: tensors are read from it, and nothing in it is run."""

from __future__ import annotations

import argparse
import re
import warnings
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from se_prune.errors import CheckpointError

#: Where training scripts put the weights in their file; averaged ones only where there are no others.
WRAPPERS = ("state_dict", "model", "model_state_dict", "net", "state_dict_ema", "model_ema")
SAVE_WEIGHTS = (
    "save its weights alone where the model was made: torch.save(model.state_dict(), 'weights.pth')"
)
#: How pickles of protocols 3 to 5 begin; torch.save writes protocol 2.
PLAIN_PICKLES = frozenset({b"\x80\x03", b"\x80\x04", b"\x80\x05"})
AGAIN = "copy or download it again"
SHOWN = 3


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


def read_weights(path: Path, start: bytes) -> dict[str, torch.Tensor]:
    """Return the weights in a file by name, out of whatever dictionaries a training script wrapped them in.

    Args:
        path: A torch or safetensors file.
        start: Its first bytes, as `read_start` returns them.

    Raises:
        CheckpointError: The file is broken, would run code, or holds no weights.
    """
    return _unwrapped(_read(path, start), path)


def _read(path: Path, start: bytes) -> object:
    """Read a file by what its first bytes say it is; suffixes are often wrong."""
    if all(byte >= 32 or byte in b"\t\n\f\r\x1b" for byte in start):
        shown = start.decode("utf-8", errors="replace").strip()[:40]
        raise CheckpointError(
            f"{path} is a text file that starts with {shown!r}, not a checkpoint; if a web page or a Git LFS "
            "pointer was saved in its place, download the file itself."
        )
    if path.suffix.lower() == ".safetensors" or start[8:9] == b"{":
        try:
            return load_file(path, device="cpu")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is not a whole safetensors file ({error}); {AGAIN}.") from error
    if start.startswith(b"PK"):
        _check_zip(path)
    return _read_tensors(path, start)


def _check_zip(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.rpartition("/")[2] for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or cut short ({first_line(error)}); {AGAIN}.") from error
    if "constants.pkl" in names:
        raise CheckpointError(
            f"{path} is a TorchScript program, which runs code when opened; {SAVE_WEIGHTS}."
        )
    if "data.pkl" not in names:
        raise CheckpointError(
            f"{path} is a zip archive of {some(sorted(filter(None, names)))}, not a checkpoint; "
            "unpack it and give the file inside."
        )


def _read_tensors(path: Path, start: bytes) -> object:
    """Read a torch file without running anything in it.

    `argparse.Namespace` is let through, because training scripts save their options in one and setting its
    attributes runs nothing.
    """
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # what torch warns of here ends in an error below
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(_refusal(path, start, error)) from error


def _refusal(path: Path, start: bytes, error: Exception) -> str:
    """Say why torch refused a file: code in it, a pickle that is not torch's, or damage."""
    called = re.search(r"GLOBAL (\S+)", str(error))
    unsafe = "opening it could run any code, so nothing of it was read"
    if called:
        return f"{path} is a pickle that calls {called[1]}; {unsafe}; {SAVE_WEIGHTS}."
    if start[:2] in PLAIN_PICKLES:
        return f"{path} is a pickle that torch.save did not write; {unsafe}; {SAVE_WEIGHTS}."
    kind = type(error).__name__
    return f"{path} is damaged or cut short, or no torch file ({kind}); {AGAIN}, or {SAVE_WEIGHTS}."


def _unwrapped(value: object, path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors by name, out of the dictionaries that training scripts wrap around them."""
    for _ in WRAPPERS:  # no deeper: a dictionary may hold itself
        if not isinstance(value, Mapping):
            break
        inner = next((value[key] for key in WRAPPERS if isinstance(value.get(key), Mapping)), None)
        if inner is None:
            break
        value = inner
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not named weights; {SAVE_WEIGHTS}.")
    tensors = {str(key): tensor for key, tensor in value.items() if isinstance(tensor, torch.Tensor)}
    if not tensors:
        held = some([str(key) for key in value]) if value else "nothing"
        raise CheckpointError(f"{path} holds {held}, but no weights by name; {SAVE_WEIGHTS}.")
    return tensors


def check_values(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Refuse weights that are not finite, and tensors that only pretend to hold values.

    Raises:
        CheckpointError: The message names the tensor.
    """
    for name, tensor in state.items():
        if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
            raise CheckpointError(f"{path}: '{name}' is no plain tensor with values; {SAVE_WEIGHTS}.")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{path}: '{name}' claims more values than the file holds; {AGAIN}.")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.detach()).all()):
            raise CheckpointError(
                f"{path}: '{name}' holds NaN or infinite values, so its training failed; "
                "open an earlier checkpoint."
            )


def renamed(state: Mapping[str, torch.Tensor], own: Collection[str]) -> dict[str, torch.Tensor]:
    """Take off what `torch.compile`, DataParallel and weight averaging put before or beside the names."""
    wrapped = not any(key.startswith("module.") for key in own)
    result = {}
    for key, tensor in state.items():
        name = key.replace("_orig_mod.", "")
        while wrapped and name.startswith("module."):
            name = name.removeprefix("module.")
        if name in own or name != "n_averaged":
            result[name] = tensor
    return result


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


def some(items: Sequence[str]) -> str:
    """Return the first few items, and how many more there are."""
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(item[:80] for item in items[:SHOWN]) + more


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message, to stand inside of one of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
