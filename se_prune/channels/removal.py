"""Taking channels out of a network."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from se_prune.artifact import CONV_TYPES, NORM_TYPES, geometry, replace_module
from se_prune.channels.graph import Role, build_graph, role_of
from se_prune.channels.joints import fixed_filter
from se_prune.computed import mixes_inputs, plain
from se_prune.errors import SurgeryError
from se_prune.fixed import filter_of, follow, resize_filter, width_lists

#: Per layer and side, the channels that leave, in the dense network's numbering.
Lost = dict[tuple[nn.Module, Role], set[int]]


def _check_channels(graph: Any, root: nn.Module | None, name: str, channels: Sequence[int]) -> None:
    if root not in graph.module2node or not isinstance(root, (*CONV_TYPES, nn.Linear)):
        raise SurgeryError(f"the plan cuts '{name}', which this network does not have; plan it again.")
    width = graph.get_out_channels(root)
    strange = [c for c in channels if not 0 <= c < width]
    if strange or len(set(channels)) < len(channels):
        raise SurgeryError(
            f"the plan cuts channels {strange or list(channels)} of '{name}', which has {width}; plan it again."
        )


def remove(model: nn.Module, example: torch.Tensor, removed: Mapping[str, Sequence[int]]) -> nn.Module:
    """Return a copy of `model` without the given channels of each group (by the group's name).

    What leaves is looked up for all groups before any does, since torch-pruning numbers the parts of a
    concatenation anew after each.

    Raises:
        SurgeryError: A group or a channel is unknown, or a layer would lose all its channels or more channels of one
            of its groups than of another.
    """
    result = copy.deepcopy(model)
    graph = build_graph(result, example)
    modules = dict(result.named_modules())
    names = {module: name for name, module in modules.items()}
    lost: Lost = {}
    for name, channels in removed.items():
        if not channels:
            continue
        root = modules.get(name)
        _check_channels(graph, root, name, channels)
        prune = graph.get_pruner_of_module(root).prune_out_channels
        for item in graph.get_pruning_group(root, prune, sorted(channels)).items:
            module = fixed_filter(item.dep.target) or item.dep.target.module
            role = _role(module, item.dep.handler) if module in names else None
            if role is not None:
                gone = lost.setdefault((module, role), set())
                gone.update(map(int, item.idxs))
                if len(gone) >= _width(module, role):
                    raise SurgeryError(f"the plan removes every channel of '{name}'; raise --min-channels.")
    lost = _without_mixing(result, lost, names)
    lists = list(width_lists(result))
    current = {module: name for name, module in result.named_modules()}
    for (module, role), gone in lost.items():
        _shrink(module, role, gone, current[module])
    for holder, attribute in lists:
        follow(holder, attribute)
    for parameter in result.parameters():
        parameter.grad = None
    return result


def _without_mixing(model: nn.Module, lost: Lost, names: Mapping[nn.Module, str]) -> Lost:
    """Let plain convolutions do what those do that compute their weights from all inputs, where inputs leave."""
    new: dict[nn.Module, nn.Module] = {}
    for module, role in lost:
        if role == "in" and mixes_inputs(module):
            same = plain(module)
            if same is None:
                raise SurgeryError(
                    f"'{names[module]}' computes its weights from all its inputs; plan it again."
                )
            new[module] = same
    for module, same in new.items():
        replace_module(model, names[module], same)
    return {(new.get(module, module), role): gone for (module, role), gone in lost.items()}


def _role(module: nn.Module, handler: Any) -> Role | None:
    return "channelwise" if filter_of(module) is not None else role_of(module, handler)


def _width(module: nn.Module, role: Role) -> int:
    size = geometry(module)
    assert size is not None
    return size.in_channels if role == "in" else size.out_channels


def _shrink(module: Any, role: Role, gone: set[int], name: str) -> None:
    """Take channels from one side of a layer, from both where it maps each to itself."""
    kept = torch.tensor([i for i in range(_width(module, role)) if i not in gone])
    if filter_of(module) is not None:
        resize_filter(module, len(kept))
        return
    if isinstance(module, NORM_TYPES):
        module.num_features = len(kept)
        for own in ("weight", "bias", "running_mean", "running_var"):
            _keep(module, own, kept)
        return
    if role == "in":
        if isinstance(module, CONV_TYPES):
            _keep_inputs(module, kept, name)
        else:
            module.in_features = len(kept)
            _keep(module, "weight", kept, dim=1)
        return
    if isinstance(module, CONV_TYPES):
        if role == "channelwise":
            module.in_channels = module.groups = len(kept)
        else:
            _grouped(kept, module.out_channels, module.groups, name)
        module.out_channels = len(kept)
    else:
        module.out_features = len(kept)
    for own, tensor in list(module.named_parameters(recurse=False)):
        if tensor.ndim:  # weights, biases, and gains of scaled convolutions
            _keep(module, own, kept)


def _keep_inputs(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, kept: torch.Tensor, name: str) -> None:
    """Keep inputs of a convolution: each of its groups has its own among them, as many as any other."""
    places = _grouped(kept, module.in_channels, module.groups, name).to(module.weight.device)
    outputs = module.weight.chunk(module.groups)
    weight = torch.cat(
        [part.detach().index_select(1, own) for part, own in zip(outputs, places, strict=True)]
    )
    module.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
    module.in_channels = len(kept)


def _grouped(kept: torch.Tensor, width: int, groups: int, name: str) -> torch.Tensor:
    """Return the channels that each group keeps (groups, n), numbered within it.

    Raises:
        SurgeryError: The groups keep different numbers of channels.
    """
    share = width // groups
    counts = torch.bincount(kept // share, minlength=groups)
    if bool((counts != counts[0]).any()):
        raise SurgeryError(
            f"the plan takes {(share - counts).tolist()} channels from the groups of '{name}', which must lose "
            "equally many; plan it again."
        )
    return kept.view(groups, -1) % share


def _keep(module: nn.Module, own: str, kept: torch.Tensor, *, dim: int = 0) -> None:
    """Keep some channels of a parameter or a buffer, where the layer has it."""
    tensor = getattr(module, own, None)
    if not isinstance(tensor, torch.Tensor):
        return
    chosen = tensor.detach().index_select(dim, kept.to(tensor.device))
    if isinstance(tensor, nn.Parameter):
        setattr(module, own, nn.Parameter(chosen, requires_grad=tensor.requires_grad))
    else:
        setattr(module, own, chosen)
