"""How far a run has come, so that one that was stopped goes on at the stage it was in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from se_prune import __version__, artifact, distributed
from se_prune.artifact import Network
from se_prune.data import DataSource
from se_prune.errors import CheckpointError, SePruneError
from se_prune.files import make_folder, remove_folder, write_text
from se_prune.pipeline.jobs import Applied
from se_prune.recipe import RunRecipe
from se_prune.records import Cost, Plan
from se_prune.results import StageResult, Try
from se_prune.schema import FORBID_EXTRA, SCHEMA_VERSION, from_json, record, to_json
from se_prune.training.state import fingerprint

FOLDER, FILE = "state", "progress.json"


@record
class CutRecord:
    """What came of a step's cut beside the repaired network: plan, cost, the proof, the seconds of the repair.

    `plan` is of the dense network, and cuts what this step and those before it do; the proof is of this step.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    plan: Plan
    after: Cost
    max_abs_diff_masked: float
    repair_seconds: float


@record
class RunProgress:
    """The stages of a run that are finished; `statistics` says that those in the run's folder are its own.

    `cuts` holds a record per step that is cut and repaired; `tuned` steps are fine-tuned, the last of them in
    `tuned_seconds`. `tries` are those of a search that are decided.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    schema_version: Literal[1] = SCHEMA_VERSION
    fingerprint: str
    stages: tuple[StageResult, ...] = ()
    statistics: bool = False
    cuts: tuple[CutRecord, ...] = ()
    tuned: int = 0
    tuned_seconds: float = 0.0
    tries: tuple[Try, ...] = ()


class Progress:
    """The record of a run's finished stages in `state/` below its folder, written anew after each of them."""

    def __init__(self, folder: Path, recipe: RunRecipe, network: Network, data: DataSource, *, resume: bool):
        self.folder = folder / FOLDER
        self.trust = network.header.arch.ref
        if not resume:
            remove_folder(self.folder)
        tuned = None if recipe.finetune is None else replace(recipe.finetune, track=())
        told = f"{__version__} {to_json(replace(recipe, finetune=tuned))}"
        mark = fingerprint(told, [data.train.labels, data.test.labels], [network.module])
        known = self._known(mark)
        if known is None:
            remove_folder(self.folder)
        self.record = known or RunProgress(fingerprint=mark)
        make_folder(self.folder)

    def _known(self, mark: str) -> RunProgress | None:
        path = self.folder / FILE
        text = distributed.from_main(lambda: path.read_text(encoding="utf-8") if path.exists() else None)
        if text is None:
            return None
        try:
            known = from_json(RunProgress, text, what=str(path))
        except SePruneError as error:
            raise CheckpointError(f"{error} Start again with --no-resume.") from error
        if known.fingerprint != mark and not known.cuts and not known.tries:
            return None  # little is lost
        if known.fingerprint != mark:
            raise CheckpointError(
                f"{self.folder.parent} holds a run of another recipe that was stopped; give the same recipe, model and "
                "data to go on, or --no-resume to start again."
            )
        return known

    def note(self, **changes: Any) -> None:
        """Write down what is finished."""
        self.record = replace(self.record, **changes)
        write_text(self.folder / FILE, to_json(self.record))

    def result(self, stage: str, step: int | None) -> StageResult | None:
        """Return the result of a stage, where it is finished."""
        found = (r for r in self.record.stages if (r.stage, r.step) == (stage, step))
        return next(found, None)

    def add(self, stage: StageResult) -> None:
        """Write down the result of a stage."""
        self.note(stages=(*self.record.stages, stage))

    def cut(self, step: int) -> CutRecord | None:
        """Return what came of the cut of a step (from 1), where it is finished."""
        return self.record.cuts[step - 1] if step <= len(self.record.cuts) else None

    def keep(self, step: int, applied: Applied) -> None:
        """Write down the cut and repaired network of a step, and what came of it."""
        artifact.save(self._repaired(step), applied.network)
        cut = CutRecord(
            plan=applied.plan,
            after=applied.after,
            max_abs_diff_masked=applied.max_abs_diff_masked,
            repair_seconds=applied.repair_seconds,
        )
        self.note(cuts=(*self.record.cuts, cut))
        distributed.barrier()  # all are going to read it

    def repaired(self, step: int) -> Network:
        """Return the repaired network that `keep` wrote."""
        return artifact.load(self._repaired(step), trust=self.trust)

    def keep_tuned(self, step: int, network: Network, seconds: float) -> None:
        """Write down the fine-tuned network of a step, and forget the state of its training."""
        artifact.save(self._tuned(step), network)
        self.note(tuned=step, tuned_seconds=seconds)
        distributed.barrier()
        remove_folder(self.training(step))

    def tuned(self, step: int) -> Network | None:
        """Return the fine-tuned network of a step, where it is finished."""
        if step > self.record.tuned:
            return None
        return artifact.load(self._tuned(step), trust=self.trust)

    def training(self, step: int) -> Path:
        """Return the folder that keeps the state of a step's training."""
        return self.folder / f"training-{step}"

    def _repaired(self, step: int) -> Path:
        return self.folder / f"repaired-{step}.safetensors"

    def _tuned(self, step: int) -> Path:
        return self.folder / f"tuned-{step}.safetensors"

    def finish(self) -> None:
        """Forget all of it: the run's own files are whole."""
        remove_folder(self.folder)
