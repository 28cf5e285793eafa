"""The optimizer and its learning rate, both as pure functions of the settings and the step."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from se_prune.settings import TrainSettings

#: The one-cycle schedule starts at this part of the largest rate, and ends at that part of its start.
ONECYCLE_START, ONECYCLE_END = 25.0, 1e4


def build_optimizer(
    model: nn.Module, settings: TrainSettings, no_decay: Collection[str]
) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum or AdamW; biases, BN and the layers in `no_decay` are not decayed."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        layer = name.rpartition(".")[0]
        (free if parameter.ndim <= 1 or layer in no_decay else decayed).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr)
    return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.momentum > 0)


def learning_rate(settings: TrainSettings, step: int, total: int) -> float:
    """Return the rate of a step: linear warm-up over the share `warmup` of all steps, then as the schedule says.

    `cosine` falls to zero, `constant` stays, `onecycle` rises and falls along cosines (Smith 2018), between the
    shares that torch's OneCycleLR takes.
    """
    warm = settings.warmup * total
    onecycle = settings.schedule == "onecycle"
    if step < warm and onecycle:
        return _cosine(settings.lr / ONECYCLE_START, settings.lr, (step + 1) / max(1.0, warm))
    if step < warm:
        return settings.lr * (step + 1) / max(1.0, warm)
    if settings.schedule == "constant":
        return settings.lr
    progress = (step - warm) / max(1.0, total - warm)
    return _cosine(settings.lr, settings.lr / ONECYCLE_START / ONECYCLE_END if onecycle else 0.0, progress)


def _cosine(first: float, last: float, progress: float) -> float:
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
