"""Our one-file network: safetensors whose header carries the architecture and the size of every cut layer.

An artifact opens without the dense checkpoint and without pickle: the dense network is built from the header's
architecture, its layers are set to the recorded sizes, and the tensors are loaded strictly.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from se_prune.errors import CheckpointError, SePruneError
from se_prune.files import whole_file
from se_prune.records import ArtifactHeader, Geometry, from_json, to_json
from se_prune.zoo import registry

if TYPE_CHECKING:
    from collections.abc import Mapping

HEADER_KEY = "se_prune"
CONV_TYPES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORM_TYPES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(slots=True, kw_only=True)
class Network:
    """A module together with all that its file says of it."""

    module: nn.Module
    header: ArtifactHeader


def geometry(module: nn.Module) -> Geometry | None:
    """Return the size of a layer, or None for a module that has none."""
    if isinstance(module, CONV_TYPES):
        return Geometry(
            in_channels=module.in_channels, out_channels=module.out_channels, groups=module.groups
        )
    if isinstance(module, nn.Linear):
        return Geometry(in_channels=module.in_features, out_channels=module.out_features)
    if isinstance(module, NORM_TYPES):
        return Geometry(in_channels=module.num_features, out_channels=module.num_features)
    return None


def changed_geometry(dense: nn.Module, cut: nn.Module) -> dict[str, Geometry]:
    """Return the layers of `cut` whose size differs from the same layer of `dense`."""
    modules = dict(dense.named_modules())
    result = {}
    for name, module in cut.named_modules():
        size = geometry(module)
        if size is not None and size != geometry(modules[name]):
            result[name] = size
    return result


def resize(module: nn.Module, size: Geometry) -> None:
    """Set a layer to a recorded size; its parameters become uninitialised tensors of the new shapes.

    Raises:
        CheckpointError: The layer is of another kind, or the size is impossible.
    """
    if min(size.in_channels, size.out_channels, size.groups) < 1 or size.in_channels % size.groups:
        raise CheckpointError(f"the artifact records an impossible layer size: {size}.")
    if isinstance(module, CONV_TYPES):
        module.in_channels, module.out_channels, module.groups = (
            size.in_channels,
            size.out_channels,
            size.groups,
        )
        shape = (size.out_channels, size.in_channels // size.groups, *module.kernel_size)
    elif isinstance(module, nn.Linear):
        module.in_features, module.out_features = size.in_channels, size.out_channels
        shape = (size.out_channels, size.in_channels)
    elif isinstance(module, NORM_TYPES):
        module.num_features = size.out_channels
        shape = (size.out_channels,)
    else:
        raise CheckpointError(f"the artifact resizes a {type(module).__name__}, which has no channels.")
    for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        if tensor.ndim:
            target = torch.empty(shape if name == "weight" else (size.out_channels,), dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                setattr(module, name, nn.Parameter(target))
            else:
                module.register_buffer(name, target)


def save(path: str | Path, network: Network) -> None:
    """Write an artifact, whole or not at all.

    Raises:
        SePruneError: The file cannot be written.
    """
    tensors = {
        key: value.detach().cpu().contiguous().clone() for key, value in network.module.state_dict().items()
    }
    with whole_file(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={HEADER_KEY: to_json(network.header)})
        except SafetensorError as error:
            raise OSError(0, str(error)) from error


def is_artifact(path: str | Path) -> bool:
    """Say whether a file is safetensors with our header; False for anything unreadable."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return HEADER_KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def read_header(path: str | Path) -> ArtifactHeader:
    """Read the header of an artifact alone.

    Raises:
        CheckpointError: The file is missing, broken, or not an artifact.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; check the path.") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}); copy or download it again."
        ) from error
    if HEADER_KEY not in metadata:
        raise CheckpointError(
            f"{path} is a safetensors file but not an artifact; name its architecture with --arch."
        )
    try:
        return from_json(ArtifactHeader, metadata[HEADER_KEY], what=f"the header of {path}")
    except SePruneError as error:
        raise CheckpointError(f"{error} It was written by another version, or is damaged.") from error


def load(path: str | Path, *, trust: str | None = None) -> Network:
    """Open an artifact on the CPU, in eval mode.

    Args:
        path: The `.safetensors` file.
        trust: The user factory (`package.module:factory`) that the caller allows the file to call.

    Raises:
        CheckpointError: The file is missing, broken, unsafe, or does not fit its own architecture.
    """
    header = read_header(path)
    if header.arch.ref != trust and not registry.is_trusted(header.arch):
        raise CheckpointError(
            f"{path} wants to call {header.arch.ref}, which is not one of our libraries; "
            f"if you trust it, add --arch {header.arch.ref}."
        )
    with safe_open(str(path), framework="pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    module = registry.build(header.arch)
    apply_geometry(module, header.geometry, state, what=str(path))
    return Network(module=module.eval(), header=header)


def apply_geometry(
    module: nn.Module, sizes: Mapping[str, Geometry], state: Mapping[str, torch.Tensor], *, what: str
) -> None:
    """Resize the layers of a dense module and load `state` strictly.

    Raises:
        CheckpointError: A layer or a tensor is missing, left over, or of another shape.
    """
    modules = dict(module.named_modules())
    for name, size in sizes.items():
        if name not in modules:
            raise CheckpointError(f"{what} resizes '{name}', which its architecture does not have.")
        weight = state.get(f"{name}.weight")
        if weight is None or weight.shape[0] != size.out_channels:
            raise CheckpointError(f"{what}: the recorded size of '{name}' does not fit its tensor.")
        resize(modules[name], size)
    try:
        module.load_state_dict(dict(state), strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{what} does not fit its architecture: {short_mismatch(error)}.") from error


def short_mismatch(error: RuntimeError, limit: int = 3) -> str:
    """Return the first few lines of torch's list of missing, unexpected and mis-shaped keys as one line."""
    lines = [line.strip().rstrip(".") for line in str(error).splitlines()[1:] if line.strip()]
    more = f" (and {len(lines) - limit} more)" if len(lines) > limit else ""
    return "; ".join(line[:200] for line in lines[:limit]) + more


def clone(module: nn.Module) -> nn.Module:
    """Return a copy of a module on the CPU, without gradients, in eval mode."""
    result = copy.deepcopy(module).cpu().eval()
    for parameter in result.parameters():
        parameter.grad = None
    return result
