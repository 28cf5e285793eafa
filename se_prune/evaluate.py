"""Accuracy with its uncertainty: top-1, top-5, per class, the Wilson interval, and a paired test."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from se_prune import distributed
from se_prune.data.source import readable, shared_batches
from se_prune.errors import DataError
from se_prune.records import Preprocessing
from se_prune.results import Drop, Evaluation, PairedTest

if TYPE_CHECKING:
    from se_prune.data import Split

Z95 = 1.959963984540054
#: What stands for the prediction of an image that cannot be read, which counts nowhere.
UNREADABLE = -1


def wilson(right: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    p = right / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> PairedTest:
    """Exact two-sided McNemar test of two networks' right answers on the same images.

    Raises:
        DataError: The two have not seen the same number of images.
    """
    if len(first) != len(second) or not first:
        raise DataError(f"a paired test needs the same images twice, got {len(first)} and {len(second)}.")
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    return PairedTest(
        top1_difference=(sum(second) - sum(first)) / len(first),
        only_first_right=only_first,
        only_second_right=only_second,
        p_value=_binomial_two_sided(min(only_first, only_second), only_first + only_second),
    )


def _binomial_two_sided(k: int, n: int) -> float:
    """Return P of at most `k` of `n` fair coin flips, doubled and capped at 1; exact in integers."""
    ways = tail = 1  # ways to choose 0 of n, then 1, 2, …: each from the one before, far cheaper than anew
    for i in range(k):
        ways = ways * (n - i) // (i + 1)
        tail += ways
    doubled: float = 2 * tail / 2**n
    return min(1.0, doubled)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    split: Split,
    preprocessing: Preprocessing,
    *,
    device: torch.device,
    classes: Sequence[str] = (),
    batch_size: int = 256,
    on_batch: Callable[[int], None] | None = None,
) -> Evaluation:
    """Run `model` in eval mode over every image of `split` once; those that cannot be read count nowhere.

    Several processes share the images: each image is seen by one of them, and all return the whole result.

    Args:
        model: The network; it stays on `device` in eval mode.
        split: Images with labels.
        preprocessing: Input size and normalisation.
        device: Where to run.
        classes: Names for the per-class accuracies; numbers where none are given.
        batch_size: Images at a time.
        on_batch: Called with the number of images after each batch.

    Raises:
        DataError: The split is empty, or has labels that the network has no output for.
    """
    if len(split) == 0:
        raise DataError("there are no images to evaluate; check --data.")
    model.to(device).eval()
    predicted, top5, loss = torch.full((len(split),), UNREADABLE), 0, 0.0
    mine = distributed.share(len(split), batch_size)
    for number, (images, labels) in enumerate(shared_batches(split, batch_size, preprocessing)):
        logits = model(images.to(device, non_blocking=True)).float().cpu()
        if int(labels.max()) >= logits.shape[1]:
            raise DataError(
                f"the data has a label {int(labels.max())}, but the network has {logits.shape[1]} classes; "
                "use the data it was trained on, or a checkpoint with that many classes."
            )
        loss += float(F.cross_entropy(logits.double(), labels, reduction="sum"))
        best = logits.topk(min(5, logits.shape[1])).indices
        top5 += int((best == labels[:, None]).any(1).sum())
        places = readable(split, mine[number * batch_size : (number + 1) * batch_size])
        predicted[places] = logits.argmax(1)
        if on_batch is not None:
            on_batch(len(labels) * distributed.size())
    distributed.largest(predicted)  # an image is UNREADABLE, the least, where another process has it
    sums = torch.tensor([top5, loss], dtype=torch.float64)
    distributed.add_up(sums)
    seen = predicted != UNREADABLE
    if not seen.any():
        raise DataError("none of the images to evaluate can be read; check --data.")
    targets, hit = split.labels[seen], (predicted == split.labels)[seen]
    per_class = {}
    for label in torch.unique(targets).tolist():
        name = classes[label] if label < len(classes) else str(label)
        per_class[name] = float(hit[targets == label].double().mean())
    n, right = len(targets), int(hit.sum())
    return Evaluation(
        n=n,
        top1=right / n,
        top5=int(sums[0]) / n,
        top1_ci95=wilson(right, n),
        loss=float(sums[1]) / n,
        per_class=per_class,
        predictions=tuple(predicted.tolist()),
    )


def paired(first: Evaluation, second: Evaluation, split: Split) -> PairedTest:
    """McNemar test of two evaluations on the images of a split that both have read; second minus first."""
    three = zip(first.predictions, second.predictions, split.labels.tolist(), strict=True)
    both = [(a == t, b == t) for a, b, t in three if UNREADABLE not in (a, b)]
    return mcnemar([a for a, _ in both], [b for _, b in both])


def drop(first: Evaluation, second: Evaluation, split: Split, confidence: float) -> Drop:
    """Return the top-1 that the second of two networks loses, from pairs of answers to the same images.

    The intervals are Wald's of a difference of paired proportions, with one image added to each kind of disagreement
    (Bonett and Price 2012), so that they are not of length zero where the two agree everywhere.

    Args:
        first: The network that is compared with.
        second: The network that may lose.
        split: The images of both.
        confidence: Level of the one-sided interval whose upper end is returned; 0.5 gives the drop itself.
    """
    test = paired(first, second, split)
    n = sum(UNREADABLE not in pair for pair in zip(first.predictions, second.predictions, strict=True))
    lost, won = (test.only_first_right + 1) / (n + 2), (test.only_second_right + 1) / (n + 2)
    error = math.sqrt((lost + won - (lost - won) ** 2) / (n + 2))
    measured = -test.top1_difference
    return Drop(
        n=n,
        drop=measured,
        ci95=(lost - won - Z95 * error, lost - won + Z95 * error),
        upper=measured if confidence == 0.5 else lost - won + NormalDist().inv_cdf(confidence) * error,
    )
