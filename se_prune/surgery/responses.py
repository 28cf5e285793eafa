"""What the dense network computed for a repair: outputs of layers and the gates that scale them, in a temporary file.

Shapes: N images, O outputs of a layer that stay, P positions, C channels of a gate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from se_prune import distributed
from se_prune.gates.moments import sample_positions
from se_prune.gates.tap import tap
from se_prune.records import Coupling, GateSite, Plan
from se_prune.surgery.spill import Spill, Spilled


@dataclass(frozen=True, slots=True, kw_only=True)
class Gating:
    """The site that scales a layer's outputs, and which of its channels (O,) each kept output is."""

    site: GateSite
    channels: torch.Tensor


def gating_of(
    targets: Mapping[str, torch.Tensor],
    sites: Sequence[GateSite],
    couplings: Sequence[Coupling],
    plan: Plan,
) -> dict[str, Gating]:
    """Return what scales the outputs of layers: of a site's features, or of what its depthwise features read."""
    folded = {site.name for site in plan.sites if site.action == "fold"}
    found: dict[str, Gating] = {}
    for site in sites:
        if site.features is None or site.name in folded:
            continue
        if site.features in targets:
            found[site.features] = Gating(site=site, channels=targets[site.features])
            continue
        for coupling in couplings:
            own = [p for p in coupling.slices if p.layer == site.features and p.role == "channelwise"]
            channel_of = {r: i for p in own for i, r in zip(p.index, p.root, strict=True)}
            for piece in coupling.slices if channel_of else ():
                if piece.role == "out" and piece.layer in targets.keys() - set(site.layers):
                    root = dict(zip(piece.index, piece.root, strict=True))
                    channels = [channel_of.get(root.get(i, -1), -1) for i in targets[piece.layer].tolist()]
                    if min(channels, default=-1) >= 0:
                        found[piece.layer] = Gating(site=site, channels=torch.tensor(channels))
    return found


@dataclass(slots=True, kw_only=True)
class Responses:
    """Per batch the images; per layer and batch its outputs; per layer what scales them, per site and batch its gate.

    Layers and sites that do not run once a batch, image by image, are not there.
    """

    images: list[Spilled] = field(default_factory=list)
    outputs: dict[str, list[Spilled]] = field(default_factory=dict)
    gates: dict[str, Gating] = field(default_factory=dict)
    by_site: dict[str, list[Spilled]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many images there are."""
        return sum(images.shape[0] for images in self.images)

    def of(self, name: str, number: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return a layer's outputs on a batch, (N, O, P) or (N, …, O), and the gates (N, O) that scale them."""
        outputs = self.outputs[name][number].load(device)
        gating = self.gates.get(name)
        if gating is None:
            return outputs, None
        gate = self.by_site[gating.site.name][number].load(device)
        return outputs, gate[:, gating.channels.to(device)]


def dense_responses(
    dense: nn.Module,
    targets: Mapping[str, torch.Tensor],
    gating: Mapping[str, Gating],
    batches: Iterable[torch.Tensor],
    *,
    limit: int,
    beside: int,
    on_images: Callable[[int], None] | None,
) -> Responses:
    """Run the dense network once over batches of images.

    Args:
        dense: The network.
        targets: Per layer which of its outputs (O,) are wanted.
        gating: What scales the outputs of layers.
        batches: Images (N, C, H, W).
        limit: Bytes of temporary files; it stops before the batch that would take more.
        beside: Bytes of other temporary files that every batch will take.
        on_images: Called with the count of images that are done.
    """
    spill, found = Spill(), Responses(gates=dict(gating))
    modules = dict(dense.named_modules())
    sites = {g.site.name: g.site for g in gating.values()}
    outputs: dict[str, list[torch.Tensor]] = {name: [] for name in targets}
    gates: dict[str, list[torch.Tensor]] = {name: [] for name in sites}

    def on_gate(site: GateSite, _: torch.Tensor, gate: torch.Tensor) -> None:
        gates[site.name].append(gate.flatten(1))

    handles = [
        modules[name].register_forward_hook(_keeper(outputs[name], index)) for name, index in targets.items()
    ]
    try:
        with tap(dense, list(sites.values()), on_gate):
            for batch in batches:
                dense(batch)
                found.images.append(spill.put(batch))
                for seen, table in ((outputs, found.outputs), (gates, found.by_site)):
                    for name, values in seen.items():
                        if [len(value) for value in values] == [len(batch)]:
                            table.setdefault(name, []).append(spill.put(values[0]))
                        values.clear()
                if on_images is not None:
                    on_images(len(batch) * distributed.size())
                done = len(found.images)
                if spill.size * (1 + 1 / done) + beside * (done + 1) > limit:
                    break
    finally:
        for handle in handles:
            handle.remove()
    done = len(found.images)
    found.outputs = {name: kept for name, kept in found.outputs.items() if len(kept) == done}
    found.by_site = {name: kept for name, kept in found.by_site.items() if len(kept) == done}
    found.gates = {name: g for name, g in gating.items() if g.site.name in found.by_site}
    return found


def _keeper(kept: list[torch.Tensor], index: torch.Tensor) -> Callable[..., None]:
    """Return a hook that keeps some outputs of a layer, of a convolution at some positions."""

    def hook(module: nn.Module, _: Any, output: torch.Tensor) -> None:
        own = index.to(output.device)
        if isinstance(module, nn.Conv2d):
            chosen = sample_positions(output[0, 0].numel(), output.device)
            kept.append(output.flatten(2).index_select(2, chosen).index_select(1, own))
        else:
            kept.append(output.index_select(output.ndim - 1, own))

    return hook
