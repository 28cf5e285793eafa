"""A cut in several steps: the record is of the dense network, and a run that was stopped ends with the same bits."""

from dataclasses import replace

import pytest
import torch

from se_prune import pipeline
from se_prune.checkpoint import open_model
from se_prune.errors import NotKept, UsageError
from se_prune.pipeline.progress import Progress
from se_prune.recipe import ApplyTable, ModelTable, RunRecipe
from se_prune.settings import SearchTable, TrainSettings
from tests.tiny import fashion_folder

pytestmark = pytest.mark.slow

STAGES = [
    "dense",
    *(f"{stage}, step {step}" for step in (1, 2) for stage in ("cut", "repaired", "fine-tuned")),
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    data = fashion_folder(tmp_path_factory.mktemp("data"), 120, 60)
    return RunRecipe(
        model=ModelTable(ref="zoo:se_resnet20", pretrained=True),
        data=str(data),
        apply=ApplyTable(macs=0.4, steps=2, shape="geometric", repair="bn"),
        finetune=TrainSettings(epochs=3, batch_size=40, lr=0.01, distill_features=0.1),
        latency_rounds=0,
    )


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """The run that nothing stops."""
    return pipeline.run_recipe(recipe, tmp_path_factory.mktemp("whole"), command="run", device="cpu")


def test_the_record_is_of_the_dense_network(whole):
    run, dense = whole.run, open_model("zoo:se_resnet20", pretrained=True)
    found = pipeline.structure(dense)
    assert [stage.label for stage in run.stages] == STAGES
    assert run.cost_before == found.cost
    assert 0.39 < run.cost_after.macs / run.cost_before.macs <= 0.4
    shares = [stage.macs / run.cost_before.macs for stage in run.stages]
    assert shares[0] == 1
    assert shares[1] == shares[3] == pytest.approx(0.4**0.5, abs=0.01)
    assert run.stages[-1].macs == run.cost_after.macs == run.plan.macs_after
    assert run.plan.macs_before == found.cost.macs
    assert run.max_abs_diff_masked < 1e-9
    # the plan of both steps leads from the dense network to what the file holds
    opened = open_model(str(whole.files["artifact"]))
    applied = pipeline.apply_plan(dense, found, run.plan, device=torch.device("cpu"), repair="none")
    assert [v.shape for v in applied.cut.state_dict().values()] == [
        v.shape for v in opened.module.state_dict().values()
    ]
    assert opened.header.plan == run.plan
    assert [entry.stage for entry in opened.header.history][-4:] == ["apply", "finetune"] * 2
    folder = whole.files["run"].parent
    assert [len((folder / f"training-{step}.csv").read_text().splitlines()) for step in (1, 2)] == [2, 3]
    page = (folder / "report.md").read_text(encoding="utf-8")
    assert all(label in page for label in STAGES)


class Killed(Exception):  # noqa: N818
    """Stands for SIGKILL."""


def test_a_run_that_is_stopped_between_any_stages_ends_with_the_same_bits(
    recipe, whole, tmp_path, monkeypatch
):
    note, left = Progress.note, 0

    def dying(self, **changes):
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        note(self, **changes)

    def start(lives):
        nonlocal left
        left = lives
        return pipeline.run_recipe(recipe, tmp_path / "out", command="run", device="cpu")

    monkeypatch.setattr(Progress, "note", dying)
    for lives in (3, 2, 3):  # after the first cut, within the first step, within the second
        with pytest.raises(Killed):
            start(lives)
    again = start(99)
    assert [(s.label, s.evaluation) for s in again.run.stages] == [
        (s.label, s.evaluation) for s in whole.run.stages
    ]
    assert again.files["artifact"].read_bytes() == whole.files["artifact"].read_bytes()
    names = [sorted(p.name for p in files["run"].parent.iterdir()) for files in (whole.files, again.files)]
    assert names[0] == names[1]


def test_steps_that_cannot_be_are_refused_before_anything_is_opened(recipe, tmp_path):
    for table, epochs, message in (
        ({"steps": 0}, 3, "steps must be at least 1, got 0"),
        ({"steps": 4}, 3, "4 steps need as many epochs of fine-tuning at least, got 3"),
        ({"macs": None, "latency": 0.5}, 3, "2 steps need a budget of channels, MACs or parameters"),
    ):
        wrong = replace(
            recipe,
            apply=replace(recipe.apply, **table),
            finetune=replace(recipe.finetune, epochs=epochs),
            model=ModelTable(ref="nowhere"),
        )
        with pytest.raises(UsageError, match=message):
            pipeline.run_recipe(wrong, tmp_path, command="run")


def test_a_search_ends_with_a_run_and_its_proof(recipe, tmp_path, monkeypatch):
    searching = replace(
        recipe,
        apply=ApplyTable(repair="bn"),
        search=SearchTable(max_drop=100.0, least=0.3, tolerance=0.3, held_out=0.25),
        finetune=None,
    )
    note = Progress.note

    def dying(self, **changes):
        note(self, **changes)
        if changes.get("tries"):
            raise Killed  # as soon as the first try is decided

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "note", dying)
        with pytest.raises(Killed):
            pipeline.run_recipe(searching, tmp_path / "out", command="run", device="cpu")
    outcome = pipeline.run_recipe(searching, tmp_path / "out", command="run", device="cpu")
    found = outcome.run.max_drop
    assert [t.budget for t in found.tries] == pytest.approx([0.65, 0.475])  # every drop is kept
    assert [t.drop.n for t in found.tries] == [30, 30]
    assert all(t.keeps for t in found.tries)
    assert found.proof.n == 60
    assert found.proof.drop == pytest.approx(-outcome.run.paired.top1_difference)
    assert found.kept
    assert outcome.run.cost_after.macs / outcome.run.cost_before.macs == pytest.approx(0.475, abs=0.01)
    assert not (tmp_path / "out" / "state").exists()
    with pytest.raises(NotKept, match="no network that was tried loses at most 0 points"):
        pipeline.run_recipe(
            replace(searching, search=SearchTable(max_drop=0.0, least=0.05, tolerance=0.5, confidence=0.99)),
            tmp_path / "never",
            command="run",
            device="cpu",
        )
