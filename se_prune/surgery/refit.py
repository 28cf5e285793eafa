"""Repair by least squares: every layer that lost inputs is fitted to what the dense network computed there.

Shapes: N images, G groups of a layer (1 but for grouped convolutions), I inputs of a group (its input channels × kernel
positions, and 1 for the bias), O outputs of a group; each group is fitted by itself. For a layer with kept inputs x and
the dense network's pre-activation y of its kept outputs, the new weights minimise E‖x·W − y‖² + λ·‖W − W_cut‖² in
closed form from the Gram matrix of x (I, I), over some positions P of every image (`gates.moments`). Where a gate
scales the outputs (a depthwise convolution in between or not), the error of output c is weighted by the dense
network's s_c² of each image, with a Gram matrix per output: what the gate shuts need not be right. A layer that a BN
alone reads is fitted up to a constant, which goes into the BN's running mean. Layers are taken in the order in which
they run, each on inputs that those before it have already repaired; no labels are needed. Both networks run once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from se_prune import distributed
from se_prune.artifact import NORM_TYPES
from se_prune.data.source import share_unreadable
from se_prune.errors import DataError
from se_prune.gates.moments import (
    LAYER_TYPES,
    has_rows,
    sample_positions,
)
from se_prune.gates.tap import tap
from se_prune.gates.trace import norms_after, trace
from se_prune.records import Coupling, GateSite, LayerRefit, Plan, Preprocessing
from se_prune.surgery.fit import Wanted, fit_layer
from se_prune.surgery.lost import lost_channels

if TYPE_CHECKING:
    from se_prune.data import Split

#: Every n-th image is held out to check each layer.
HELD_OUT = 5
#: Bytes of dense responses that are kept at a time; where more would be needed, fewer images are used.
RESPONSE_BYTES = 2 << 30


@torch.no_grad()
def refit(
    dense: nn.Module,
    cut_network: nn.Module,
    couplings: Sequence[Coupling],
    plan: Plan,
    *,
    split: Split,
    preprocessing: Preprocessing,
    device: torch.device,
    batch_size: int = 128,
    sites: Sequence[GateSite] = (),
    changed: Collection[str] = (),
    on_images: Callable[[int], None] | None = None,
) -> tuple[LayerRefit, ...]:
    """Re-fit, in place, every convolution and linear layer of `cut_network` whose inputs the plan removed.

    Several processes share the images, and all fit the same weights to the moments of all of them.

    Depthwise convolutions (which lose outputs with their inputs), modules that run more than once, and a layer
    whose error on held-out images would not fall keep their weights. Of BN only running means change; re-estimate
    the statistics afterwards.

    Args:
        dense: The network before the cut; left as it is.
        cut_network: The same network cut by `plan`, with its weights unrepaired.
        couplings: The channel groups of the dense network.
        plan: What was removed.
        split: Images to fit on; every fifth is held out. Fewer are used where the dense responses would take
            more than `RESPONSE_BYTES`.
        preprocessing: How the network wants its images.
        device: Where to compute; both networks stay on it, in eval mode.
        batch_size: Images per pass of the dense network.
        sites: The gate sites of the dense network, which weight what they scale; those that the plan folds do not.
        changed: Further layers that are re-fitted, since the plan changed their inputs.
        on_images: Called with the count of images that are done.

    Returns:
        One record per layer with lost inputs, in the order in which they ran.

    Raises:
        DataError: There are fewer images than `HELD_OUT`, or than processes.
    """
    least = max(HELD_OUT, distributed.size())
    if len(split) < least:
        raise DataError(
            f"the least-squares repair needs {least} images or more, got {len(split)}; check --data, or repair "
            "with --repair bn."
        )
    batch_size = min(batch_size, len(split) // distributed.size())  # some images for everyone
    kept = _kept_outputs(dense, couplings, plan)
    modules = dict(cut_network.named_modules())
    wanted = sorted({*lost_channels(plan, couplings, "in"), *changed} & kept.keys() & modules.keys())
    targets = {name: kept[name] for name in wanted if has_rows(modules[name])}
    dense.to(device).eval()
    cut_network.to(device).eval()
    gating = _gating(targets, sites, couplings, plan)
    places = distributed.share(len(split), batch_size)
    batches = (images.to(device) for images, _ in split.take(places).batches(batch_size, preprocessing))
    images, responses = _dense_responses(dense, targets, gating, batches, on_images)
    share_unreadable(split)
    norms = {
        layer: modules[name]
        for layer, name in norms_after(trace(dense, images[:1])).items()
        if isinstance(modules.get(name), NORM_TYPES) and modules[name].running_mean is not None
    }
    fits: list[LayerRefit] = []
    held_out = places[: len(images)].to(device) % HELD_OUT == HELD_OUT - 1
    handles = [
        modules[name].register_forward_pre_hook(_fit_hook(name, wanted, held_out, norms.get(name), fits))
        for name, wanted in responses.items()
    ]
    try:
        cut_network(images)
    finally:
        for handle in handles:
            handle.remove()
    if on_images is not None:
        on_images(len(images) * distributed.size())
    return tuple(fits)


def _kept_outputs(dense: nn.Module, couplings: Sequence[Coupling], plan: Plan) -> dict[str, torch.Tensor]:
    """Return per layer which outputs (indices) of the dense network the cut one still has."""
    lost = lost_channels(plan, couplings)
    return {
        name: torch.tensor([i for i in range(len(module.weight)) if i not in lost.get(name, ())])
        for name, module in dense.named_modules()
        if isinstance(module, LAYER_TYPES)
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gating:
    """The site that scales a layer's outputs, and which of its channels (O,) each kept output is."""

    site: GateSite
    channels: torch.Tensor


def _gating(
    targets: Mapping[str, torch.Tensor],
    sites: Sequence[GateSite],
    couplings: Sequence[Coupling],
    plan: Plan,
) -> dict[str, _Gating]:
    """Return what scales the outputs of layers: of a site's features, or of what its depthwise features read."""
    folded = {site.name for site in plan.sites if site.action == "fold"}
    found: dict[str, _Gating] = {}
    for site in sites:
        if site.features is None or site.name in folded:
            continue
        if site.features in targets:
            found[site.features] = _Gating(site=site, channels=targets[site.features])
            continue
        for coupling in couplings:
            own = [p for p in coupling.slices if p.layer == site.features and p.role == "channelwise"]
            channel_of = {r: i for p in own for i, r in zip(p.index, p.root, strict=True)}
            for piece in coupling.slices if channel_of else ():
                if piece.role == "out" and piece.layer in targets.keys() - set(site.layers):
                    root = dict(zip(piece.index, piece.root, strict=True))
                    channels = [channel_of.get(root.get(i, -1), -1) for i in targets[piece.layer].tolist()]
                    if min(channels, default=-1) >= 0:
                        found[piece.layer] = _Gating(site=site, channels=torch.tensor(channels))
    return found


def _dense_responses(
    dense: nn.Module,
    targets: Mapping[str, torch.Tensor],
    gating: Mapping[str, _Gating],
    batches: Iterable[torch.Tensor],
    on_images: Callable[[int], None] | None,
) -> tuple[torch.Tensor, dict[str, Wanted]]:
    """Run the dense network; return the images that were used and what each target is to compute for them."""
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in targets}
    seen: dict[str, list[torch.Tensor]] = {g.site.name: [] for g in gating.values()}
    modules = dict(dense.named_modules())

    def keep(name: str) -> Callable[..., None]:
        index = targets[name].to(next(dense.parameters()).device)

        def hook(_: nn.Module, __: Any, output: torch.Tensor) -> None:
            if isinstance(modules[name], nn.Conv2d):
                chosen = sample_positions(output[0, 0].numel(), output.device)
                parts[name].append(output.flatten(2).index_select(2, chosen).index_select(1, index))
            else:
                parts[name].append(output.index_select(output.ndim - 1, index))

        return hook

    def on_gate(site: GateSite, _: torch.Tensor, gate: torch.Tensor) -> None:
        seen[site.name].append(gate.flatten(1))

    handles = [modules[name].register_forward_hook(keep(name)) for name in targets]
    used: list[torch.Tensor] = []
    try:
        with tap(dense, [g.site for g in gating.values()], on_gate):
            for batch in batches:
                used.append(batch)
                dense(batch)
                if on_images is not None:
                    on_images(len(batch) * distributed.size())
                stored = sum(p.nbytes for values in parts.values() for p in values)
                if stored * (1 + 1 / len(used)) > RESPONSE_BYTES:
                    break
    finally:
        for handle in handles:
            handle.remove()
    gates = {
        name: torch.cat(seen[g.site.name])[:, g.channels.to(used[0].device)]
        for name, g in gating.items()
        if len(seen[g.site.name]) == len(used)
    }
    return torch.cat(used), {
        name: Wanted(outputs=torch.cat(values), gates=gates.get(name))
        for name, values in parts.items()
        if len(values) == len(used)
    }


def _fit_hook(
    name: str,
    wanted: Wanted,
    held_out: torch.Tensor,
    norm: nn.Module | None,
    fits: list[LayerRefit],
) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(module, LAYER_TYPES)
        fits.append(fit_layer(name, module, inputs[0], wanted, held_out=held_out, norm=norm))

    return hook
