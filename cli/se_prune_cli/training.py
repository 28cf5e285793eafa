"""What `train` and `finetune` share: where the state lies, the live view, the log and the trackers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from se_prune_cli.output import Progressed

if TYPE_CHECKING:
    from se_prune.settings import TrainSettings

Resume = Annotated[
    bool,
    typer.Option(
        "--resume/--no-resume", help="Go on with a training that was stopped; --no-resume starts again."
    ),
]
State = Annotated[
    Path | None,
    typer.Option("--state", help="Folder that keeps the state until the end; OUTPUT.state without."),
]
Track = Annotated[
    list[str] | None,
    typer.Option("--track", help="tensorboard, mlflow or wandb, beside the CSV log; may be repeated."),
]


@contextlib.contextmanager
def trained(
    title: str, output: Path, settings: TrainSettings, *, state: Path | None, resume: bool
) -> Iterator[dict[str, Any]]:
    """Yield what a training takes to go on, to show itself and to be followed.

    The log is OUTPUT's name with `.training.csv`. The state stays until `forget`, after the artifact is written.
    """
    from se_prune import distributed
    from se_prune.pipeline.view import shown
    from se_prune.training.state import remove_state, state_beside
    from se_prune.training.tracking import following

    folder = state or state_beside(output)
    if not resume:
        remove_state(folder)
    is_new = distributed.is_main() and not folder.exists()
    try:
        with (
            Progressed().stage(title, None) as update,
            following(
                settings, output.with_suffix(".training.csv"), name=output.stem, state=folder
            ) as follow,
        ):
            yield {"resume": folder, "on_step": shown(update, follow)}
    finally:
        if is_new and folder.is_dir() and not any(folder.iterdir()):  # it failed before its first state
            folder.rmdir()


def forget(output: Path, state: Path | None) -> None:
    """Remove the state of a training whose artifact is written."""
    from se_prune.training.state import remove_state, state_beside

    remove_state(state or state_beside(output))
