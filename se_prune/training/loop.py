"""The training loop of `train` and `finetune`: any number of starts and of processes, the same weights in the end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from se_prune import distributed
from se_prune.data.source import balanced_subset, share_unreadable
from se_prune.errors import DataError, Interrupted, UsageError
from se_prune.records import Preprocessing
from se_prune.schema import record, to_json
from se_prune.settings import TrainSettings
from se_prune.surgery.repair import recalibrate_bn
from se_prune.training.interrupt import Request, stop_request
from se_prune.training.lasso import GroupLasso, ScaledGroup
from se_prune.training.losses import FeatureLoss, FeatureMatch
from se_prune.training.mixing import require_batches
from se_prune.training.optim import learning_rate
from se_prune.training.preparing import prepare
from se_prune.training.state import Position, StateFile, fingerprint
from se_prune.training.steps import Step, Sums, grouped, require_finite
from se_prune.training.stopping import hold_out, top1

if TYPE_CHECKING:
    from se_prune.data import Split
    from se_prune.data.batches import Batch

#: Steps between two rows of the log, and between two readings of the sums where a GPU or others must be waited for.
LOG_EVERY = 20
#: Between the seeds of two processes, whose dropout differs.
SEEDS_APART = 1_000_003


@record
class StepLog:
    """What one step reports: `loss` and `top1` over the images of the epoch so far, the step's rate, the speed.

    `logged` is true every few steps and at the end of an epoch: on a GPU `loss` and `top1` are taken then, and stay
    in between. `held_out`, the top-1 on held-out images, comes in a report of its own after the last step of an epoch.
    """

    epoch: int
    step: int
    total_steps: int
    loss: float
    top1: float
    images: int
    lr: float = 0.0
    images_per_second: float = 0.0
    logged: bool = False
    held_out: float | None = None


@record
class TrainResult:
    """How many steps were run, and the last epoch's mean loss and running training accuracy.

    `held_out_top1` is that of the weights which were kept, of epoch `best_epoch` (from 0) where the best ones are;
    `seconds` were spent, over all starts.
    """

    steps: int
    loss: float
    train_top1: float
    held_out_top1: float | None = None
    best_epoch: int | None = None
    seconds: float = field(default=0.0, compare=False)


@dataclass(slots=True, kw_only=True)
class _Run:
    """All that the loop holds; `ema` is the module of averaged weights inside `average`, timm's keeper of it."""

    step: Step
    split: Split
    held: Split | None
    settings: TrainSettings
    preprocessing: Preprocessing
    seed: int
    steps_per_epoch: int
    average: Any
    state: StateFile | None
    position: Position
    request: Request
    on_step: Callable[[StepLog], None] | None
    started: float

    @property
    def measured(self) -> nn.Module:
        """The network whose weights count: the average where there is one."""
        module: nn.Module = self.step.model if self.average is None else self.average.module
        return module

    @property
    def done(self) -> int:
        """Steps done."""
        return self.position.epoch * self.steps_per_epoch + self.position.step


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
    features: FeatureMatch | None = None,
    scaled: Sequence[ScaledGroup] = (),
) -> TrainResult:
    """Train `model` in place on augmented images of `split`; it ends on the CPU in eval mode.

    Several processes (`se_prune.distributed`) share every batch: images, augmentation, mixing, rates, loss and gradient
    are those of one process, to float tolerance, where BN shares its statistics (`sync_bn`) and nothing is dropped.
    The state is written by the main process, and any number of processes can go on from it.

    Args:
        model: The network, of any size.
        split: Training images.
        settings: Epochs, optimizer, augmentation, distillation.
        preprocessing: Input size and normalisation.
        device: Where to train.
        seed: Fixes order, augmentation and dropout; weights come as they are.
        teacher: The dense network to distil from, or None.
        no_decay: Layers (by name) whose weights are not decayed, such as those of SE blocks.
        resume: A folder that keeps the state; a run found there goes on at its step. Ctrl-C then finishes the step.
        on_step: Called after every step.
        features: Which features of the teacher the network has, for `distill_features`.
        scaled: What scales the channels that can leave, for `group_lasso`.

    Raises:
        DataError: The split has no image, or too few to hold some out.
        UsageError: Settings do not go with the data or the number of processes, or features are to be distilled and
            were not matched.
        SePruneError: The loss is not finite.
        CheckpointError: `resume` holds another run.
        Interrupted: The user stopped a run that `resume` keeps.
    """
    if len(split) == 0:
        raise DataError("there are no training images; check --data.")
    if settings.distill_features and (teacher is None or features is None):
        raise UsageError("distill_features needs the dense network; give it with --teacher.")
    started = time.monotonic()
    distributed.synchronise(model)
    told = f"{to_json(replace(settings, track=()))} {seed}"
    mark = fingerprint(told, [split.labels], [model] if teacher is None else [model, teacher])
    held: Split | None = None
    if settings.held_out:
        split, held = hold_out(split, settings.held_out, seed)
    require_batches(settings, len(split))
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        stop_request(resume is not None) as request,
        contextlib.ExitStack() as watched,
    ):
        torch.manual_seed(seed + SEEDS_APART * distributed.rank())
        step, average = prepare(
            model,
            split,
            settings,
            preprocessing=preprocessing,
            device=device,
            seed=seed,
            teacher=teacher,
            no_decay=no_decay,
        )
        parts, position = step.parts, Position()
        state = None if resume is None else StateFile(resume, mark)
        if state is not None:
            position = state.load(parts)
        if settings.distill_features and features is not None and teacher is not None:
            step.features = FeatureLoss(features, device)
            watched.enter_context(step.features.watching(model, teacher))
        step.lasso = GroupLasso(model, scaled, settings) if scaled else None
        run = _Run(
            step=step,
            split=split,
            held=held,
            settings=settings,
            preprocessing=preprocessing,
            seed=seed,
            steps_per_epoch=step.total // settings.epochs,
            average=average,
            state=state,
            position=position,
            request=request,
            on_step=on_step,
            started=started - position.seconds,
        )
        while position.epoch < settings.epochs and not position.stopped:
            _epoch(run)
    _finish(run, device)
    return _result(run)


def _epoch(run: _Run) -> None:
    """Run the rest of one epoch, from the step where the position stands."""
    position, settings = run.position, run.settings
    sums = Sums(position, run.step.parts.device)
    batches = run.split.training_batches(settings, run.preprocessing, seed=run.seed, epoch=position.epoch)
    groups = islice(grouped(batches, settings.accumulate), position.step, None)
    while (group := _next(run, groups)) is not None:
        run.step(group, run.done, sums)
        position.step += 1
        if run.average is not None:
            run.average.update(run.step.model, step=run.done)
        ends = position.step == run.steps_per_epoch
        _report(run, sums, logged=ends or position.step % LOG_EVERY == 0)
        asked, due = distributed.any_of(run.request.made, run.state is not None and run.state.due())
        if not ends and (asked or due):
            sums.read(position)
            _save(run)
            _stop_where_asked(run, asked)
    share_unreadable(run.split)
    _end_epoch(run, sums)


def _next(run: _Run, groups: Iterator[list[Batch]]) -> list[Batch] | None:
    """Return the next batches, or None; loader processes that Ctrl-C ended with ours are no error."""
    try:
        return next(groups, None)
    except RuntimeError:
        _stop_where_asked(run, run.request.made)
        raise


def _report(run: _Run, sums: Sums, *, logged: bool) -> None:
    """Tell how the epoch goes; a GPU and other processes are waited for only where the report is logged."""
    position = run.position
    alone = run.step.parts.device.type == "cpu" and distributed.size() == 1
    if logged or alone:
        sums.read(position)
    if run.on_step is None:
        return
    run.on_step(
        StepLog(
            epoch=position.epoch,
            step=run.done,
            total_steps=run.step.total,
            loss=position.loss_sum / max(1, position.seen),
            top1=position.right / max(1, position.seen),
            images=sums.seen,
            lr=learning_rate(run.settings, run.done - 1, run.step.total),
            images_per_second=sums.rate(restart=logged),
            logged=logged,
        )
    )


def _end_epoch(run: _Run, sums: Sums) -> None:
    """Measure held-out images, note whether the epoch is the best, and save."""
    position, parts = run.position, run.step.parts
    sums.read(position)
    last = run.done
    position.loss = position.loss_sum / max(1, position.seen)
    position.top1 = position.right / max(1, position.seen)
    if run.held is not None:
        position.held_out = top1(run.measured, run.held, run.preprocessing, parts.device)
        if position.held_out > position.best_top1:
            position.best_top1, position.best_epoch = position.held_out, position.epoch
            if run.settings.keep == "best":
                parts.best = {k: v.detach().cpu().clone() for k, v in run.measured.state_dict().items()}
        patience = run.settings.patience
        position.stopped = 0 < patience <= position.epoch - position.best_epoch
        _report_held_out(run, last)
    position.epoch, position.step = position.epoch + 1, 0
    position.loss_sum, position.right, position.seen = 0.0, 0, 0
    _save(run)
    (asked,) = distributed.any_of(run.request.made)
    if position.epoch < run.settings.epochs and not position.stopped:
        _stop_where_asked(run, asked)


def _report_held_out(run: _Run, step: int) -> None:
    position = run.position
    if run.on_step is not None:
        run.on_step(
            StepLog(
                epoch=position.epoch,
                step=step,
                total_steps=run.step.total,
                loss=position.loss,
                top1=position.top1,
                images=position.seen,
                lr=learning_rate(run.settings, step - 1, run.step.total),
                logged=True,
                held_out=position.held_out,
            )
        )


def _save(run: _Run) -> None:
    require_finite(*run.step.model.state_dict().values())
    run.position.seconds = time.monotonic() - run.started
    if run.state is not None:
        run.state.save(run.position, run.step.parts)


def _stop_where_asked(run: _Run, asked: bool) -> None:
    if asked and run.state is not None:
        raise Interrupted(
            f"stopped after step {run.done} of {run.step.total}; the state is in {run.state.path.parent}, and the "
            "same command goes on from there."
        )


@torch.no_grad()
def _finish(run: _Run, device: torch.device) -> None:
    """Leave the weights that count in the model, on the CPU."""
    model, settings = run.step.model, run.settings
    best = run.step.parts.best
    if best or run.average is not None:
        model.load_state_dict(best or run.measured.state_dict())
    if settings.ema_decay > 0 and settings.ema_bn_images > 0:
        images = balanced_subset(run.split, settings.ema_bn_images, run.seed)
        recalibrate_bn(model, images, run.preprocessing, device=device)
    model.to("cpu", memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]


def _result(run: _Run) -> TrainResult:
    position, best = run.position, run.settings.keep == "best"
    return TrainResult(
        steps=run.done,
        loss=position.loss,
        train_top1=position.top1,
        held_out_top1=position.best_top1 if best else position.held_out,
        best_epoch=position.best_epoch if best else None,
        seconds=position.seconds,
    )
