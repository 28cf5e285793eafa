"""A network to a file of a runtime, with the images of a data set for the check, for int8 and for its accuracy."""

from __future__ import annotations

from pathlib import Path

import torch

from se_prune import export as targets
from se_prune.artifact import Network
from se_prune.data import DataSource
from se_prune.data.source import Split, balanced_subset
from se_prune.errors import UsageError
from se_prune.export import runner
from se_prune.export.base import Pixels
from se_prune.pipeline.measure import matching
from se_prune.results import Exported


def real_images(split: Split, network: Network, count: int) -> torch.Tensor:
    """Return up to `count` preprocessed images (N, C, H, W), spread over the classes."""
    subset = balanced_subset(split, count, 0)
    return torch.cat([images for images, _ in subset.batches(256, network.header.preprocessing)])


def export_network(
    network: Network,
    target: str,
    output: str | Path,
    data: DataSource,
    *,
    images: int = 256,
    int8: bool = False,
    calibration: int = 256,
    max_drop: float | None = None,
    pixels: Pixels | None = None,
    with_runner: bool = False,
) -> Exported:
    """Write a network for a runtime, check it on training images, and measure it.

    Args:
        network: The network with its header.
        target: A key of `se_prune.export.TARGETS`.
        output: The file to write.
        data: Training images for the check and for int8, test images for the accuracy of int8.
        images: Training images to check the file on.
        int8: Write whole numbers of 8 bits, and compare their accuracy with the float file's on all test images.
        calibration: Other training images, for the ranges of int8.
        max_drop: Largest top-1 accuracy, a fraction, that int8 may lose.
        pixels: Put the preprocessing into the file: bytes of this layout in, probabilities out.
        with_runner: Write `predict.py` beside it.

    Raises:
        UsageError: An option is wrong.
        DropError: int8 loses more than `max_drop`; nothing is kept.
        SePruneError: The export failed, and left no file.
    """
    for option, value in (("--images", images), ("--calibration", calibration)):
        if value < 1:
            raise UsageError(f"{option} must be at least 1, got {value}.")
    if max_drop is not None and not int8:
        raise UsageError("--max-drop is what int8 may lose; give it with --int8.")
    targets.require_target(target, quantised=int8, pixels=pixels).require_packages(int8=int8)
    if with_runner:
        runner.require_runner(target, Path(output))
    data = matching(network, data)
    found = real_images(data.train, network, images + calibration if int8 else images)
    others = found[images:] if len(found) > images else found
    result = targets.export(
        network,
        target,
        output,
        found[:images],
        pixels=pixels,
        quantised=int8,
        calibration=others if int8 else None,
        test=data.test if int8 else None,
        max_drop=max_drop,
    )
    if with_runner:
        runner.write_runner(Path(output))
    return result
