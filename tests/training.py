"""Short runs of the training loop on a tiny network, and what becomes of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from se_prune.settings import TrainSettings
from se_prune.training import TrainResult, fit
from se_prune.training.loop import StepLog
from tests.nets import DepthwiseSE
from tests.tiny import GREY, stripes

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
QUICK = TrainSettings(
    epochs=3, batch_size=24, lr=0.05, label_smoothing=0.0, flip=0.0, crop_padding=0, amp="off"
)
SGD = replace(QUICK, ema_decay=0.9, crop_padding=1, erase=0.5)
ADAMW = replace(SGD, optimizer="adamw", lr=0.01)


def net(seed: int = 0) -> DepthwiseSE:
    """Return a network with the weights of a seed."""
    torch.manual_seed(seed)
    return DepthwiseSE()


def train(model: nn.Module, settings: TrainSettings, **options: Any) -> TrainResult:
    """Train a network on 96 striped images, on the CPU where `options` say nothing else."""
    options = {"preprocessing": GREY, "device": CPU, **options}
    return fit(model, options.pop("split", stripes(96)), settings, **options)


def stopped(model: nn.Module, settings: TrainSettings, folder: Path, after: int, **options: Any) -> None:
    """Train until the first step of the epoch `after`, as a killed run would."""

    def watch(log: StepLog) -> None:
        if log.epoch == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model, settings, resume=folder, on_step=watch, **options)


def same(first: nn.Module, second: nn.Module) -> bool:
    """Return whether two networks have the same values, bit for bit."""
    ours, theirs = first.state_dict(), second.state_dict()
    return all(torch.equal(value, theirs[key]) for key, value in ours.items())
