"""Our one-file network: safetensors whose header carries the architecture and the size of every cut layer.

An artifact opens without the dense checkpoint and without pickle: the dense network is built from the header's
architecture, its layers are set to the recorded sizes, and the tensors are loaded strictly.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from se_prune.computed import computes_weights, plain_like
from se_prune.errors import CheckpointError, SePruneError, UsageError
from se_prune.files import write_tensors
from se_prune.fixed import ConstantGate, filter_of, follow, resize_filter, width_lists
from se_prune.records import ArchSpec, ArtifactHeader, FoldKind, Geometry
from se_prune.schema import from_json, to_json
from se_prune.zoo import registry

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

HEADER_KEY = "se_prune"
CONV_TYPES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORM_TYPES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
#: What stands for the architecture of a module that its caller has built.
IN_HAND = "in hand"


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
    if isinstance(module, ConstantGate):
        return Geometry(in_channels=len(module.weight), out_channels=len(module.weight))
    if filter_of(module) is not None:
        channels = int(vars(module)["channels"])
        return Geometry(in_channels=channels, out_channels=channels, groups=channels)
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


def merged_geometry(before: Network, after: nn.Module) -> dict[str, Geometry]:
    """Return the recorded sizes of `after`, made from a network that may have been cut before."""
    sizes = {**before.header.geometry, **changed_geometry(before.module, after)}
    names = {name for name, _ in after.named_modules()}
    return {name: size for name, size in sizes.items() if name in names}


def made_plain(before: Network, after: nn.Module) -> tuple[str, ...]:
    """Return the convolutions of `after` that hold the weights which their dense ones compute."""
    modules = dict(before.module.named_modules())
    new = [
        name
        for name, module in after.named_modules()
        if name in modules
        and computes_weights(modules[name])
        and not computes_weights(module)
        and isinstance(module, CONV_TYPES)
    ]
    return (*before.header.plain, *new)


def make_plain(module: nn.Module, names: Sequence[str], *, what: str) -> None:
    """Put plain convolutions in the place of those that compute their weights; theirs are still to be loaded.

    Raises:
        CheckpointError: A name is of no such convolution.
    """
    for name in names:
        layer = dict(module.named_modules()).get(name)
        if layer is None or not computes_weights(layer):
            raise CheckpointError(f"{what} calls '{name}' plain, which computes no weights; it is damaged.")
        replace_module(module, name, plain_like(layer))


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in the place of another, by its name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


def weight_shape(module: nn.Module, size: Geometry) -> tuple[int, ...]:
    """Return the shape of a layer's weight at a recorded size.

    Raises:
        CheckpointError: The layer is of another kind, or the size is impossible.
    """
    impossible = CheckpointError(f"the artifact records an impossible layer size: {size}.")
    if min(size.in_channels, size.out_channels, size.groups) < 1 or size.in_channels % size.groups:
        raise impossible
    if isinstance(module, CONV_TYPES):
        depthwise = module.groups == module.in_channels and size.groups == size.in_channels
        if size.groups != module.groups and not depthwise:
            raise impossible
        return (size.out_channels, size.in_channels // size.groups, *module.kernel_size)
    if isinstance(module, nn.Linear):
        return (size.out_channels, size.in_channels)
    if isinstance(module, (*NORM_TYPES, ConstantGate)):
        return (size.out_channels,)
    kernel = filter_of(module)
    if kernel is not None:
        if not size.in_channels == size.out_channels == size.groups:
            raise impossible
        return (size.out_channels, *getattr(module, kernel).shape[1:])
    raise CheckpointError(f"the artifact resizes a {type(module).__name__}, which has no channels.")


def resize(module: nn.Module, size: Geometry) -> None:
    """Set a layer to a recorded size; its parameters become uninitialised tensors of the new shapes.

    Raises:
        CheckpointError: The layer is of another kind, or the size is impossible.
    """
    shape = weight_shape(module, size)
    if filter_of(module) is not None:
        resize_filter(module, size.out_channels)
        return
    if isinstance(module, CONV_TYPES):
        module.in_channels, module.out_channels, module.groups = (
            size.in_channels,
            size.out_channels,
            size.groups,
        )
    elif isinstance(module, nn.Linear):
        module.in_features, module.out_features = size.in_channels, size.out_channels
    elif isinstance(module, NORM_TYPES):
        module.num_features = size.out_channels
    for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        if tensor.ndim:
            target = tensor.new_empty(shape if name == "weight" else (size.out_channels, *tensor.shape[1:]))
            if isinstance(tensor, nn.Parameter):
                setattr(module, name, nn.Parameter(target))
            else:
                module.register_buffer(name, target)


def save(path: str | Path, network: Network) -> None:
    """Write an artifact, whole or not at all.

    Raises:
        UsageError: Nothing says how to build the network again.
        SePruneError: The file cannot be written.
    """
    if network.header.arch.ref == IN_HAND:
        raise UsageError(
            "an artifact names the factory of its network: give compress(…, "
            "arch=ArchSpec(ref='package.module:factory')), or save the module in your own way."
        )
    write_tensors(path, network.module.state_dict(), {HEADER_KEY: to_json(network.header)})


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
        raise CheckpointError(
            f"{str(error).rstrip('.')}; it was written by another version, or is damaged: copy or make it again."
        ) from error


def load(path: str | Path, *, trust: str | None = None) -> Network:
    """Open an artifact on the CPU, in eval mode.

    Args:
        path: The `.safetensors` file.
        trust: The user factory (`package.module:factory`) that the caller allows the file to call; it does not
            widen what a file may ask of a library.

    Raises:
        CheckpointError: The file is missing, broken, unsafe, or does not fit its own architecture.
    """
    header = read_header(path)
    own = registry.is_library(header.arch.ref)
    if own and not registry.is_trusted(header.arch):
        raise CheckpointError(
            f"{path} asks for {header.arch.ref} with {registry.shown(header.arch).kwargs}, which no artifact of ours "
            "does; it is damaged, of another version, or not to be trusted."
        )
    if not own and header.arch.ref != trust:
        raise CheckpointError(
            f"{path} wants to call {header.arch.ref}, which is not one of our libraries; "
            f"if you trust it, add --arch {header.arch.ref}."
        )
    with safe_open(str(path), framework="pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    module = _dense(header.arch, state, str(path)) if own else registry.build(header.arch)
    _require_blocks(module, header.folded, what=str(path))
    replace_blocks(module, header.folded)
    make_plain(module, header.plain, what=str(path))
    apply_geometry(module, header.geometry, state, what=str(path))
    return Network(module=module.eval(), header=header)


def _dense(spec: ArchSpec, state: Mapping[str, torch.Tensor], what: str) -> nn.Module:
    """Build a library's network from a header that may say anything.

    No size in the arguments can be larger than the largest side of a tensor in the file, and no network has more
    layers than tensors. Networks of the zoo and of ONNX files get no memory before their tensors are known to fit.

    Raises:
        CheckpointError: The arguments do not go with the tensors, or no network can be built from them.
    """
    largest = max((side for tensor in state.values() for side in tensor.shape), default=0)
    for name, value in spec.kwargs.items():
        limit = len(state) if name == "depth" else largest
        if isinstance(value, int | float) and not 0 <= value <= limit:
            raise CheckpointError(
                f"{what} asks for {spec.ref} with {name}={value}, which does not go with its tensors; it is damaged."
            )
    try:
        with torch.device("meta") if spec.ref.startswith(("zoo:", "onnx:")) else contextlib.nullcontext():
            return registry.build(spec)
    except CheckpointError as error:
        raise CheckpointError(f"{what}: {error}") from error
    except Exception as error:  # whatever a factory raises, the header's arguments made it do so
        raise CheckpointError(
            f"{what} asks for {spec.ref} with {registry.shown(spec).kwargs}, which cannot be built ({error}); "
            "it is damaged, or was written with other versions of the libraries."
        ) from error


def apply_geometry(
    module: nn.Module, sizes: Mapping[str, Geometry], state: Mapping[str, torch.Tensor], *, what: str
) -> None:
    """Resize the layers of a dense module and load `state` strictly; a module on `meta` takes its tensors.

    Raises:
        CheckpointError: A layer or a tensor is missing, left over, or of another shape.
    """
    modules = dict(module.named_modules())
    lists = list(width_lists(module))
    largest = max((side for tensor in state.values() for side in tensor.shape), default=0)
    for name, size in sizes.items():
        if name not in modules:
            raise CheckpointError(f"{what} resizes '{name}', which its architecture does not have.")
        shape = weight_shape(modules[name], size)
        stored = state.get(f"{name}.weight", state.get(f"{name}.running_mean"))
        fits = stored is not None and stored.shape == shape
        if filter_of(modules[name]) is not None:
            fits = (
                size.out_channels <= largest
            )  # a filter need not be stored; it is no wider than what it reads
        if not fits:
            raise CheckpointError(f"{what}: the recorded size of '{name}' does not fit its tensor.")
        resize(modules[name], size)
    for holder, name in lists:
        follow(holder, name)
    own = module.state_dict()
    given = {k: v.to(own[k].dtype, copy=True) if k in own else v for k, v in state.items()}
    try:
        module.load_state_dict(given, strict=True, assign=any(value.is_meta for value in own.values()))
    except RuntimeError as error:
        raise CheckpointError(f"{what} does not fit its architecture: {short_mismatch(error)}.") from error


def _require_blocks(module: nn.Module, kinds: Mapping[str, FoldKind], *, what: str) -> None:
    """Check that the blocks which a header calls folded are blocks of layers, none inside another.

    Raises:
        CheckpointError: One is not.
    """
    modules = dict(module.named_modules())
    for name in kinds:
        block = modules.get(name) if name else None
        gate = kinds[name] in {"constant", "unused"}
        if block is None or not any(geometry(m) for m in block.modules() if gate or m is not block):
            raise CheckpointError(f"{what} folds '{name}', which is no SE block of its architecture.")
        if any(name.startswith(f"{other}.") for other in kinds):
            raise CheckpointError(f"{what} folds '{name}' inside a block that it folds; it is damaged.")


def replace_blocks(
    module: nn.Module, kinds: Mapping[str, FoldKind], scales: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Put what folding leaves behind in the place of SE blocks.

    Args:
        module: The network; changed in place.
        kinds: Per block, by name, what takes its place.
        scales: Per block a constant (C,) for each channel; without, a `scale` has one channel and waits for
            `apply_geometry`.
    """
    for name, kind in kinds.items():
        new: nn.Module = nn.Identity()
        if kind == "constant":
            weight = next(module.get_submodule(name).parameters())
            new = ConstantGate(weight.new_zeros(1) if scales is None else scales[name].to(weight))
        if kind == "scale":
            like = next(module.get_submodule(name).parameters())
            value = like.new_ones(1) if scales is None else scales[name]
            new = nn.Conv2d(len(value), len(value), 1, groups=len(value), bias=False).to(like)
            with torch.no_grad():
                new.weight.copy_(value.view(-1, 1, 1, 1))
        replace_module(module, name, new.train(module.training))


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
