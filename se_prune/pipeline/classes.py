"""Compressing for the classes that a deployment needs: their images alone, and a head of their outputs.

Shapes: N images, K classes of the network, k of them kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from se_prune import artifact, channels
from se_prune.artifact import Network
from se_prune.data.source import DataSource, of_classes
from se_prune.errors import DataError, SurgeryError, UsageError, nearest
from se_prune.gates.sites import find_sites
from se_prune.pipeline.measure import require_classes
from se_prune.preprocessing import example_input
from se_prune.records import HistoryEntry

#: Largest difference of the kept outputs, relative to the largest, that float64 rounding explains.
TOLERANCE = 1e-9


def for_classes(network: Network, data: DataSource, names: Sequence[str]) -> tuple[Network, DataSource]:
    """Return the network with the outputs of some classes alone, and the data with their images alone.

    Args:
        network: A classifier of all classes of the data; left as it is.
        data: The data set.
        names: The classes to keep, two or more, in any order and case; outputs stay in the data's order.

    Raises:
        UsageError: Fewer than two classes, or one that the data does not have.
        DataError: The network does not fit the data.
        SurgeryError: The layer that makes the outputs was not found, or the proof fails.
    """
    by_name = {name.casefold(): i for i, name in enumerate(data.classes)}
    by_name |= {name: i for i, name in enumerate(data.classes)}
    unknown = [name for name in names if name not in by_name and name.casefold() not in by_name]
    if unknown:
        raise UsageError(
            f"{data.ref} has no class '{unknown[0]}'{nearest(unknown[0], data.classes)}; it has: "
            f"{', '.join(data.classes[:20])}{' …' if len(data.classes) > 20 else ''}."
        )
    kept = sorted({by_name.get(name, by_name.get(name.casefold(), -1)) for name in names})
    if len(kept) < 2:
        raise UsageError(f"--classes needs two classes or more to tell apart, got {len(kept)}.")
    require_classes(network, data)
    part = of_classes(data, kept)
    module = keep_outputs(network.module, example_input(network.header.preprocessing, 2), kept)
    header = replace(
        network.header,
        classes=part.classes,
        geometry=artifact.merged_geometry(network, module),
        history=(
            *network.header.history,
            HistoryEntry(stage="classes", details={"kept": list(part.classes), "of": len(data.classes)}),
        ),
    )
    return Network(module=module, header=header), part


def like(other: Network, network: Network, data: DataSource) -> Network:
    """Return another network of the data's classes with the outputs of `network` alone, to be compared with it.

    Raises:
        DataError: The two have the same classes in another order.
    """
    own, others = network.header.classes, other.header.classes
    if own != others and sorted(own) == sorted(others):
        raise DataError(
            f"the two networks number their classes in another way (class 0 is '{own[0]}' of one and '{others[0]}' of "
            "the other), so their outputs cannot be compared; give two that were trained on the same data."
        )
    if own == others or not own or len(own) == len(data.classes):
        return other
    return for_classes(other, data, own)[0]


@torch.no_grad()
def keep_outputs(model: nn.Module, example: torch.Tensor, kept: Sequence[int]) -> nn.Module:
    """Return a copy of a classifier that makes some of its K outputs, in the same order.

    Args:
        model: The classifier; left as it is.
        example: Images (N, C, H, W) of its input size.
        kept: Which outputs stay, ascending.

    Raises:
        SurgeryError: The layer that makes the outputs was not found, or the proof fails.
    """
    dense = artifact.clone(model)
    wanted = dense.double()(example.double())
    sites = find_sites(model, example[:1])
    heads = [
        coupling.group.name
        for coupling in channels.couplings(model, example[:1], sites)
        if coupling.group.channels == wanted.shape[1] and not coupling.layers("in")
    ]
    if len(heads) != 1:
        found = f"{len(heads)} layers" if heads else "no layer"
        raise SurgeryError(
            f"{found} could be the one that makes the classes; --classes cannot shrink this network."
        )
    gone = [i for i in range(wanted.shape[1]) if i not in kept]
    small = channels.remove(model, example[:1], {heads[0]: gone}).eval()
    got = artifact.clone(small).double()(example.double())
    gap = float((got - wanted[:, list(kept)]).abs().max())
    if not gap <= TOLERANCE * float(wanted.abs().max()):
        raise SurgeryError(
            f"the outputs of the kept classes changed by {gap:.2e}; nothing was written. Please report the "
            "architecture."
        )
    return small
