"""Following a training: a CSV log always, TensorBoard, MLflow and W&B where they are asked for."""

from __future__ import annotations

import contextlib
import csv
import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from se_prune import distributed
from se_prune.errors import SePruneError, UsageError
from se_prune.files import write_text
from se_prune.schema import to_dict
from se_prune.settings import Tracker, TrainSettings
from se_prune.training.loop import StepLog
from se_prune.training.state import TRACKING_FILE

OnStep = Callable[[StepLog], None]
COLUMNS = ("step", "epoch", "lr", "loss", "top1", "images_per_second", "held_out_top1")
#: What each tracker is imported as.
MODULES: dict[Tracker, str] = {
    "tensorboard": "torch.utils.tensorboard",
    "mlflow": "mlflow",
    "wandb": "wandb",
}


class Follower(Protocol):
    """Takes the values of a step, by name; `start` comes before the first of them."""

    def start(self, step: int) -> None:
        """Begin at a step; steps from there on that an earlier start has told are not to count."""
        ...

    def tell(self, step: int, values: dict[str, float]) -> None:
        """Take the values of one step."""
        ...

    def close(self, finished: bool) -> None:
        """End; `finished` is False where the training was stopped or failed."""
        ...


class CsvLog:
    """Rows of steps in a CSV file; fractions, images per second."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def start(self, step: int) -> None:
        """Keep the whole rows of earlier steps, of an earlier start of the same run."""
        kept = [",".join(COLUMNS), *(",".join(row) for row in self._rows() if int(row[0]) < step)]
        write_text(self.path, "\n".join(kept) + "\n")

    def _rows(self) -> list[list[str]]:
        if not self.path.exists():
            return []
        with self.path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
        return [row for row in rows if len(row) == len(COLUMNS) and row[0].isdigit()]

    def tell(self, step: int, values: dict[str, float]) -> None:
        """Add a row."""
        row = [str(step), *(f"{values[name]:.6g}" if name in values else "" for name in COLUMNS[1:])]
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(",".join(row) + "\n")
        except OSError as error:
            raise SePruneError(f"cannot write {self.path}: {error.strerror}; free space there.") from error

    def close(self, finished: bool) -> None:
        """Do nothing: every row is in the file already."""
        del finished


class TensorBoard:
    """Scalars for TensorBoard in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer: Any = None

    def start(self, step: int) -> None:
        """Open the writer."""
        self.writer = _module("tensorboard").SummaryWriter(str(self.folder), purge_step=step)

    def tell(self, step: int, values: dict[str, float]) -> None:
        """Add scalars."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self, finished: bool) -> None:
        """Close the writer."""
        del finished
        if self.writer is not None:
            self.writer.close()


class MLflow:
    """Parameters and metrics of one MLflow run, which goes on where the training does."""

    def __init__(self, name: str, settings: dict[str, Any], ids: Path) -> None:
        self.name, self.settings, self.ids, self.open = name, settings, ids, False

    def start(self, step: int) -> None:
        """Start a run, or go on with that of the state."""
        known = None if step == 1 else _read_ids(self.ids).get("mlflow")
        module = _module("mlflow")
        run = module.start_run(run_id=known, run_name=None if known else self.name)
        self.open = True
        if known is None:
            _write_id(self.ids, "mlflow", run.info.run_id)
            module.log_params(self.settings)

    def tell(self, step: int, values: dict[str, float]) -> None:
        """Log metrics."""
        _module("mlflow").log_metrics(values, step=step)

    def close(self, finished: bool) -> None:
        """End the run."""
        if self.open:
            _module("mlflow").end_run("FINISHED" if finished else "KILLED")


class Wandb:
    """One W&B run, which goes on where the training does."""

    def __init__(self, name: str, settings: dict[str, Any], ids: Path) -> None:
        self.name, self.settings, self.ids = name, settings, ids
        self.run: Any = None

    def start(self, step: int) -> None:
        """Start a run, or go on with that of the state."""
        known = None if step == 1 else _read_ids(self.ids).get("wandb")
        self.run = _module("wandb").init(
            project="se-prune", name=self.name, config=self.settings, id=known, resume="allow"
        )
        _write_id(self.ids, "wandb", self.run.id)

    def tell(self, step: int, values: dict[str, float]) -> None:
        """Log values."""
        self.run.log(values, step=step)

    def close(self, finished: bool) -> None:
        """Finish the run."""
        if self.run is not None:
            self.run.finish(exit_code=0 if finished else 1)


@contextlib.contextmanager
def following(settings: TrainSettings, log: Path, *, name: str, state: Path) -> Iterator[OnStep]:
    """Yield what `fit` calls after every step: it writes the log, and tells the trackers of the settings.

    Of several processes the main one alone does so.

    Args:
        settings: Of the training; its `track` names the trackers.
        log: The CSV file; TensorBoard's folder is named after it.
        name: Names the run in MLflow and W&B.
        state: The folder of the training's state, which remembers their runs.

    Raises:
        UsageError: A tracker is not installed.
    """
    for tracker in settings.track:
        _module(tracker)
    if not distributed.is_main():
        yield lambda _: None
        return
    told, ids = to_dict(settings), state / TRACKING_FILE
    followers: list[Follower] = [CsvLog(log)]
    made: dict[str, Callable[[], Follower]] = {
        "tensorboard": lambda: TensorBoard(log.with_suffix(".tensorboard")),
        "mlflow": lambda: MLflow(name, told, ids),
        "wandb": lambda: Wandb(name, told, ids),
    }
    followers += [made[tracker]() for tracker in dict.fromkeys(settings.track)]
    finished = False
    try:
        yield _teller(followers)
        finished = True
    finally:
        for follower in followers:
            follower.close(finished)


def _teller(followers: Sequence[Follower]) -> OnStep:
    started = False

    def tell(log: StepLog) -> None:
        nonlocal started
        if not started:
            for follower in followers:
                follower.start(log.step)
            started = True
        if log.logged:
            values = _values(log)
            for follower in followers:
                follower.tell(log.step, values)

    return tell


def _values(log: StepLog) -> dict[str, float]:
    values = {"epoch": float(log.epoch + 1)}
    if log.held_out is not None:
        return values | {"held_out_top1": log.held_out}
    return values | {
        "lr": log.lr,
        "loss": log.loss,
        "top1": log.top1,
        "images_per_second": log.images_per_second,
    }


def _module(tracker: Tracker) -> Any:
    """Import a tracker.

    Raises:
        UsageError: It is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(MODULES[tracker])
    except ImportError as error:
        raise UsageError(
            f"{tracker} is not installed; run pip install 'se-prune[{tracker}]', or leave it out of track."
        ) from error


def _read_ids(path: Path) -> dict[str, str]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}


def _write_id(path: Path, tracker: str, value: str) -> None:
    write_text(path, json.dumps({**_read_ids(path), tracker: value}))
