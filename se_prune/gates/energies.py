"""How much energy every channel carries where it is read: E[a²] per input channel of every consumer.

Shapes: N images, K classes, C channels, H×W positions. Sums are float64 and per class, so that two halves add up and
a subset of the classes can be asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from se_prune import distributed
from se_prune.artifact import CONV_TYPES
from se_prune.data.source import shared_batches
from se_prune.errors import DataError
from se_prune.records import Preprocessing

if TYPE_CHECKING:
    from se_prune.data import Split


@dataclass(slots=True, kw_only=True)
class ChannelEnergies:
    """Per layer and class Σ over images of the mean of a² over positions (K, C_in); `counts` (K,) images."""

    counts: torch.Tensor
    sums: dict[str, torch.Tensor]

    def merged(self, other: ChannelEnergies) -> ChannelEnergies:
        """Return the energies over both sets of images.

        Raises:
            DataError: They are of different networks.
        """
        if self.sums.keys() != other.sums.keys():
            raise DataError("these energies are of different networks and cannot be merged.")
        sums = {name: value + other.sums[name] for name, value in self.sums.items()}
        return ChannelEnergies(counts=self.counts + other.counts, sums=sums)

    def mean(self, layer: str) -> torch.Tensor:
        """Return E[a²] per input channel (C_in,) of a layer, over all images."""
        return self.sums[layer].sum(0) / self.counts.sum()


@torch.no_grad()
def collect_energies(
    model: nn.Module,
    split: Split,
    preprocessing: Preprocessing,
    *,
    classes: int,
    device: torch.device,
    batch_size: int = 256,
    on_batch: Callable[[int], None] | None = None,
) -> ChannelEnergies:
    """Run the network over the images and sum the energy at every convolution and linear layer's input.

    Several processes share the images, and all return the sums over all of them.

    Raises:
        DataError: There is no image.
    """
    if len(split) == 0:
        raise DataError("there are no images to measure channel energies on; check --data.")
    collector = _Collector(model, classes)
    model.to(device).eval()
    try:
        for images, labels in shared_batches(split, batch_size, preprocessing):
            collector.begin(labels)
            model(images.to(device, non_blocking=True))
            if on_batch is not None:
                on_batch(len(labels) * distributed.size())
    finally:
        collector.close()
    distributed.add_up(collector.counts)
    return ChannelEnergies(counts=collector.counts, sums=distributed.add_up_tables(collector.sums))


class _Collector:
    def __init__(self, model: nn.Module, classes: int) -> None:
        self.counts = torch.zeros(classes, dtype=torch.float64)
        self.sums: dict[str, torch.Tensor] = {}
        self.onehot = torch.zeros(0)
        self.handles = [
            module.register_forward_pre_hook(self._hook(name))
            for name, module in model.named_modules()
            if isinstance(module, (*CONV_TYPES, nn.Linear))
        ]

    def begin(self, labels: torch.Tensor) -> None:
        self.onehot = nn.functional.one_hot(labels, len(self.counts)).double().T
        self.counts += self.onehot.sum(1)

    def _hook(self, name: str) -> Callable[..., None]:
        def add(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            a = inputs[0]
            positions = a[0, 0].numel() if a.ndim > 2 else 1
            energy = torch.linalg.vector_norm(a.reshape(a.shape[0], a.shape[1], -1), dim=2).square()
            table = self.onehot @ (energy.cpu().double() / positions)
            self.sums[name] = self.sums[name] + table if name in self.sums else table

        return add

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
