"""Whole jobs: test images are read by evaluation alone, inputs stay as they are, and a run leaves all its files."""

from dataclasses import replace

import pytest
import torch

from se_prune import pipeline
from se_prune.checkpoint import open_model
from se_prune.data import open_data
from se_prune.errors import BudgetError, SePruneError, UsageError
from se_prune.recipe import ApplyTable, ModelTable, RunRecipe
from se_prune.records import Budget
from se_prune.results import Run
from se_prune.schema import from_json
from se_prune.settings import TrainSettings
from tests.tiny import fashion_folder

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
ONE_EPOCH = TrainSettings(epochs=1, batch_size=64, lr=0.01)


class Opened(Exception):  # noqa: N818
    """Somebody read a test image or label."""


class Sealed:
    """A test split that nobody may read; its length is no secret."""

    def __init__(self, split):
        self.size = len(split)

    def __len__(self):
        return self.size

    def __getattr__(self, name):
        raise Opened(name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fashion_folder(tmp_path_factory.mktemp("data"), 300, 120)


@pytest.fixture(scope="module")
def sealed(folder):
    data = open_data(str(folder))
    return replace(data, test=Sealed(data.test))


@pytest.fixture
def dense():
    return open_model("zoo:se_resnet20", pretrained=True)


def weights(network):
    return {name: value.clone() for name, value in network.module.state_dict().items()}


def same(network, before):
    now = network.module.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[k], before[k]) for k in before)


def chosen(network, found, data):
    return pipeline.plan(
        network, found, Budget(kind="macs", value=0.5), criterion="excitation", device=CPU, data=data
    )


def test_only_evaluation_reads_test_images(sealed, dense):
    statistics = pipeline.analyze(dense, sealed, device=CPU)
    assert statistics.n == 300
    found = pipeline.structure(dense)
    plan = chosen(dense, found, sealed)
    applied = pipeline.apply_plan(dense, found, plan, device=CPU, data=sealed)
    tuned = pipeline.finetune(applied.network, sealed, ONE_EPOCH, device=CPU, teacher=dense)
    assert [entry.stage for entry in tuned.header.history][-2:] == ["apply", "finetune"]
    with pytest.raises(Opened):
        pipeline.assess(tuned, sealed, device=CPU)


@pytest.mark.parametrize("criterion", ["taylor", "hessian"])
def test_criteria_that_need_gradients_read_training_images_alone(sealed, dense, criterion):
    found = pipeline.structure(dense)
    plan = pipeline.plan(
        dense, found, Budget(kind="macs", value=0.8), criterion=criterion, device=CPU, data=sealed
    )
    assert plan.channels_removed > 0
    with pytest.raises(Opened):
        next(iter(sealed.test.batches(8, dense.header.preprocessing)))


def test_jobs_leave_their_inputs_as_they_are(sealed, dense):
    before = weights(dense)
    found = pipeline.structure(dense)
    applied = pipeline.apply_plan(dense, found, chosen(dense, found, sealed), device=CPU, data=sealed)
    assert same(dense, before)
    student, header = weights(applied.network), applied.network.header
    tuned = pipeline.finetune(applied.network, sealed, ONE_EPOCH, device=CPU, teacher=dense)
    assert same(dense, before)
    assert same(applied.network, student)
    assert applied.network.header == header
    assert not applied.network.module.training
    assert all(p.grad is None for n in (dense, applied.network) for p in n.module.parameters())
    assert not same(tuned, student)  # it did train
    assert not same(applied.network, before)  # and `same` can say no


TINY = RunRecipe(
    model=ModelTable(ref="zoo:se_resnet20", pretrained=True),
    data="set by the test",
    apply=ApplyTable(macs=0.5),
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"export": ("onnx", "onxx")}, "no export target 'onxx' \\(did you mean 'onnx'\\?\\)"),
        ({"apply": ApplyTable(macs=0.5, criterion="excitaton")}, "did you mean 'excitation'"),
        ({"apply": ApplyTable(macs=1.5)}, "--macs must be above 0 and at most 1, got 1.5"),
        ({"apply": ApplyTable(macs=0.5, round_to=0)}, "--round-to and --min-channels must be at least 1"),
        ({"apply": ApplyTable()}, "exactly one budget"),
        ({"apply": ApplyTable(macs=0.001)}, r"--macs 0.001 cannot be met: .* at least 0\.009 must stay"),
    ],
)
def test_a_run_refuses_a_wrong_recipe_before_the_work(folder, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(pipeline.training, "assess", lambda *_, **__: pytest.fail("it went to work"))
    recipe = replace(TINY, data=str(folder), **changes)
    with pytest.raises((UsageError, BudgetError), match=message):
        pipeline.run_recipe(recipe, tmp_path / "out", command="", device="cpu")
    assert not (tmp_path / "out").exists()
    with pytest.raises(pytest.fail.Exception, match="it went to work"):  # the control
        pipeline.run_recipe(replace(TINY, data=str(folder)), tmp_path / "out", command="", device="cpu")


def test_a_run_refuses_a_folder_that_cannot_be_made_before_the_work(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline.training, "assess", lambda *_, **__: pytest.fail("it went to work"))
    (tmp_path / "out").write_text("a file", encoding="utf-8")
    with pytest.raises(SePruneError, match=r"cannot make the folder .*out: File exists"):
        pipeline.run_recipe(replace(TINY, data=str(folder)), tmp_path / "out", command="", device="cpu")


def test_a_wrong_budget_is_refused_before_anything_is_measured(sealed, dense, monkeypatch):
    monkeypatch.setattr(pipeline.jobs, "analyze", lambda *_, **__: pytest.fail("it measured"))
    found = pipeline.structure(dense)

    def plan(value, **options):
        budget = Budget(kind="macs", value=value)
        pipeline.plan(dense, found, budget, criterion="excitation", device=CPU, data=sealed, **options)

    for value, options in ((float("nan"), {}), (0.0, {}), (0.5, {"round_to": 0}), (0.5, {"min_channels": 0})):
        with pytest.raises(UsageError, match="must be"):
            plan(value, **options)
    with pytest.raises(BudgetError, match=r"at least 0\.009 must stay"):
        plan(0.001)
    with pytest.raises(pytest.fail.Exception, match="it measured"):  # the control
        plan(0.5)


def test_a_run_leaves_all_its_files(folder, tmp_path):
    recipe = RunRecipe(
        model=ModelTable(ref="zoo:se_resnet20", pretrained=True),
        data=str(folder),
        apply=ApplyTable(macs=0.5),
        finetune=ONE_EPOCH,
        export=("onnx",),
        latency_rounds=2,
    )
    outcome = pipeline.run_recipe(recipe, tmp_path / "out", command="se-prune run tiny", device="cpu")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {
        "pruned.safetensors",
        "dense.safetensors",
        "statistics.safetensors",
        "pruned.onnx",
        "run.json",
        "report.html",
        "report.md",
        "report.json",
        "MODEL_CARD.md",
    }
    assert not {name for name in names if name.startswith(".")}  # no temporary file is left
    assert set(outcome.files) == {"artifact", "run", "card", "report", "markdown", "onnx"}
    run = outcome.run
    assert from_json(Run, outcome.files["run"].read_text(encoding="utf-8")) == run
    assert [s.stage for s in run.stages] == ["dense", "cut", "repaired", "fine-tuned"]
    assert run.cost_after.macs <= 0.5 * run.cost_before.macs
    assert {s.evaluation.n for s in run.stages} == {120}
    assert len(run.labels) == 120
    first, last = (s.evaluation.predictions for s in (run.stages[0], run.stages[-1]))
    different = sum(a != b for a, b in zip(first, last, strict=True))
    assert len(run.changed) == min(different, 24)
    for item in run.changed:
        assert (item.label, item.first, item.second) == (
            run.labels[item.index], first[item.index], last[item.index],
        )  # fmt: skip
    assert {operation.part for operation in run.operations[1]} == set(run.parts.values())
    assert set(run.parts) == set(run.cost_before.per_layer)
    for summary, gate in zip(run.sites_after, run.profiles_after, strict=True):
        assert len(gate.channels) == len(gate.mean) == summary.channels
    assert set(run.hashes) == {
        "dense.safetensors", "pruned.safetensors", "pruned.onnx",
        "training images and labels", "test images and labels",
    }  # fmt: skip
    card = (tmp_path / "out" / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name")
    assert f"| top-1 | {100 * run.stages[-1].evaluation.top1:.2f} % |" in card

    again = open_model(str(outcome.files["artifact"]))
    x = pipeline.example_input(again.header.preprocessing, 8)
    with torch.no_grad():
        assert torch.equal(again.module(x), outcome.network.module.eval()(x))
        dense = open_model(str(tmp_path / "out" / "dense.safetensors"))
        assert not torch.equal(dense.module(x), again.module(x))
