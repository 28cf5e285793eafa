"""What a progress bar says while a network is trained."""

from __future__ import annotations

from collections.abc import Callable

from se_prune.training.loop import StepLog


def shown(update: Callable[..., None], *others: Callable[[StepLog], None]) -> Callable[[StepLog], None]:
    """Return what `fit` calls after every step: it moves a reporter's bar, and tells the others.

    A run that goes on starts its bar where it was. The note holds the epoch, its loss and top-1 so far, images per
    second, and the last top-1 on held-out images.
    """
    last, held = 0, ""

    def on_step(log: StepLog) -> None:
        nonlocal last, held
        if log.held_out is not None:
            held = f", held out {100 * log.held_out:.1f} %"
        update(log.step - last, total=log.total_steps, note=step_note(log) + held)
        last = log.step
        for other in others:
            other(log)

    return on_step


def step_note(log: StepLog) -> str:
    """Return the note of one step."""
    note = f"epoch {log.epoch + 1}, loss {log.loss:.3f}, top-1 {100 * log.top1:.1f} %"
    return f"{note}, {log.images_per_second:,.0f} images/s" if log.images_per_second else note
