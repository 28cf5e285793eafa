"""One step of training: forward passes, the loss, the gradient, the optimizer; nothing waits for the device.

Shapes: N images, K classes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import nn

from se_prune import distributed
from se_prune.errors import SePruneError
from se_prune.settings import TrainSettings
from se_prune.training.lasso import GroupLasso
from se_prune.training.losses import FeatureLoss, distillation_loss, label_loss
from se_prune.training.mixing import Mixing
from se_prune.training.norms import statistics_of_whole
from se_prune.training.optim import learning_rate
from se_prune.training.state import Parts, Position
from se_prune.training.teacher import Teacher

if TYPE_CHECKING:
    from se_prune.data.batches import Batch


@dataclass(slots=True, kw_only=True)
class Step:
    """What a step needs; `forward` is the network as it runs (compiled or not), `total` the steps of the whole run.

    Several processes have a share of every batch each. Gradients are averaged over them once a step, and so are BN's
    running statistics: weights and buffers are the same in all. `shared_norms`: BN takes the moments of whole batches.
    """

    model: nn.Module
    forward: nn.Module
    settings: TrainSettings
    parts: Parts
    amp: torch.dtype | None
    layout: torch.memory_format
    total: int
    lasso: GroupLasso | None = None
    teacher: Teacher | None = None
    mixing: Mixing | None = None
    features: FeatureLoss | None = None
    shared_norms: bool = False

    def __call__(self, batches: list[Batch], step: int, sums: Sums) -> None:
        """Make step number `step` (from 0) with the mean gradient of some batches, and add them to `sums`."""
        optimizer, scaler, settings = self.parts.optimizer, self.parts.scaler, self.settings
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, self.total)
        optimizer.zero_grad(set_to_none=True)
        for index, (images, labels) in enumerate(batches):
            loss = self._loss(images, labels, step * settings.accumulate + index, sums)
            scaler.scale(loss / len(batches)).backward()  # type: ignore[no-untyped-call]
        distributed.average([p.grad for p in self.model.parameters() if p.grad is not None])
        distributed.average([b for b in self.model.buffers() if b.is_floating_point()])
        if settings.clip_norm > 0:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_norm)
        scaler.step(optimizer)
        scaler.update()

    def _loss(self, images: torch.Tensor, labels: torch.Tensor, batch: int, sums: Sums) -> torch.Tensor:
        device, settings = self.parts.device, self.settings
        images = images.to(device, memory_format=self.layout, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        if self.mixing is not None:
            images, labels = self.mixing(images, labels, batch)
        with torch.autocast(device.type, self.amp or torch.bfloat16, enabled=self.amp is not None):
            with statistics_of_whole(self.shared_norms):
                logits = self.forward(images)
            loss = label_loss(logits.float(), labels, settings.label_smoothing)
            if self.teacher is not None:
                target = self.teacher(images).float()
                soft = distillation_loss(logits.float(), target, settings.distill_temperature)
                loss = (1 - settings.distill_weight) * loss + settings.distill_weight * soft
            if self.features is not None:
                loss = loss + settings.distill_features * self.features()
            if self.lasso is not None:
                loss = loss + self.lasso(batch // settings.accumulate, self.total)
        sums.add(loss.detach(), logits.detach(), labels)
        return loss


class Sums:
    """Loss and right answers over the images of an epoch, summed on the device, and read only when asked.

    Each of several processes sums over its own images; `seen`, and what is read, counts those of all.
    """

    def __init__(self, position: Position, device: torch.device) -> None:
        wide = torch.float32 if device.type == "mps" else torch.float64
        first = distributed.is_main()  # it goes on from the sums of all
        self.loss = torch.full((), position.loss_sum if first else 0.0, dtype=wide, device=device)
        self.right = torch.full((), position.right if first else 0, dtype=torch.long, device=device)
        self.seen = position.seen
        self._since, self._seen_then = time.monotonic(), position.seen

    def add(self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Add the mean loss of a batch, and its answers; of mixed labels (N, K) the larger one is the right one."""
        right = labels if labels.ndim == 1 else labels.argmax(1)
        self.loss += loss * len(labels)
        self.right += (logits.argmax(1) == right).sum()
        self.seen += len(labels) * distributed.size()

    def read(self, position: Position) -> None:
        """Wait for the device and all processes, and write the sums into a position.

        Raises:
            SePruneError: The loss is not finite.
        """
        loss, right = self.loss.clone(), self.right.clone()
        distributed.add_up(loss, right)
        require_finite(loss)
        position.loss_sum, position.right, position.seen = float(loss), int(right), self.seen

    def rate(self, *, restart: bool) -> float:
        """Return the images per second since the last restart of the count."""
        now = time.monotonic()
        rate = (self.seen - self._seen_then) / max(1e-9, now - self._since)
        if restart:
            self._since, self._seen_then = now, self.seen
        return rate


def grouped(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Yield lists of `size` batches; the last may be shorter."""
    iterator = iter(batches)
    while group := list(islice(iterator, size)):
        yield group


def require_finite(*values: torch.Tensor) -> None:
    """Stop where the loss or the weights have left the numbers; the last state that was saved is good.

    Raises:
        SePruneError: A value is NaN or infinite.
    """
    if not all(bool(torch.isfinite(value).all()) for value in values):
        raise SePruneError(
            "the training diverged (its loss or weights are not numbers any more); lower the learning rate (--lr), "
            'or put amp = "off" in the recipe.'
        )
