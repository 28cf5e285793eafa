"""`compress`: a module in hand, made smaller in one call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn

from se_prune import artifact
from se_prune.artifact import Network
from se_prune.data.hand import HandImages, read_batches
from se_prune.data.source import DataSource
from se_prune.device import choose_device
from se_prune.errors import DataError, UsageError, first_line
from se_prune.pipeline.jobs import Applied, apply_plan, plan
from se_prune.pipeline.latency import Timing, resolve_rounding
from se_prune.pipeline.measure import MEASURED_IMAGES, Reporter, structure
from se_prune.recipe import budget_of
from se_prune.records import ArchSpec, ArtifactHeader, HiddenPolicy, Preprocessing, RepairMode
from se_prune.scoring.registry import find


def compress(
    model: nn.Module,
    images: Iterable[Any],
    *,
    sparsity: float | None = None,
    macs: float | None = None,
    params: float | None = None,
    latency: float | None = None,
    latency_ms: float | None = None,
    timing: Timing | None = None,
    criterion: str = "excitation",
    round_to: int | Literal["auto"] = 1,
    min_channels: int = 2,
    hidden: HiddenPolicy = "tie",
    repair: RepairMode = "refit",
    device: str = "auto",
    seed: int = 0,
    arch: ArchSpec | None = None,
    reporter: Reporter | None = None,
) -> Applied:
    """Measure, plan, cut, prove and repair a network that the caller has built.

    Args:
        model: A classifier of images in eager torch; left as it is.
        images: Training batches as the model wants them: (images, labels), as a `DataLoader` yields them, or images
            (N, C, H, W) alone. At most `MEASURED_IMAGES` are read.
        sparsity: Share of the channels to remove; give this or one of the next four.
        macs: Fraction of the MACs to keep.
        params: Fraction of the parameters to keep.
        latency: Fraction of the dense network's latency.
        latency_ms: Milliseconds per batch.
        timing: Where latency is measured; onnxruntime, one thread and one image at once where None.
        criterion: How channels are scored; `taylor`, `hessian` and `gate-fisher` need labels.
        round_to: Keep multiples of this many channels; "auto" measures what the runtime likes.
        min_channels: No group keeps fewer.
        hidden: What the hidden units of the gate sites do.
        repair: What follows the cut.
        device: Where to measure and repair.
        seed: Chooses images, and random scores.
        arch: The factory that builds the dense network, for an artifact that opens by itself.
        reporter: Shows progress.

    Returns:
        The plan, its proof and costs; `.network.module` is the small network.

    Raises:
        UsageError: Not one budget, a criterion that needs labels without them, or a network that gives no logits.
        BudgetError: The budget cannot be met.
        DataError: No images, batches of another kind, or images that the network does not take.
        SurgeryError: The network cannot be cut, or the proof fails.
    """
    budget = budget_of(sparsity, macs, params, latency=latency, latency_ms=latency_ms)
    split, labelled = read_batches(images, MEASURED_IMAGES)
    if not labelled and criterion in {"taylor", "hessian", "gate-fisher"}:
        raise UsageError(f"criterion '{criterion}' needs labels; give batches of (images, labels).")
    find(criterion)
    network = _network(model, split, arch)
    data = _data(network.module, split)
    found, target = structure(network), choose_device(device)
    timing = timing or Timing()
    chosen = plan(
        network,
        found,
        budget,
        criterion=criterion,
        device=target,
        data=data,
        round_to=resolve_rounding(round_to, network, found, timing, reporter),
        min_channels=min_channels,
        hidden=hidden,
        repair=repair,
        timing=timing,
        seed=seed,
        reporter=reporter,
    )
    return apply_plan(
        network, found, chosen, device=target, data=data, repair=repair, seed=seed, reporter=reporter
    )


def _network(model: nn.Module, split: HandImages, arch: ArchSpec | None) -> Network:
    channels, height, width = split.images.shape[1:]
    preprocessing = Preprocessing(
        input_size=(channels, height, width), mean=(0.0,) * channels, std=(1.0,) * channels
    )
    spec = arch or ArchSpec(ref=artifact.IN_HAND)
    return Network(
        module=artifact.clone(model), header=ArtifactHeader(arch=spec, preprocessing=preprocessing)
    )


def _outputs(module: nn.Module, image: torch.Tensor) -> int:
    """Return the class count of a classifier, as one image tells it."""
    shape = tuple(image.shape[1:])
    try:
        logits = module(image)
    except Exception as error:  # whatever the caller's own code raises at images that are not its own
        raise DataError(
            f"the network fails on float32 images of shape {shape}: {first_line(error)}; give the batches that its "
            "training took, and a network in float32 (model.float())."
        ) from error
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise UsageError(
            f"the network must give logits (N, K) for images (N, C, H, W), got {found}; wrap it in a module that does."
        )
    return logits.shape[1]


@torch.no_grad()
def _data(module: nn.Module, split: HandImages) -> DataSource:
    """Return the images as a data source; nothing is tested, so that there are no test images."""
    outputs = _outputs(module, split.images[:1])
    labels = split.labels
    if int(labels.min()) < 0 or int(labels.max()) >= outputs:
        raise UsageError(
            f"labels must be 0 to {outputs - 1} for a network of {outputs} outputs, got "
            f"{int(labels.min())} to {int(labels.max())}."
        )
    return DataSource(
        ref="images in hand",
        classes=tuple(str(i) for i in range(outputs)),
        train=split,
        test=split.take(torch.arange(0)),
    )
