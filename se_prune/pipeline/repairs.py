"""The repairs that follow a cut or a fold, in order, with their progress."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from se_prune.artifact import Network
from se_prune.data.source import Split, balanced_subset
from se_prune.device import inference_batch
from se_prune.gates.trace import trace
from se_prune.pipeline.measure import MEASURED_IMAGES, Reporter, Structure
from se_prune.records import LayerRefit, Plan, Preprocessing, RepairMode
from se_prune.schema import to_dict
from se_prune.surgery.affine import STEPS, tune
from se_prune.surgery.refit import HELD_OUT, refit
from se_prune.surgery.repair import recalibrate_bn, recalibrate_where_nearer

#: Images that least squares is fitted on, at most; of each only some positions are taken (`gates.moments`).
REFIT_IMAGES = 2048
#: Images, at most, that scales and shifts are tuned on, and on a CPU the MACs of the dense network on all of them.
TUNED_IMAGES, TUNED_MACS = 8192, 1 << 39
#: Images that run at once: of least squares, and of BN statistics, whose averages are of whole batches.
REFIT_BATCH, BN_BATCH = 128, 250
#: How many times the memory of inference gradients take.
GRADIENTS = 4
#: Positions of images that run at once, where that is more than a batch of plain inference; larger ones take memory.
BATCH_POSITIONS = 1 << 20


def repair_network(
    dense: Network,
    module: nn.Module,
    found: Structure,
    chosen: Plan,
    *,
    mode: RepairMode,
    train: Split,
    seed: int,
    device: torch.device,
    show: Reporter,
) -> tuple[dict[str, Any], tuple[LayerRefit, ...]]:
    """Repair a cut module in place; return what was done, for the history, and the layers' fits."""
    preprocessing, subset = dense.header.preprocessing, balanced_subset(train, MEASURED_IMAGES, seed)
    most = batch_of(preprocessing, device)
    done: dict[str, Any] = {"images": len(subset)}
    if mode == "bn":
        with show.stage("repair: BN statistics", len(subset)) as update:
            done["bn_recalibrated"] = recalibrate_bn(
                module,
                subset,
                preprocessing,
                device=device,
                batch_size=min(BN_BATCH, most),
                on_batch=update,
            )
        module.cpu()
        return done, ()
    fitted = balanced_subset(subset, REFIT_IMAGES, 0)
    with show.stage("repair: least squares", 2 * len(fitted)) as update:
        fits = refit(
            dense.module,
            module,
            found.couplings,
            chosen,
            split=fitted,
            preprocessing=preprocessing,
            device=device,
            batch_size=min(REFIT_BATCH, most),
            sites=found.sites,
            changed=layers_after_folds(dense.module, found, chosen),
            on_images=update,
        )
    with show.stage("repair: BN statistics", len(subset)) as update:
        count, before, after = recalibrate_where_nearer(
            dense.module,
            module,
            subset,
            fitted.take(
                torch.arange(HELD_OUT - 1, len(fitted), HELD_OUT)
            ),  # least squares has not seen these
            preprocessing,
            device=device,
            batch_size=min(BN_BATCH, most),
            on_batch=update,
        )
    if mode == "refit":
        affordable = TUNED_MACS // max(1, found.cost.macs) if device.type == "cpu" else TUNED_IMAGES
        more = balanced_subset(train, max(1, min(TUNED_IMAGES, affordable)), seed)
        with show.stage("repair: scales and shifts", STEPS * len(more)) as update:
            done["tuned"] = tune(
                dense.module,
                module,
                more,
                preprocessing,
                device=device,
                batch_size=min(REFIT_BATCH, max(1, most // GRADIENTS)),
                seed=seed,
                on_images=update,
            )
    dense.module.cpu()
    module.cpu()
    return done | {
        "refit_images": len(fitted),
        "refit": [to_dict(fit) for fit in fits],
        "bn_recalibrated": count,
        "divergence": [before, after],
    }, fits


def batch_of(preprocessing: Preprocessing, device: torch.device) -> int:
    """Return how many images of a size may run at once in a repair, so that it takes little more than inference."""
    _, height, width = preprocessing.input_size
    return max(inference_batch(device), BATCH_POSITIONS // (height * width))


def layers_after_folds(dense: nn.Module, found: Structure, chosen: Plan) -> list[str]:
    """Return the layers that run after the first gate which a plan folds: those whose inputs that changes."""
    names = {site.name for site in chosen.sites if site.action == "fold"}
    multiplies = {(site.owner, site.call, site.multiply) for site in found.sites if site.name in names}
    layers: dict[str, None] = {}
    started = False
    for node in trace(dense, found.example).nodes if multiplies else ():
        here = (node.module, node.call, node.multiply)
        started = started or (node.multiply is not None and here in multiplies)
        layers |= dict.fromkeys(node.layers if started else ())
    return list(layers)
