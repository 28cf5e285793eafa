"""Opening a network: our artifact, somebody else's checkpoint or ONNX file, or an architecture by name.

Of a foreign file `foreign` reads the tensors alone, and `recognise` tells the architecture where nobody names it. Its
class count and input channels are read from its last and first layers; everything else must fit exactly.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from se_prune import artifact
from se_prune.artifact import Network
from se_prune.errors import CheckpointError, UsageError, first_line, nearest
from se_prune.foreign import (
    ONNX,
    SUFFIXES,
    check_floats,
    check_values,
    differences,
    digest,
    read_start,
    read_weights,
    renamed,
)
from se_prune.onnx_file import open_onnx
from se_prune.preprocessing import with_preprocessing
from se_prune.recognise import adapted, head_of, outputs, recognise, stem_of, stored_sizes
from se_prune.records import ArchSpec, ArtifactHeader, HistoryEntry
from se_prune.zoo import registry

#: Says at level WARNING what was assumed of a file: its architecture, and which of its weights were taken.
LOG = logging.getLogger(__name__)
WEIGHTS = Path(registry.__file__).parent / "weights"


def open_model(
    ref: str | Path,
    *,
    arch: str | None = None,
    num_classes: int | None = None,
    in_channels: int | None = None,
    pretrained: bool = False,
    ema: bool = False,
    input_size: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Network:
    """Open MODEL as every command takes it, on the CPU and in eval mode.

    Args:
        ref: An artifact, a checkpoint or ONNX file, or an architecture reference.
        arch: The architecture of a foreign checkpoint, recognised by its tensors where None and then logged as a
            warning; for an artifact it must be the artifact's own.
        num_classes: The class count; read from a checkpoint's last layer where None.
        in_channels: The input channels; read from a checkpoint's first convolution where None.
        pretrained: For an architecture reference, the library's own weights instead of random ones.
        ema: For a checkpoint, the running average of its training instead of the weights of the last step.
        input_size: (C, H, W) or (H, W), instead of the network's own.
        mean: Mean of pixels in [0, 1] per channel, instead of the network's own.
        std: Standard deviation of pixels in [0, 1] per channel, instead of the network's own.

    Raises:
        UsageError: An option is wrong or does not go with this MODEL, or the file's architecture is not recognised.
        CheckpointError: The file is missing, broken, unsafe, or does not fit its architecture.
    """
    sizes = _asked_sizes(num_classes, in_channels)
    ref = str(ref)
    path = _file_of(ref)
    if path is None:
        if arch is not None:
            raise UsageError(
                f"{ref} is an architecture already, so --arch {arch} does not go with it; drop one."
            )
        _require_no_ema(ema, ref)
        network = _open_arch(registry.resolve(ref, **sizes), pretrained)
    elif pretrained:
        raise UsageError(
            f"--pretrained goes with an architecture, but {ref} is a file; leave --pretrained out."
        )
    elif path.suffix.lower() == ONNX:
        if arch is not None or ema:
            raise UsageError(f"{ref} holds its own graph and one set of weights; leave --arch and --ema out.")
        network = open_onnx(path, asked=input_size, normalised=mean is not None and std is not None)
        _require_sizes(network, sizes, ref)
    else:
        network = _open_file(path, arch, sizes, ema)
    return with_preprocessing(network, ref, input_size=input_size, mean=mean, std=std)


def _require_no_ema(ema: bool, ref: str) -> None:
    if ema:
        raise UsageError(
            f"--ema goes with a checkpoint that holds two sets of weights; leave it out for {ref}."
        )


def _asked_sizes(num_classes: int | None, in_channels: int | None) -> dict[str, int]:
    asked = {"num_classes": num_classes, "in_channels": in_channels}
    sizes = {name: value for name, value in asked.items() if value is not None}
    for name, value in sizes.items():
        if value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}.")
    return sizes


def _file_of(ref: str) -> Path | None:
    """Return the file that a reference names, or None for an architecture.

    Raises:
        CheckpointError: The reference is a path by its looks, but no readable file.
    """
    if ref.partition(":")[0] in registry.LIBRARIES:
        return None
    path = Path(ref)
    path_like = "/" in ref or os.sep in ref or path.suffix.lower() in SUFFIXES | {".zip", ONNX}
    try:
        if path.is_file():
            return path
        exists, beside = path.exists(), [p.name for p in path.parent.iterdir()] if path_like else []
    except OSError as error:
        exists, beside = False, []
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise CheckpointError(
                f"{ref} cannot be read ({error.strerror}); check its permissions."
            ) from error
    if exists and (path_like or not _is_known(ref)):
        raise CheckpointError(f"{ref} is a folder or a device, not a file; name the checkpoint file in it.")
    if path_like and not exists:
        raise CheckpointError(f"the file {ref} does not exist{nearest(path.name, beside)}; check the path.")
    return None


def _is_known(ref: str) -> bool:
    try:
        registry.resolve(ref)
    except UsageError:
        return False
    return True


# Architectures by name.


def _open_arch(spec: ArchSpec, pretrained: bool) -> Network:
    library, _, name = spec.ref.rpartition(":")
    if pretrained and library == "zoo":
        return _bundled(spec, name)
    module = _pretrained(spec, library, name) if pretrained else registry.build(spec)
    weights = "pretrained" if pretrained else "random"
    entry = HistoryEntry(stage="opened", details={"arch": spec.ref, "weights": weights})
    return Network(module=module.cpu(), header=_header(spec, module, entry))


def _header(spec: ArchSpec, module: nn.Module, entry: HistoryEntry) -> ArtifactHeader:
    known = spec
    stem = stem_of(module)
    if spec.ref.partition(":")[0] not in registry.LIBRARIES and stem is not None:
        # A user's factory says nothing about its input; its first convolution does.
        known = dataclasses.replace(spec, kwargs={"in_channels": stem[1].in_channels, **spec.kwargs})
    preprocessing = registry.default_preprocessing(known, module)
    return ArtifactHeader(arch=spec, preprocessing=preprocessing, history=(entry,))


def _bundled(spec: ArchSpec, name: str) -> Network:
    path = WEIGHTS / f"{name}.safetensors"
    if not path.is_file():
        have = ", ".join(sorted(f"zoo:{file.stem}" for file in WEIGHTS.glob("*.safetensors"))) or "none"
        raise UsageError(
            f"{spec.ref} comes without trained weights (those that have them: {have}); "
            f"leave --pretrained out, or make them with `se-prune train --arch {spec.ref}`."
        )
    other = sorted(set(spec.kwargs) - registry.COMMON_KWARGS)
    if other:
        raise UsageError(
            f"the bundled {spec.ref} has its own {other[0]}; leave that option or --pretrained out."
        )
    network = artifact.load(path)
    _require_sizes(network, spec.kwargs, f"the bundled {spec.ref}")
    return network


def _pretrained(spec: ArchSpec, library: str, name: str) -> nn.Module:
    """Build a library's network with the weights that the library downloads."""
    kwargs: dict[str, Any] = dict(spec.kwargs)
    if library not in {"timm", "torchvision"}:
        raise UsageError(
            f"--pretrained works for zoo:, timm: and torchvision:, not for {spec.ref}; "
            f"give a checkpoint file with --arch {spec.ref} instead."
        )
    try:
        if library == "timm":
            import timm

            if "in_channels" in kwargs:
                kwargs["in_chans"] = kwargs.pop("in_channels")
            module: nn.Module = timm.create_model(name, pretrained=True, **kwargs)
        else:
            from torchvision import models

            module = models.get_model(name, weights="DEFAULT", **kwargs)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"{spec.ref} has no pretrained weights with {kwargs} ({first_line(error)}); "
            "leave these options out."
        ) from error
    except Exception as error:  # every download library has exceptions of its own
        raise CheckpointError(
            f"cannot get the pretrained weights of {spec.ref} ({first_line(error)}); check the network, or "
            f"download the file elsewhere and open it with --arch {spec.ref}."
        ) from error
    return module


# Files.


def _open_file(path: Path, arch: str | None, sizes: dict[str, int], ema: bool) -> Network:
    start = read_start(path)
    if artifact.is_artifact(path):
        _require_no_ema(ema, str(path))
        return _open_artifact(path, arch, sizes)
    weights = read_weights(path, start, ema=ema)
    check_values(weights.tensors, path)
    ref = recognise(weights, str(path)) if arch is None else arch
    spec, module = _fitted(path, registry.resolve(ref, **sizes), weights.tensors, sizes)
    details: dict[str, Any] = {"file": path.name, "sha256": digest(path)}
    if arch is None:
        details["arch"] = f"{spec.ref}, recognised by the tensors"
        head = head_of(module)
        classes = "" if head is None else f" with {outputs(head[1])} classes"
        LOG.warning("%s has the tensors of %s%s; --arch overrules this.", path, spec.ref, classes)
    if weights.averaged:
        details["weights"] = "average"
    if weights.average_beside:
        LOG.warning("%s holds averaged weights as well; --ema opens those.", path)
    if weights.averaged and not ema:
        LOG.warning("%s holds averaged weights alone; they were opened.", path)
    entry = HistoryEntry(stage="opened", details=details)
    return Network(module=module, header=_header(spec, module, entry))


def _open_artifact(path: Path, arch: str | None, sizes: Mapping[str, int]) -> Network:
    own = artifact.read_header(path).arch.ref
    asked = None if arch is None else registry.resolve(arch).ref
    if asked is not None and asked != own:
        raise CheckpointError(
            f"{path} is a {own}, not a {asked}; leave --arch out, since an artifact names its architecture."
        )
    network = artifact.load(path, trust=asked)
    _require_sizes(network, sizes, str(path))
    check_values(network.module.state_dict(), path)
    return network


def _require_sizes(network: Network, asked: Mapping[str, Any], what: str) -> None:
    """Refuse a class count or input channels other than a trained network has."""
    head = head_of(network.module)
    own = {"in_channels": network.header.preprocessing.input_size[0]}
    if head is not None:
        own["num_classes"] = outputs(head[1])
    for name, value in own.items():
        if asked.get(name, value) != value:
            raise CheckpointError(_disagreement(what, name, value, asked[name]))


def _disagreement(what: str, name: str, own: int, asked: int) -> str:
    noun = {"num_classes": "classes", "in_channels": "input channels"}[name]
    return f"{what} has {own} {noun}, not {asked}; leave {name} out, or open another file."


# Fitting a state dict to an architecture.


def _fitted(
    path: Path, spec: ArchSpec, state: Mapping[str, torch.Tensor], asked: Mapping[str, int]
) -> tuple[ArchSpec, nn.Module]:
    """Build the architecture in the checkpoint's sizes and load it strictly."""
    spec = adapted(spec, state)
    module = registry.build(spec)
    state = renamed(state, module.state_dict().keys())
    found = {}
    for name, built, stored in stored_sizes(module, state):
        if stored != built and name in asked:
            raise CheckpointError(_disagreement(str(path), name, stored, built))
        if stored != built:
            found[name] = stored
    if found:
        spec = dataclasses.replace(spec, kwargs={**spec.kwargs, **found})
        module = registry.build(spec)
    check_floats(module.state_dict(), state, path)
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        different = differences(module.state_dict(), state) or artifact.short_mismatch(error)
        raise CheckpointError(
            f"{path} does not fit {spec.ref}: {different}; check --arch, or leave it out."
        ) from error
    return spec, module
