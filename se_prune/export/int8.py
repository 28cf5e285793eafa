"""int8 beside float: both files of a network written, compared on real images, and judged on the test images."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from se_prune.errors import DropError, UsageError
from se_prune.evaluate import evaluate
from se_prune.export.base import (
    CHECK_BATCH,
    Measured,
    Run,
    Subject,
    Target,
    compare,
    latencies_ms,
    require_parity,
    size_of,
    to_pixels,
)
from se_prune.results import Int8

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from se_prune.data import Split

LOG = logging.getLogger(__name__)
#: A larger loss of top-1 accuracy, as a fraction, is told where the user gave no limit.
USUAL_DROP = 0.005


def require_drop(max_drop: float | None, test: Split | None) -> None:
    """Check `--max-drop`.

    Raises:
        UsageError: It is no fraction, or there are no test images to measure the loss on.
    """
    if max_drop is None:
        return
    if not 0 <= max_drop < 1:
        raise UsageError(f"--max-drop is a fraction of the images, 0.005 for half a point, got {max_drop:g}.")
    if test is None:
        raise UsageError("--max-drop needs test images to measure the loss on; give --data.")


def write(
    target: Target, subject: Subject, path: Path, *, test: Split | None, max_drop: float | None
) -> Measured:
    """Write the int8 file of a network to `path`, and compare it with the float file of the same target.

    Raises:
        DropError: It loses more accuracy than `max_drop`.
        SePruneError: The float file does not compute what the network computes.
    """
    dense = path.parent / "float" / path.name
    dense.parent.mkdir()
    target.write(subject, dense, False)
    reference = target.open(dense, subject, 1)
    require_parity(compare(subject, reference), subject, target.name)
    layers = target.write(subject, path, True)
    run = target.open(path, subject, 1)
    slow, fast = latencies_ms([reference, run], subject.example(1))
    n, before, after = _accuracies(subject, [reference, run], test)
    _judge(target, before, after, max_drop)
    before_bytes = size_of(target, dense)
    return Measured(
        parity=compare(subject, run),
        latency_ms=fast,
        note=target.note,
        int8=Int8(
            n=n,
            top1=after,
            top1_float=before,
            float_bytes=before_bytes,
            size_ratio=size_of(target, path) / before_bytes,
            float_latency_ms=slow,
            latency_ratio=fast / slow,
            output_db=decibel(*(_outputs(r, subject.images) for r in (reference, run))),
            calibration_images=len(subject.calibration),
            layers=layers,
        ),
    )


def decibel(exact: NDArray[Any], other: NDArray[Any]) -> float | None:
    """Return 10·log10 of the power of the exact values over that of the differences; None where there are none."""
    noise = float(np.square(other.astype(np.float64) - exact).sum())
    signal = float(np.square(exact.astype(np.float64)).sum())
    return 10 * float(np.log10(signal / noise)) if noise > 0 and signal > 0 else None


def _outputs(run: Run, images: torch.Tensor) -> NDArray[np.float32]:
    return np.concatenate([run(batch.numpy()) for batch in torch.split(images, CHECK_BATCH)])


def _judge(target: Target, before: float | None, after: float | None, max_drop: float | None) -> None:
    if before is None or after is None or before - after <= (USUAL_DROP if max_drop is None else max_drop):
        return
    told = (
        f"the int8 file for {target.name} loses {100 * (before - after):.2f} points "
        f"({100 * before:.2f} % in float, {100 * after:.2f} % in int8)"
    )
    if max_drop is None:
        LOG.warning("%s; give more calibration images, or ship the float file.", told)
        return
    raise DropError(
        f"{told}, and --max-drop allows {100 * max_drop:.2f}; nothing was kept. Give more calibration images, allow "
        "more, or leave --int8 out."
    )


class _Runs(nn.Module):
    """An opened file as a module of preprocessed images, to be evaluated."""

    def __init__(self, run: Run, subject: Subject) -> None:
        super().__init__()
        self.run, self.pixels, self.preprocessing = run, subject.pixels, subject.header.preprocessing

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.pixels is not None:
            images = to_pixels(images, self.preprocessing, self.pixels)
        return torch.from_numpy(np.array(self.run(images.numpy())))


def _accuracies(
    subject: Subject, runs: list[Run], test: Split | None
) -> tuple[int, float | None, float | None]:
    """Return the number of test images, and the top-1 accuracy of float and int8 on them."""
    if test is None:
        return 0, None, None
    before, after = (
        evaluate(_Runs(run, subject), test, subject.header.preprocessing, device=torch.device("cpu"))
        for run in runs
    )
    return before.n, before.top1, after.top1
