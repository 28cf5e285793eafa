"""What a training needs before its first step: networks on the device, optimizer, averaged weights, mixing, teacher."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from se_prune.data.batches import TensorImages
from se_prune.records import Preprocessing
from se_prune.settings import TrainSettings
from se_prune.training.mixing import Mixing, outputs
from se_prune.training.norms import shares_statistics
from se_prune.training.optim import build_optimizer
from se_prune.training.precision import amp_dtype
from se_prune.training.state import Parts
from se_prune.training.steps import Step
from se_prune.training.teacher import Teacher

if TYPE_CHECKING:
    from se_prune.data import Split


def prepare(
    model: nn.Module,
    split: Split,
    settings: TrainSettings,
    *,
    preprocessing: Preprocessing,
    device: torch.device,
    seed: int,
    teacher: nn.Module | None,
    no_decay: Collection[str],
) -> tuple[Step, Any]:
    """Put the networks on the device; return the step, and the average of the weights where one is kept."""
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    model.to(device, memory_format=layout).train()  # type: ignore[call-overload]
    mixing: Mixing | None = None
    if settings.mixup > 0 or settings.cutmix > 0:
        mixing = Mixing(settings, outputs(model, preprocessing, device), seed)
    average = _average(model, settings)
    amp = amp_dtype(settings, device)
    asked: Teacher | None = None
    if teacher is not None:
        teacher.to(device, memory_format=layout).eval()  # type: ignore[call-overload]
        asked = Teacher(teacher, layout)
        if device.type == "cpu" and isinstance(split, TensorImages):
            with torch.autocast("cpu", amp or torch.bfloat16, enabled=amp is not None):
                asked.prepare(split, settings, preprocessing)
    modules = {"model": model} if average is None else {"model": model, "ema": average.module}
    batches = max(1, len(split) // min(settings.batch_size, len(split)))
    step = Step(
        model=model,
        forward=torch.compile(model) if settings.compile else model,  # type: ignore[arg-type]
        settings=settings,
        parts=Parts(
            modules=modules,
            optimizer=build_optimizer(model, settings, no_decay),
            scaler=torch.amp.GradScaler(device.type, enabled=amp is torch.float16),
            device=device,
        ),
        amp=amp,
        layout=layout,
        total=settings.epochs * -(-batches // settings.accumulate),
        teacher=asked,
        mixing=mixing,
        shared_norms=shares_statistics(settings, len(split)),
    )
    return step, average


def _average(model: nn.Module, settings: TrainSettings) -> Any:
    if settings.ema_decay <= 0:
        return None
    from timm.utils import ModelEmaV3

    return ModelEmaV3(model, decay=settings.ema_decay, use_warmup=True)
