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
from se_prune.results import StageResult
from se_prune.schema import FORBID_EXTRA, SCHEMA_VERSION, from_json, record, to_json
from se_prune.training.state import fingerprint

FOLDER, FILE = "state", "progress.json"


@record
class CutRecord:
    """What came of the cut beside the repaired network: plan, cost, the proof, the seconds that the repair took."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    plan: Plan
    after: Cost
    max_abs_diff_masked: float
    repair_seconds: float


@record
class RunProgress:
    """The stages of a run that are finished; `statistics` says that those in the run's folder are its own."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    schema_version: Literal[1] = SCHEMA_VERSION
    fingerprint: str
    stages: tuple[StageResult, ...] = ()
    statistics: bool = False
    cut: CutRecord | None = None


class Progress:
    """The record of a run's finished stages in `state/` below its folder, written anew after each of them."""

    def __init__(self, folder: Path, recipe: RunRecipe, network: Network, data: DataSource, *, resume: bool):
        self.folder = folder / FOLDER
        self.repaired = self.folder / "repaired.safetensors"
        if not resume:
            remove_folder(self.folder)
        tuned = None if recipe.finetune is None else replace(recipe.finetune, track=())
        told = f"{__version__} {to_json(replace(recipe, finetune=tuned))}"
        mark = fingerprint(told, [data.train.labels, data.test.labels], [network.module])
        self.record = self._known(mark) or RunProgress(fingerprint=mark)
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
        if known.fingerprint != mark and known.cut is None:
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

    @property
    def stages(self) -> dict[str, StageResult]:
        """The results of the stages that are finished, by name."""
        return {stage.stage: stage for stage in self.record.stages}

    def add(self, stage: StageResult) -> None:
        """Write down the result of a stage."""
        self.note(stages=(*self.record.stages, stage))

    def keep(self, applied: Applied) -> None:
        """Write down the cut and repaired network, and what came of it."""
        artifact.save(self.repaired, applied.network)
        self.note(
            cut=CutRecord(
                plan=applied.plan,
                after=applied.after,
                max_abs_diff_masked=applied.max_abs_diff_masked,
                repair_seconds=applied.repair_seconds,
            )
        )
        distributed.barrier()  # all are going to read it

    def cut(self, trust: str) -> tuple[Network, CutRecord]:
        """Return the repaired network that `keep` wrote; `trust` is the architecture that it may name."""
        assert self.record.cut is not None
        return artifact.load(self.repaired, trust=trust), self.record.cut

    def finish(self) -> None:
        """Forget all of it: the run's own files are whole."""
        remove_folder(self.folder)
