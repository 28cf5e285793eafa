"""What scales the channels that can leave, for the group lasso: BN factors and the gates' rows."""

from __future__ import annotations

import torch

from se_prune.artifact import NORM_TYPES, Network
from se_prune.errors import UsageError
from se_prune.pipeline.measure import Structure
from se_prune.records import Coupling
from se_prune.training.lasso import ChannelScale, ScaledGroup


def scaled_groups(network: Network, found: Structure) -> tuple[ScaledGroup, ...]:
    """Return, for every group that can be cut (hidden units aside), the parameters that scale its channels.

    Raises:
        UsageError: Nothing scales any of them.
    """
    parameters = dict(network.module.named_parameters())
    norms = {name for name, module in network.module.named_modules() if isinstance(module, NORM_TYPES)}
    expands = {site.expand for site in found.sites}
    groups = []
    for coupling in found.couplings:
        if not coupling.group.prunable or coupling.group.kind == "hidden":
            continue
        scales = tuple(_scales(coupling, norms, expands, set(parameters)))
        if scales:
            groups.append(
                ScaledGroup(name=coupling.group.name, channels=coupling.group.channels, scales=scales)
            )
    if not groups:
        raise UsageError(
            "group_lasso acts on BN and on gates, and the network has neither at channels that can leave; set it to 0."
        )
    return tuple(groups)


def _scales(
    coupling: Coupling, norms: set[str], expands: set[str | None], parameters: set[str]
) -> list[ChannelScale]:
    found = []
    for piece in coupling.slices:
        of_bn = piece.role == "channelwise" and piece.layer in norms
        of_gate = piece.role == "out" and piece.layer in expands
        if (of_bn or of_gate) and f"{piece.layer}.weight" in parameters:
            found.append(
                ChannelScale(
                    parameter=f"{piece.layer}.weight",
                    index=torch.tensor(piece.index),
                    root=torch.tensor(piece.root),
                )
            )
    return found
