"""Repair by least squares: every layer that lost inputs is fitted to what the dense network computed there.

Shapes: N images, G groups of a layer (1 but for grouped convolutions), I inputs of a group (its input channels × kernel
positions, and 1 for the bias), O outputs of a group; each group is fitted by itself. For a layer with kept inputs x and
the dense network's pre-activation y of its kept outputs, the new weights minimise E‖x·W − y‖² + λ·‖W − W_cut‖² in
closed form from the Gram matrix of x (I, I), over some positions P of every image (`gates.moments`). Where a gate
scales the outputs (a depthwise convolution in between or not), the error of output c is weighted by the dense
network's s_c² of each image, with a Gram matrix per output: what the gate shuts need not be right. A layer that a BN
alone reads is fitted up to a constant, which goes into the BN's running mean. Layers are taken in the order in which
they run, each on inputs that those before it have already repaired; no labels are needed.

Nothing is held for all images at once. The dense network runs once, and what it computed goes to a temporary file. For
each layer the batches pass in turn through the cut network up to it, and add to its sums; a pass begins where the last
one left off, or not much before (`surgery.replay`).

Fitted are convolutions of any kernel, grouped ones, and linear layers; `reduce` and `expand` of a gate among them,
whichever of the two they are, and the head. Not fitted, though they may lose inputs: depthwise convolutions, whose
inputs leave with their own outputs, so that what stays reads what it read before; modules that run more than once;
subclasses and paddings of which no rows can be taken, and layers with more than `moments.MAX_INPUTS` inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import nn

from se_prune import distributed
from se_prune.artifact import NORM_TYPES
from se_prune.data.source import share_unreadable
from se_prune.errors import DataError
from se_prune.gates.moments import LAYER_TYPES, has_rows
from se_prune.gates.trace import norms_after, trace
from se_prune.records import Coupling, GateSite, LayerRefit, Plan, Preprocessing
from se_prune.surgery.fit import LayerFit
from se_prune.surgery.lost import lost_channels
from se_prune.surgery.replay import Passing, record
from se_prune.surgery.responses import dense_responses, gating_of
from se_prune.surgery.spill import Spill, room

if TYPE_CHECKING:
    from se_prune.data import Split

#: Every n-th image is held out to check each layer.
HELD_OUT = 5
#: Bytes of temporary files; where more would be needed, or is not free, fewer images are used.
SPILL_BYTES = 16 << 30
#: Share of what is free on the disk that temporary files may take.
SPILL_SHARE = 0.8


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

    A layer whose error on held-out images would not fall keeps its weights. Of BN only running means change;
    re-estimate the statistics afterwards.

    Args:
        dense: The network before the cut; left as it is.
        cut_network: The same network cut by `plan`, with its weights unrepaired.
        couplings: The channel groups of the dense network.
        plan: What was removed.
        split: Images to fit on; every fifth is held out. Fewer are used where temporary files would take more than
            `SPILL_BYTES`, or than the disk has.
        preprocessing: How the network wants its images.
        device: Where to compute; both networks stay on it, in eval mode.
        batch_size: Images that run at once; in memory are one batch of them and the sums of one layer.
        sites: The gate sites of the dense network, which weight what they scale; those that the plan folds do not.
        changed: Further layers that are re-fitted, since the plan changed their inputs.
        on_images: Called with the count of images that are done.

    Returns:
        One record per layer with lost inputs, in the order in which they ran.

    Raises:
        DataError: There are fewer images than `HELD_OUT`, or than processes, or the disk is full.
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
    layers = {name: modules[name] for name in targets}
    dense.to(device).eval()
    cut_network.to(device).eval()
    places = distributed.share(len(split), batch_size)
    batches = (images.to(device) for images, _ in split.take(places).batches(batch_size, preprocessing))
    first = next(batches)
    tapes = {len(first): record(cut_network, first, layers)}
    responses = dense_responses(
        dense,
        targets,
        gating_of(targets, sites, couplings, plan),
        chain([first], batches),
        limit=_limit(),
        beside=2 * tapes[len(first)].largest(),
        on_images=on_images,
    )
    share_unreadable(split)
    norms = {
        layer: modules[name]
        for layer, name in norms_after(trace(dense, first[:1])).items()
        if isinstance(modules.get(name), NORM_TYPES) and modules[name].running_mean is not None
    }
    passings: list[Passing] = []
    for images in responses.images:
        count = images.shape[0]
        if count not in tapes:
            tapes[count] = record(cut_network, images.load(device), layers)
        passings.append(Passing(images=images, tape=tapes[count]))
    starts = tapes[len(first)].starts
    held_out = places[: responses.count].to(device) % HELD_OUT == HELD_OUT - 1
    parts = torch.split(held_out, [images.shape[0] for images in responses.images])
    fits: list[LayerRefit] = []
    order = sorted(responses.outputs.keys() & starts.keys(), key=lambda name: starts[name])
    for name, advance in zip(order, _shares(responses.count, len(order)), strict=True):
        module = modules[name]
        assert isinstance(module, LAYER_TYPES)
        fit = LayerFit(name, module, norm=norms.get(name), gated=name in responses.gates)
        spill = Spill()
        for number, (passing, part) in enumerate(zip(passings, parts, strict=True)):
            features = passing.input_of(cut_network, name, module, spill, device)
            fit.add(features, *responses.of(name, number, device), held_out=part)
        fits.append(fit.finish())
        if on_images is not None:
            on_images(advance * distributed.size())
    return tuple(fits)


def _limit() -> int:
    """Return the bytes of temporary files that this process may make."""
    sharing = max(1, distributed.size() // distributed.machines())
    return int(min(SPILL_BYTES, SPILL_SHARE * room() / sharing))


def _shares(count: int, parts: int) -> list[int]:
    """Return whole numbers, as equal as can be, whose sum is `count`."""
    return [count * (i + 1) // parts - count * i // parts for i in range(parts)]


def _kept_outputs(dense: nn.Module, couplings: Sequence[Coupling], plan: Plan) -> dict[str, torch.Tensor]:
    """Return per layer which outputs (indices) of the dense network the cut one still has."""
    lost = lost_channels(plan, couplings)
    return {
        name: torch.tensor([i for i in range(len(module.weight)) if i not in lost.get(name, ())])
        for name, module in dense.named_modules()
        if isinstance(module, LAYER_TYPES)
    }
