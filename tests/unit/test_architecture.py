"""How the code is laid out: no module imports a later stage, heavy packages have one door, nothing unpickles."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import se_prune_cli

import se_prune

ROOT = Path(se_prune.__file__).parent
#: The one direction: a module may import its own layer and those before it. Each layer is a file or a folder.
ORDER = (
    "errors",  # kinds of user errors; import nothing
    "schema",  # what records are made of
    "records",  # what passes between stages
    "settings",  # how to train
    "results",  # what a run results in
    "distributed",  # several processes
    "files",  # writing whole files
    "device",
    "text",  # how numbers are written
    "schedule",  # steps of a cut
    "recipe",
    "keys",  # what a recipe may say
    "zoo",  # architectures
    "computed",  # convolutions that compute their weights
    "fixed",  # what follows the channels beside parameters
    "artifact",  # our own file, and the layer types that every stage shares
    "preprocessing",  # how a network wants its images
    "foreign",  # files of others
    "recognise",  # tensors → architecture
    "onnx_file",  # ONNX files → networks
    "checkpoint",  # MODEL → network
    "data",
    "gates",  # sites, statistics, energies
    "channels",  # couplings
    "layers",  # sizes and MACs
    "timing",  # layers → milliseconds
    "cost",
    "latency",  # measured
    "scoring",
    "ledger",  # why no more channels leave
    "problem",  # widths and what they cost
    "planning",
    "folding",  # which gates become constants
    "surgery",  # cut, fold and repair
    "training",
    "evaluate",
    "report",
    "export",
    "runtimes",  # where networks run and are timed
    "pipeline",  # sees them all
)
RANK = {layer: rank for rank, layer in enumerate(ORDER)}


def modules():
    """Return (path from the package's folder, syntax tree) of every module of se_prune."""
    files = sorted(ROOT.rglob("*.py"))
    assert len(files) > 40
    return [(p.relative_to(ROOT).as_posix(), ast.parse(p.read_text(encoding="utf-8"))) for p in files]


def imports(tree):
    """Yield the dotted names that a module imports anywhere, also under TYPE_CHECKING and in functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer(path):
    return path.partition("/")[0].removesuffix(".py")


def backwards(path, tree):
    """Return the layers that a module imports although they come after its own."""
    own = RANK[layer(path)]
    parts = [name.split(".") for name in imports(tree)]
    used = {p[1] for p in parts if p[0] == "se_prune" and len(p) > 1}
    return sorted(name for name in used & set(RANK) if RANK[name] > own)


def importers(package, trees):
    return {path for path, tree in trees if any(n.split(".")[0] == package for n in imports(tree))}


def test_every_module_has_a_place_in_the_order():
    found = {layer(path) for path, _ in modules()} - {"__init__"}
    assert found == set(ORDER)


def test_no_module_imports_a_later_stage():
    checked = [(p, t) for p, t in modules() if p != "__init__.py"]
    assert {path: late for path, tree in checked if (late := backwards(path, tree))} == {}
    seen = {
        n.split(".")[1] for p, t in checked if layer(p) == "pipeline" for n in imports(t) if "se_prune." in n
    }
    assert {"gates", "scoring", "planning", "surgery", "training", "evaluate", "report", "export"} <= seen


@pytest.mark.parametrize(
    "source",
    [
        "import se_prune.pipeline",
        "from se_prune import pipeline",
        "from se_prune.pipeline.jobs import cut",
        "if TYPE_CHECKING:\n    from se_prune.pipeline import plan",
        "def f():\n    from se_prune.pipeline import plan",
    ],
)
def test_a_later_stage_is_seen_however_it_is_imported(source):
    assert backwards("gates/tap.py", ast.parse(source)) == ["pipeline"]
    assert backwards("pipeline/run.py", ast.parse(source)) == []


def test_the_package_itself_names_its_api_and_imports_none_of_it():
    (tree,) = [t for p, t in modules() if p == "__init__.py"]
    assert sorted(set(imports(tree))) == [
        "__future__", "__future__.annotations", "importlib", "typing", "typing.Any",
    ]  # fmt: skip
    for name in se_prune.__all__:
        assert getattr(se_prune, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'prune_everything'"):
        _ = se_prune.prune_everything


def test_torch_pruning_fvcore_and_torch_distributed_have_one_door_each():
    trees = modules()
    door = {f"channels/{name}.py" for name in ("graph", "importances", "joints", "shuffles")}
    assert importers("torch_pruning", trees) == door
    assert importers("fvcore", trees) == {"cost.py"}
    assert len(importers("torch", trees)) > 20
    speaking = {p for p, tree in trees if any(n.startswith("torch.distributed") for n in imports(tree))}
    assert speaking == {"distributed.py"}


def test_the_library_does_not_know_the_command_line():
    trees = modules()
    for package in ("se_prune_cli", "typer", "click", "rich"):
        assert importers(package, trees) == set()
    files = sorted(Path(se_prune_cli.__file__).parent.rglob("*.py"))
    cli = [(str(path), ast.parse(path.read_text(encoding="utf-8"))) for path in files]
    assert len(importers("typer", cli)) > 10
    assert importers("click", cli) == set()  # Typer brings its own


def unsafe(tree):
    """Return what could run code from a file, or write a file that could."""
    found = [n for n in imports(tree) if re.match(r"(pickle|_pickle|cloudpickle|dill|joblib|shelve)\b", n)]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            found += [f"torch.{a.name}" for a in node.names if a.name in {"load", "save"}]
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.save":
            found.append("torch.save")
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            safe = {k.arg: ast.unparse(k.value) for k in node.keywords}.get("weights_only") == "True"
            found += [] if safe else ["torch.load"]
    return found


def test_nothing_unpickles():
    trees = modules()
    assert {path: found for path, tree in trees if (found := unsafe(tree))} == {}
    loads = [p for p, t in trees for n in ast.walk(t) if isinstance(n, ast.Attribute) and n.attr == "load"
             and ast.unparse(n) == "torch.load"]  # fmt: skip
    assert loads == ["foreign.py"]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", ["pickle"]),
        ("from pickle import loads", ["pickle", "pickle.loads"]),
        ("torch.save(x, f)", ["torch.save"]),
        ("from torch import load", ["torch.load"]),
        ("torch.load(f)", ["torch.load"]),
        ("torch.load(f, weights_only=False)", ["torch.load"]),
        ("torch.load(f, weights_only=flag)", ["torch.load"]),
        ("torch.load(f, weights_only=True)", []),
        ("import pickletools", []),
    ],
)
def test_what_unpickles_is_seen(source, found):
    assert unsafe(ast.parse(source)) == found


LIST = "import sys; print('torch' in sys.modules, file=sys.stderr)"


@pytest.mark.parametrize(
    ("code", "loaded"),
    [
        ("import se_prune", False),
        ("import se_prune; dir(se_prune); se_prune.__version__", False),
        ("import se_prune.pipeline", True),
        ("import se_prune; se_prune.open_model", True),
    ],
)
def test_importing_the_package_loads_no_torch(code, loaded):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"{code}\n{LIST}"], capture_output=True, text=True, check=True
    )
    assert done.stderr.split()[-1] == str(loaded)


RUN = f"""
import atexit
atexit.register(lambda: exec({LIST!r}))
from se_prune_cli.app import main
main()
"""


@pytest.mark.parametrize(
    ("arguments", "code", "loaded"),
    [
        (["--help"], 0, False),
        (["apply", "--help"], 0, False),
        (["--version"], 0, False),
        (["archs", "se_resnet2", "--json"], 2, True),  # a command that works loads it
    ],
)
def test_help_loads_no_torch(arguments, code, loaded):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    assert done.stderr.split()[-1] == str(loaded)
