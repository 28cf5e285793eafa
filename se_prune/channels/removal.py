"""Taking channels out of a network."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from se_prune.artifact import CONV_TYPES
from se_prune.channels.graph import build_graph
from se_prune.errors import SurgeryError


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

    Raises:
        SurgeryError: A group or a channel is unknown, or a group would lose all its channels.
    """
    result = copy.deepcopy(model)
    graph = build_graph(result, example)
    modules = dict(result.named_modules())
    for name, channels in removed.items():
        if not channels:
            continue
        root = modules.get(name)
        _check_channels(graph, root, name, channels)
        prune = graph.get_pruner_of_module(root).prune_out_channels
        group = graph.get_pruning_group(root, prune, sorted(channels))
        if not graph.check_pruning_group(group):
            raise SurgeryError(f"the plan removes every channel of '{name}'; raise --min-channels.")
        group.prune()
    for parameter in result.parameters():
        parameter.grad = None
    return result
