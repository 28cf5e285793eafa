"""Networks to files of edge runtimes; every file is checked against the torch network before it is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from se_prune.errors import DataError, UsageError, nearest
from se_prune.export.onnx import export_onnx
from se_prune.results import Exported

if TYPE_CHECKING:
    from se_prune.artifact import Network

__all__ = ["TARGETS", "export", "require_target"]

#: Writes a network to a path and checks it on preprocessed images (N, C, H, W).
Exporter = Callable[["Network", Path, torch.Tensor], Exported]

TARGETS: dict[str, Exporter] = {"onnx": export_onnx}


def export(network: Network, target: str, output: str | Path, images: torch.Tensor) -> Exported:
    """Write `network` for a runtime, check it on real images, and measure it; the file appears whole or not at all.

    Args:
        network: The network with its header; it is copied, not changed.
        target: A key of `TARGETS`.
        output: The file to write.
        images: Real images (N, C, H, W), preprocessed as the header says; white noise misleads, because
            its logits lie far outside of what the network was trained for.

    Raises:
        UsageError: The target is unknown.
        DataError: The images do not have the network's input size.
        SePruneError: A package is missing, the network cannot be converted, or the file does not compute
            what the network computes.
    """
    require_target(target)
    _require_images(images, network.header.preprocessing.input_size)
    return TARGETS[target](network, Path(output), images)


def require_target(target: str) -> None:
    """Check that there is an export target of a name.

    Raises:
        UsageError: There is none; the message lists all.
    """
    if target not in TARGETS:
        known = ", ".join(sorted(TARGETS))
        raise UsageError(
            f"there is no export target '{target}'{nearest(target, TARGETS)}; --to takes {known}."
        )


def _require_images(images: torch.Tensor, input_size: tuple[int, int, int]) -> None:
    if images.ndim != 4 or len(images) == 0 or tuple(images.shape[1:]) != tuple(input_size):
        expected = ", ".join(str(size) for size in input_size)
        raise DataError(
            f"the export is checked on images of shape (N, {expected}) with N of at least 1, "
            f"got {tuple(images.shape)}; check --data and --input-size."
        )
