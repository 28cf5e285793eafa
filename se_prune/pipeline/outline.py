"""What an architecture is and costs, for a list of many: networks of the zoo get no memory and compute nothing."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from se_prune.checkpoint import open_model
from se_prune.cost import count_cost, count_params
from se_prune.gates.sites import find_sites
from se_prune.preprocessing import example_input
from se_prune.records import ArchSpec, GateSite, Preprocessing
from se_prune.zoo import registry
from se_prune.zoo.paper import PRINTED, Printed


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """One line of the list: learnable parameters, and MACs of one image of `input_size` (C, H, W).

    `macs` are those of convolutions and fully connected layers, `macs_se` the part inside SE blocks; `printed`
    is what the paper says.
    """

    arch: str
    input_size: tuple[int, int, int]
    sites: int
    params: int
    macs: int
    macs_se: int
    printed: Printed | None


def outline(ref: str) -> Outline:
    """Build the architecture `LIBRARY:NAME` with random weights, look at it, and forget it.

    Raises:
        UsageError: There is none of that name.
    """
    library, _, name = ref.rpartition(":")
    if library == "zoo":
        return zoo_outline(registry.resolve(ref))
    network = open_model(ref)
    preprocessing = network.header.preprocessing
    sites = find_sites(network.module, example_input(preprocessing))
    cost = count_cost(network.module, preprocessing, sites)
    return Outline(
        arch=f"{library}:{name}",
        input_size=preprocessing.input_size,
        sites=len(sites),
        params=cost.params,
        macs=cost.macs,
        macs_se=cost.macs_se,
        printed=None,
    )


def zoo_outline(spec: ArchSpec, preprocessing: Preprocessing | None = None) -> Outline:
    """Return the outline of a network of the zoo, from one pass of shapes without values.

    Args:
        spec: Its name and arguments; the paper's figures are those of its name, whatever the arguments.
        preprocessing: Gives the input size; the network's own where None.

    Raises:
        UsageError: The arguments are wrong.
    """
    see = preprocessing or registry.default_preprocessing(spec)
    with torch.device("meta"):
        module = registry.build(spec)
        image = torch.empty(1, *see.input_size)
    with _counted(module) as macs:
        sites: tuple[GateSite, ...] = find_sites(module, image)
    gates = {layer for site in sites for layer in (site.reduce, site.expand) if layer is not None}
    return Outline(
        arch=spec.ref,
        input_size=see.input_size,
        sites=len(sites),
        params=count_params(module),
        macs=macs.total(),
        macs_se=sum(macs[layer] for layer in gates),
        printed=PRINTED.get(spec.ref.rpartition(":")[2]),
    )


@contextlib.contextmanager
def _counted(module: nn.Module) -> Iterator[Counter[str]]:
    """Count the MACs of each convolution and each fully connected layer that runs inside the block.

    Every weight of an output channel is used once at each position. `count_cost` needs values to trace a
    network, this does not; a test holds that they agree on the zoo.
    """
    macs: Counter[str] = Counter()

    def add(name: str) -> Any:
        def hook(layer: nn.Conv2d | nn.Linear, _: Any, output: torch.Tensor) -> None:
            macs[name] += output.numel() // layer.weight.shape[0] * layer.weight.numel()

        return hook

    layers = {n: m for n, m in module.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    handles = [layer.register_forward_hook(add(name)) for name, layer in layers.items()]
    try:
        yield macs
    finally:
        for handle in handles:
            handle.remove()
