"""Which test images a network gets right: kept in rows as short text, and compared image by image."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Answers = np.ndarray[Any, np.dtype[np.float64]]


def right(network: Any, data: Any) -> str:
    """Return which test images a network gets right, one bit each, in base 85."""
    import torch

    from se_prune.pipeline import assess

    result = assess(network, data, device=torch.device("cpu"))[1]
    return bits(np.array(result.predictions) == data.test.labels.numpy())


def bits(right: Any) -> str:
    """Return which images are right (N,), one bit each, in base 85."""
    return base64.b85encode(np.packbits(np.asarray(right)).tobytes()).decode()


def images(text: str) -> Answers:
    """Return 1.0 per test image that was right; the count of images is a multiple of 8."""
    return np.unpackbits(np.frombuffer(base64.b85decode(text), dtype=np.uint8)).astype(np.float64)


def top1(text: str) -> float:
    """Return the share of test images that were right."""
    return float(images(text).mean())


def paired_p(differences: Sequence[Answers]) -> float:
    """Return the two-sided p of a mean difference of 0, images being the sample and seeds averaged over."""
    mean = np.mean(differences, axis=0)
    error = float(mean.std(ddof=1)) / math.sqrt(len(mean))
    return math.erfc(abs(float(mean.mean())) / error / math.sqrt(2)) if error > 0 else 1.0


def gain(pairs: Sequence[tuple[str, str]]) -> tuple[float, float, float, float]:
    """Return what the second of every pair (one pair a seed) has over the first, in points of top-1.

    Returns:
        The mean over seeds, half of its 95 % interval over the test images, the standard deviation over seeds, and
        the two-sided p of no gain (images being the sample, seeds averaged over).
    """
    differences = [images(second) - images(first) for first, second in pairs]
    mean = np.mean(differences, axis=0)
    half = 1.959964 * float(mean.std(ddof=1)) / math.sqrt(len(mean))
    seeds = [float(d.mean()) for d in differences]
    spread = float(np.std(seeds, ddof=1)) if len(seeds) > 1 else float("nan")
    return 100 * float(mean.mean()), 100 * half, 100 * spread, paired_p(differences)
