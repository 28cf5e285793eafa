"""Recipes: what is refused, with what to write instead, and that those we ship are good."""

import dataclasses
import re
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch

from se_prune import artifact
from se_prune.data.batches import TensorImages
from se_prune.data.source import DataSource
from se_prune.errors import UsageError
from se_prune.keys import key_reference, key_texts
from se_prune.pipeline import run_recipe
from se_prune.pipeline import train as train_network
from se_prune.recipe import (
    BUNDLED,
    SOURCE,
    ApplyTable,
    ModelTable,
    RunRecipe,
    budget_of,
    find_recipe,
    read_run,
    read_toml,
    train_settings,
)
from se_prune.records import Budget, Preprocessing
from se_prune.settings import SearchTable, TrainSettings
from se_prune.zoo import registry

GOOD = """
data = "fashion-mnist"
[model]
ref = "zoo:se_resnet20"
[apply]
macs = 0.5
[finetune]
lr = 0.01
"""


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "recipe.toml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def test_a_good_recipe_and_its_defaults(written):
    recipe = read_run(written(GOOD))
    assert recipe.model.ref == "zoo:se_resnet20"
    assert recipe.apply.macs == 0.5
    assert recipe.apply.criterion == "excitation"
    assert recipe.finetune.lr == 0.01
    assert recipe.finetune.epochs == 2  # fine-tuning is shorter than training
    assert read_run(written(GOOD.partition("[finetune]")[0])).finetune is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("macs = 0.5", "mac = 0.5", r"did you mean 'macs'\?"),
        ("lr = 0.01", "epoch = 3", r"did you mean 'epochs'\?"),
        ("data =", "dat =", r"did you mean 'data'\?"),
        ("macs = 0.5", "macs = 0.5\nsparsity = 0.5", "exactly one budget"),
        ("macs = 0.5", "", "exactly one budget"),
        ("macs = 0.5", 'macs = "half"', "macs"),
        ("macs = 0.5", "macs = 0.5\nrepair = 3", "repair"),
        ("lr = 0.01", "epochs = 1.5", "epochs"),
        ("lr = 0.01", "lr = nan", "lr must be at least 0.0 and finite, got nan"),
        ("lr = 0.01", "flip = 1.5", "flip must be at least 0, at most 1 and finite, got 1.5"),
        ("lr = 0.01", "ema_decay = -0.1", "ema_decay must be at least 0, at most 1 and finite, got -0.1"),
        ("lr = 0.01", "epochs = 0", "epochs must be at least 1 and finite, got 0"),
        ("lr = 0.01", 'optimizer = "adm"', "optimizer"),
        ("lr = 0.01", "held_oud = 0.1", r"did you mean 'held_out'\?"),
        ("lr = 0.01", "patience = 3", "patience needs images to measure each epoch; add held_out"),
        ("lr = 0.01", 'keep = "best"', 'keep = "best" needs images'),
        ("lr = 0.01", "mixup = 0.2\nbatch_size = 7", "batch_size must be even, got 7"),
        ("lr = 0.01", "ema_bn_images = 9", "ema_bn_images needs an average"),
        ("lr = 0.01", "compile = true\ndistill_features = 1", "leave out compile"),
        ("lr = 0.01", "group_lasso = 1e-4", "a run in one step has none; raise steps"),
        ("lr = 0.01", "group_lasso_ramp = 2", "at most 1 and finite, got 2"),
        ("macs = 0.5", "macs = 0.5\nsteps = 0", "steps must be at least 1, got 0"),
        ("macs = 0.5", "macs = 0.5\nsteps = 3", "as many epochs of fine-tuning at least, got 2"),
        ("macs = 0.5", 'macs = 0.5\nshape = "cubik"', "'linear', 'cubic' or 'geometric'"),
        ("macs = 0.5", "latency = 0.5\nsteps = 2", "need a budget of channels, MACs or parameters"),
        ("[apply]", "[search]\nmax_drop = 0.5\n[apply]", "give a budget or max_drop, not both"),
        (
            "[apply]\nmacs = 0.5",
            "[search]\nmax_drop = -1",
            "max_drop must be at least 0.0 and at most 100.0, got -1",
        ),
        (
            "[apply]\nmacs = 0.5",
            "[search]\nmax_drop = 1\nconfidence = 0.2",
            "confidence must be at least 0.5",
        ),
        ("[apply]\nmacs = 0.5", "[search]\nmax_drob = 1", r"did you mean 'max_drop'\?"),
        ("lr = 0.01", "rand_augment_magnitude = 11", "at most 10 and finite, got 11"),
        ("lr = 0.01", 'track = ["tensorbord"]', "'tensorboard', 'mlflow' or 'wandb'"),
        ('ref = "zoo:se_resnet20"', "", "ref"),
        ("macs = 0.5", 'fold_gates = "none"', "exactly one budget"),
        ("macs = 0.5", "fold_gates = true", "fold_gates takes .* got a truth value"),
        ("[apply]", "[apply", "is not TOML"),
    ],
)
def test_what_is_refused(written, old, new, message):
    assert GOOD.count(old) == 1
    with pytest.raises(UsageError, match=message) as caught:
        read_run(written(GOOD.replace(old, new)))
    assert "recipe.toml" in str(caught.value) or "budget" in str(caught.value)
    read_run(written(GOOD))


def test_a_search_stands_in_place_of_a_budget(written):
    recipe = read_run(written(GOOD.replace("macs = 0.5", "").replace("[apply]", "[search]\nmax_drop = 1")))
    assert recipe.search == SearchTable(max_drop=1.0)
    assert recipe.apply == ApplyTable()


def test_a_recipe_may_fold_gates_alone(written):
    for value, read in (('"auto"', "auto"), ("2", 2), ('"a,b"', "a,b")):
        apply = read_run(written(GOOD.replace("macs = 0.5", f"fold_gates = {value}"))).apply
        assert (apply.fold_gates, apply.macs, apply.fold_tolerance) == (read, None, None)
    assert budget_of(None, None, None, folds=True) == Budget(kind="sparsity", value=0.0)
    assert budget_of(None, 0.5, None, folds=True) == Budget(kind="macs", value=0.5)
    with pytest.raises(UsageError, match="exactly one budget"):
        budget_of(0.5, 0.5, None, folds=True)


def test_files_that_cannot_be_read(written, tmp_path):
    with pytest.raises(UsageError, match=r"cannot read the recipe .*gone\.toml: No such file"):
        read_toml(tmp_path / "gone.toml")
    with pytest.raises(UsageError, match="cannot read the recipe"):
        read_toml(tmp_path)
    with pytest.raises(UsageError, match="is not TOML"):
        read_toml(written(b"\xff\xfe"))
    assert read_toml(written("a = 1")) == {"a": 1}


def test_recipes_are_found_by_path_and_by_name(written, tmp_path):
    path = written(GOOD)
    assert find_recipe(path) == path
    assert find_recipe("demo").name == find_recipe("demo.toml").name == "demo.toml"
    with pytest.raises(UsageError, match=r"no recipe demmo \(did you mean 'demo'\?\).*one of: .*demo"):
        find_recipe("demmo")
    with pytest.raises(UsageError, match="no recipe"):
        find_recipe(tmp_path / "demo.toml")  # a path is not a name


def test_settings_of_train_and_finetune(written):
    path = written("[train]\nlr = 0.3\nepochs = 7\n[finetune]\nlr = 0.004\n")
    assert (train_settings(path, "train").lr, train_settings(path, "train").epochs) == (0.3, 7)
    assert train_settings(path, "finetune").lr == 0.004
    assert train_settings(path, "train", epochs=1, lr=None).epochs == 1
    assert train_settings(None, "finetune").lr == 0.02
    with pytest.raises(UsageError, match=r"did you mean 'lr'|lrr"):
        train_settings(written("[train]\nlrr = 0.3\n"), "train")
    with pytest.raises(UsageError, match=r"did you mean 'train'\?"):
        train_settings(written("[trian]\nlr = 0.3\n"), "train")
    with pytest.raises(UsageError, match="batch_size must be at least 1"):
        train_settings(None, "train", batch_size=0)


@pytest.mark.parametrize("cls", [RunRecipe, ModelTable, ApplyTable, SearchTable, TrainSettings])
def test_every_key_has_a_text(cls):
    texts = key_texts(cls)
    assert set(texts) == {f.name for f in dataclasses.fields(cls)}
    assert all(text.endswith(".") and len(text) > 5 for text in texts.values())


def test_the_reference_of_keys_is_the_present_one():
    path = SOURCE / "KEYS.md"
    if not path.is_file():
        pytest.skip("only the source tree has it beside the recipes")
    assert path.read_text(encoding="utf-8") == key_reference(), "se-prune run --keys > recipes/KEYS.md"
    for row in (
        "| `macs` | number | none |",
        "| `lr` | number | 0.1 |",
        "other defaults: epochs = 2, lr = 0.02",
    ):
        assert row in key_reference()


SHIPPED = sorted((BUNDLED if BUNDLED.is_dir() else SOURCE).rglob("*.toml"))


def test_there_are_recipes():
    assert len(SHIPPED) >= 18
    assert "demo" in {path.stem for path in SHIPPED}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_recipe_that_ships_is_good(path: Path):
    assert path.read_text(encoding="utf-8").startswith("# ")  # says what it is for
    values = read_toml(path)
    if "model" in values:
        recipe = read_run(path)
        assert recipe.name
    else:
        (table,) = set(values) & {"train", "finetune"}
        settings = train_settings(path, table)
        assert set(values[table]) <= {f.name for f in dataclasses.fields(TrainSettings)}
        assert all(getattr(settings, key) == value for key, value in values[table].items())


LARGE = [path for path in SHIPPED if path.stem.startswith(("imagenet", "places365"))]


@pytest.mark.parametrize("path", LARGE, ids=lambda p: p.stem)
def test_large_recipes_name_their_torchrun_line_whose_processes_can_share_a_batch(path: Path):
    text = path.read_text(encoding="utf-8")
    (line,) = re.findall(
        r"^#   torchrun --nproc-per-node (\d+) -m se_prune_cli (train|run) (.*)$", text, re.M
    )
    values = read_toml(path)
    table = "train" if line[1] == "train" else "finetune"
    assert f"recipes/{path.name}" in line[2]
    assert values[table]["batch_size"] % int(line[0]) == 0


def test_there_are_large_recipes():
    assert len(LARGE) >= 11


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_the_network_of_every_recipe_can_be_built(path: Path):
    """Large networks take no memory here; `reports.bench recipes` runs them."""
    text = path.read_text(encoding="utf-8")
    values = read_toml(path)
    ref = values["model"]["ref"] if "model" in values else re.search(r"--arch (\S+)", text)[1]
    if ref.endswith(".safetensors"):  # another recipe makes it, and the head says which
        (made,) = re.findall(r"recipes/(\w+_train)\.toml", text)
        assert made in {p.stem for p in SHIPPED}
        return
    with torch.device("meta"):
        spec = registry.resolve(ref)
        model = registry.build(spec)
    assert any("se" in name for name, _ in model.named_modules())
    if values.get("model", {}).get("pretrained") and ref.startswith("timm:"):
        assert timm.get_pretrained_cfg(ref.removeprefix("timm:")).has_weights


@pytest.mark.parametrize("size", [20, 56])
@pytest.mark.parametrize("classes", [10, 100])
def test_the_recipes_of_cifar_run_for_two_steps(tmp_path, monkeypatch, size, classes):
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    split = TensorImages(images=images, labels=torch.arange(8) % classes)
    own = Preprocessing(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.25,) * 3)
    names = tuple(f"class {i}" for i in range(classes))
    data = DataSource(ref="torch/fake", classes=names, train=split, test=split, preprocessing=own)
    monkeypatch.setattr("se_prune.pipeline.run.open_data", lambda *a, **k: data)
    monkeypatch.chdir(tmp_path)
    stem = f"cifar{classes}_se_resnet{size}"
    train = replace(train_settings(find_recipe("cifar_train"), "train"), epochs=1, batch_size=4)
    network, _ = train_network(f"zoo:se_resnet{size}", data, train, device=torch.device("cpu"))
    artifact.save(f"{stem}.safetensors", network)
    recipe = read_run(find_recipe(stem))
    short = replace(
        recipe, finetune=replace(recipe.finetune, epochs=1, batch_size=4), latency_rounds=0, export=()
    )
    run = run_recipe(short, tmp_path / "run", command="test").run
    assert run.cost_after.macs <= 0.5 * run.cost_before.macs
    assert [s.stage for s in run.stages] == ["dense", "cut", "repaired", "fine-tuned"]


def test_a_recipe_without_data_asks_for_it(written):
    recipe = read_run(written(GOOD.replace('data = "fashion-mnist"', "")))
    with pytest.raises(UsageError, match="the recipe names no data: give it with --data"):
        run_recipe(recipe, Path("nowhere"), command="test")
