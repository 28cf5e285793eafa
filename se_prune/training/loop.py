"""The training loop of `train` and `finetune`: one device, distillation, EMA, AMP, resume after each epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from se_prune.data.batches import TensorImages
from se_prune.errors import DataError, SePruneError
from se_prune.files import make_folder
from se_prune.records import Preprocessing, TrainSettings
from se_prune.schema import record, to_json
from se_prune.training.optim import build_optimizer, learning_rate
from se_prune.training.state import load_state, save_state
from se_prune.training.teacher import Teacher

if TYPE_CHECKING:
    from se_prune.data import Split


@record
class StepLog:
    """What one step reports: totals so far in the epoch."""

    epoch: int
    step: int
    total_steps: int
    loss: float
    top1: float
    images: int


@record
class TrainResult:
    """The last epoch's mean loss and running training accuracy, and how many steps were run."""

    steps: int
    loss: float
    train_top1: float


@dataclass(slots=True)
class _Run:
    model: nn.Module
    teacher: Teacher | None
    settings: TrainSettings
    device: torch.device
    amp: torch.dtype | None
    forward: nn.Module


def amp_dtype(settings: TrainSettings, device: torch.device) -> torch.dtype | None:
    """Return the autocast type: `auto` is bf16 on devices that compute in it, fp16 on older GPUs, else none."""
    if settings.amp == "off":
        return None
    if settings.amp != "auto":
        return torch.float16 if settings.amp == "fp16" else torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if device.type == "cpu" and cpu_computes_bf16() else None


def cpu_computes_bf16() -> bool:
    """Say whether this CPU has instructions for bf16; without them bf16 is slower than float32."""
    able: dict[str, object] = getattr(
        torch.cpu, "get_capabilities", dict
    )()  # torch before 2.11 has no such list
    return any(bool(able.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def distillation_loss(logits: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL divergence of softened outputs, times T² (Hinton et al. 2015); logits (N, classes)."""
    student = F.log_softmax(logits / temperature, dim=1)
    target = F.log_softmax(teacher / temperature, dim=1)
    return F.kl_div(student, target, log_target=True, reduction="batchmean") * temperature**2


def fit(
    model: nn.Module,
    split: Split,
    settings: TrainSettings,
    *,
    preprocessing: Preprocessing,
    device: torch.device,
    seed: int = 0,
    teacher: nn.Module | None = None,
    no_decay: Collection[str] = (),
    resume: Path | None = None,
    on_step: Callable[[StepLog], None] | None = None,
) -> TrainResult:
    """Train `model` in place on augmented images of `split`; it ends on the CPU in eval mode.

    Args:
        model: The network, of any size.
        split: Training images.
        settings: Epochs, optimizer, augmentation, distillation.
        preprocessing: Input size and normalisation.
        device: Where to train.
        seed: Fixes order and augmentation; weights come as they are.
        teacher: The dense network to distil from, or None.
        no_decay: Layers (by name) whose weights are not decayed, such as those of SE blocks.
        resume: A folder that keeps the state after every epoch; a run found there goes on.
        on_step: Called after every step.

    Raises:
        DataError: The split has no image.
        SePruneError: The loss is not finite.
        CheckpointError: `resume` holds another run.
    """
    if len(split) == 0:
        raise DataError("there are no training images; check --data.")
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    model.to(device, memory_format=layout).train()  # type: ignore[call-overload]
    if teacher is not None:
        teacher.to(device, memory_format=layout).eval()  # type: ignore[call-overload]
    optimizer = build_optimizer(model, settings, no_decay)
    ema = _ema(model, settings)
    modules: dict[str, nn.Module] = {"model": model}
    if ema is not None:
        modules["ema"] = ema.module
    steps_per_epoch = max(1, len(split) // min(settings.batch_size, len(split)))
    total = steps_per_epoch * settings.epochs
    fingerprint = _fingerprint(settings, seed, len(split), model, teacher)
    done = 0
    if resume is not None:
        make_folder(resume)
        done = load_state(resume, fingerprint, modules, optimizer)
    asked = None if teacher is None else Teacher(teacher, layout)
    amp = amp_dtype(settings, device)
    if asked is not None and device.type == "cpu" and isinstance(split, TensorImages):
        with torch.autocast("cpu", amp or torch.bfloat16, enabled=amp is not None):
            asked.prepare(split, settings, preprocessing)
    forward = torch.compile(model) if settings.compile else model
    run = _Run(model, asked, settings, device, amp, forward)  # type: ignore[arg-type]
    scaler = torch.amp.GradScaler(device.type, enabled=run.amp is torch.float16)
    result = TrainResult(steps=done, loss=float("nan"), train_top1=float("nan"))
    for epoch in range(done // steps_per_epoch, settings.epochs):
        loss_sum, right, seen = 0.0, 0, 0
        batches = split.training_batches(settings, preprocessing, seed=seed, epoch=epoch)
        for index, (images, labels) in enumerate(batches):
            step = epoch * steps_per_epoch + index
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, step, total)
            loss, correct = _step(run, images, labels, optimizer=optimizer, scaler=scaler, layout=layout)
            if ema is not None:
                ema.update(model, step=step + 1)
            loss_sum, right, seen = loss_sum + loss * len(labels), right + correct, seen + len(labels)
            if on_step is not None:
                on_step(
                    StepLog(
                        epoch=epoch,
                        step=step + 1,
                        total_steps=total,
                        loss=loss_sum / seen,
                        top1=right / seen,
                        images=seen,
                    )
                )
        result = TrainResult(
            steps=(epoch + 1) * steps_per_epoch, loss=loss_sum / seen, train_top1=right / seen
        )
        _require_finite(*model.state_dict().values())
        if resume is not None:
            save_state(resume, fingerprint, result.steps, modules, optimizer)
    if ema is not None:
        model.load_state_dict(ema.module.state_dict())
    model.to("cpu", memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    return result


def _step(
    run: _Run,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    layout: torch.memory_format,
) -> tuple[float, int]:
    """One optimizer step; returns the batch's mean loss and how many images were right."""
    settings = run.settings
    images = images.to(run.device, memory_format=layout, non_blocking=True)
    labels = labels.to(run.device, non_blocking=True)
    with torch.autocast(run.device.type, run.amp or torch.bfloat16, enabled=run.amp is not None):
        logits = run.forward(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=settings.label_smoothing)
        if run.teacher is not None:
            target = run.teacher(images)
            soft = distillation_loss(logits.float(), target.float(), settings.distill_temperature)
            loss = (1 - settings.distill_weight) * loss + settings.distill_weight * soft
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    if settings.clip_norm > 0:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(run.model.parameters(), settings.clip_norm)
    scaler.step(optimizer)
    scaler.update()
    _require_finite(loss.detach())
    return float(loss.detach()), int((logits.detach().argmax(1) == labels).sum())


def _require_finite(*values: torch.Tensor) -> None:
    """Stop where the loss or the weights have left the numbers; the last state that was saved is good.

    Raises:
        SePruneError: A value is NaN or infinite.
    """
    if not all(bool(torch.isfinite(value).all()) for value in values):
        raise SePruneError(
            "the training diverged (its loss or weights are not numbers any more); lower the learning rate (--lr), "
            'or put amp = "off" in the recipe.'
        )


def _ema(model: nn.Module, settings: TrainSettings):  # type: ignore[no-untyped-def]
    if settings.ema_decay <= 0:
        return None
    from timm.utils import ModelEmaV3

    return ModelEmaV3(model, decay=settings.ema_decay, use_warmup=True)


def _fingerprint(
    settings: TrainSettings, seed: int, images: int, model: nn.Module, teacher: nn.Module | None
) -> str:
    """Identify a run by its settings, its images, and the weights that it starts and distils from."""
    digest = hashlib.sha256(f"{to_json(settings)} {seed} {images} {teacher is not None}".encode())
    for network in (model, teacher):
        for name, value in {} if network is None else network.state_dict().items():
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
