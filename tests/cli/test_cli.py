"""Every command on a small data set: one JSON document on stdout, and one sentence for each mistake of a user."""

import contextlib
import io
import json
import pickle
import re
import shlex
import sys
from pathlib import Path
from unittest import mock

import pytest
import timm
import torch
from se_prune_cli import app

from se_prune.artifact import read_header
from se_prune.checkpoint import open_model
from se_prune.errors import CheckpointError
from tests.tiny import fashion_folder, png_folder

pytestmark = pytest.mark.slow

NET = "zoo:se_resnet20 --pretrained"
RECIPE = """
data = "data"
export = ["onnx"]
latency_rounds = 2
[model]
ref = "zoo:se_resnet20"
pretrained = true
[apply]
macs = 0.5
[finetune]
epochs = 1
"""


def call(line):
    """Run `se-prune LINE` in this process as the console script does; return (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["se-prune", *shlex.split(line)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        app.main()
    return ended.value.code or 0, out.getvalue(), err.getvalue()


def document(line):
    """Run a command with `--json`, and return what stdout holds: one document and nothing else."""
    code, out, err = call(f"{line} --json")
    assert code == 0, err
    assert err.strip() or line.startswith("archs")
    return json.loads(out)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data and the files of analyze, apply and run; the working folder of all tests here."""
    folder = tmp_path_factory.mktemp("cli")
    with contextlib.chdir(folder):
        fashion_folder(Path("data"), 300, 120)
        png_folder(Path("two"))
        Path("empty").mkdir()
        yield folder


@pytest.fixture(scope="module")
def analysed(place):
    return document(f"analyze {NET} --data data -o stats.safetensors")


@pytest.fixture(scope="module")
def applied(analysed):
    return document(f"apply {NET} --data data --stats stats.safetensors --macs 0.5 -o cut.safetensors")


# Every command, on what users may rely on.


def test_inspect(place):
    found = document(f"inspect {NET}")
    assert {"sites", "groups", "cost"} <= set(found)
    assert len(found["sites"]) == 9
    assert all({"name", "channels", "hidden"} <= set(s) for s in found["sites"])
    assert all(s["explanation"].startswith("avg squeeze → reduce (") for s in found["sites"])
    assert found["left_alone"] == []
    assert all({"name", "kind", "channels"} <= set(g) for g in found["groups"])
    assert found["cost"]["params"] > 100_000
    assert found["cost"]["macs"] > found["cost"]["params"]


def test_archs(place):
    (found,) = document("archs se_resnet20")
    assert found["arch"] == "zoo:se_resnet20"
    assert found["sites"] == 9
    assert set(found["cost"]) == {"params", "macs"}
    assert found["paper"] is None


def test_archs_stand_beside_what_the_paper_prints(place):
    eight, sixteen = document("archs se_resnet50_r8")[0], document("archs se_resnet50")[0]
    assert sixteen["cost"] == {"params": 28_088_024, "macs": 3_860_488_192}
    assert sixteen["paper"] == {"params": 28.1e6, "macs": 3.87e9}
    assert eight["paper"] == {"params": 30.7e6, "macs": None}
    code, out, _ = call("archs se_resnet50")
    assert code == 0
    (line,) = [line.split() for line in out.splitlines() if "zoo:" in line]
    assert line == [
        "zoo:se_resnet50",
        "3×224×224",
        "16",
        "28.09",
        "M",
        "28.1",
        "M",
        "3.860",
        "G",
        "3.87",
        "G",
    ]


def test_analyze(analysed):
    assert analysed["n"] == 300
    assert len(analysed["sites"]) == 9
    assert Path(analysed["output"]).is_file()


def test_analyze_begins_with_how_alive_the_gates_are(analysed):
    gates = analysed["gates"]
    assert gates["state"] in {"alive", "mixed"}
    assert gates["sites"] == len(gates["everything"]["sites"]) == 9
    assert gates["everything"]["params"] == 8484  # 3·(16·4·2 + 20) + 3·(32·8·2 + 40) + 3·(64·16·2 + 80)
    assert gates["everything"]["macs"] == 8064
    assert gates["everything"]["operations"] == 54  # mean, two FCs, two activations, multiply
    assert 0 < gates["advised"]["predicted_loss"] < 0.005 < gates["everything"]["predicted_loss"]
    assert gates["refused"] == {}
    code, out, _ = call(f"analyze {NET} --data data --images 50")
    assert code == 0
    assert re.match(r"9 gate sites, (\d of them )?alive: median standard deviation over images 0\.\d+", out)


FOLD = f"apply {NET} --stats stats.safetensors --repair none"


def test_folding_alone_needs_no_budget(analysed):
    found = document(f"{FOLD} --fold-gates all -o folded.safetensors")
    assert (found["sites_folded"], found["channels_removed"]) == (9, 0)
    assert found["max_abs_diff_masked"] < 1e-9
    assert found["before"]["params"] - found["after"]["params"] == 8484
    assert found["before"]["macs"] - found["after"]["macs"] == 8064
    assert (found["plan"]["params_after"], found["plan"]["macs_after"]) == (
        found["after"]["params"],
        found["after"]["macs"],
    )
    opened = document("inspect folded.safetensors")
    assert opened["sites"] == []
    assert not any(group["kind"] == "hidden" for group in opened["groups"])
    assert document("evaluate folded.safetensors --data data")["top1"] > 0.5


@pytest.mark.parametrize(
    ("given", "count"), [("2", 2), ("layer3.2.se,layer1.0.se", 2), ("auto", None), ("none", 0)]
)
def test_what_is_folded(analysed, given, count):
    budget = "--sparsity 0.1" if given == "none" else ""
    line = f"{FOLD} --criterion gate-energy {budget} --fold-gates {given} --dry-run"
    found = document(line)
    sites = found["plan"]["sites"]
    folded = {site["name"] for site in sites if site["action"] == "fold"}
    assert found["sites_folded"] == len(folded)
    assert count is None or len(folded) == count
    if given == "auto":
        assert folded == set(analysed["gates"]["advised"]["sites"])
    elif given == "2":
        assert folded == {site["name"] for site in sorted(sites, key=lambda s: s["loss"])[:2]}
    elif count:
        assert folded == set(given.split(","))
    assert all(len(s["constants"]) in {16, 32, 64} for s in sites if s["action"] == "fold")


def test_cut_folded_and_repaired(analysed):
    found = document(
        f"apply {NET} --data data --stats stats.safetensors --macs 0.5 --fold-gates all -o both.safetensors"
    )
    assert found["sites_folded"] == 9
    assert found["channels_removed"] > 0
    assert found["max_abs_diff_masked"] < 1e-9
    assert 0.49 < found["after"]["macs"] / found["before"]["macs"] <= 0.5
    assert found["plan"]["macs_after"] == found["after"]["macs"]
    assert found["plan"]["budget"] == {"kind": "macs", "value": 0.5}
    assert {"fc", "layer3.2.conv1"} <= {fit["layer"] for fit in found["refit"]}
    assert document("evaluate both.safetensors --data data")["top1"] > 0.7
    header = read_header("both.safetensors")
    assert set(header.folded) == {site.name for site in header.plan.sites}


def test_what_is_folded_stays_folded(analysed):
    document(f"{FOLD} --fold-gates 4 -o four.safetensors")
    first = read_header("four.safetensors").folded
    found = document(
        "apply four.safetensors --sparsity 0.2 --criterion l2 --repair none -o again.safetensors"
    )
    assert (len(first), found["sites_folded"]) == (4, 0)
    assert read_header("again.safetensors").folded == first
    document("analyze again.safetensors --data data --images 50 -o again-stats.safetensors")
    line = "apply again.safetensors --stats again-stats.safetensors --repair none -o whole.safetensors"
    assert document(f"{line} --fold-gates all")["sites_folded"] == 5
    assert len(read_header("whole.safetensors").folded) == 9
    assert document("inspect whole.safetensors")["sites"] == []


def test_apply(applied):
    keys = {"before", "after", "max_abs_diff_masked", "channels_removed", "sites_folded", "output"}
    assert keys <= set(applied)
    assert applied["after"]["macs"] <= 0.5 * applied["before"]["macs"]
    assert applied["max_abs_diff_masked"] < 1e-9
    assert applied["channels_removed"] > 0
    assert any(fit["kept"] for fit in applied["refit"])
    assert {fit["layer"] for fit in applied["refit"]} >= {"layer3.2.conv2", "fc"}
    cut = document("inspect cut.safetensors")  # the file opens by itself, and costs what was said
    assert {key: cut["cost"][key] for key in ("params", "macs")} == applied["after"]


def test_statistics_alone_are_enough_to_plan(applied):
    line = f"apply {NET} --macs 0.5 --repair none -o bare.safetensors"
    found = document(f"{line} --stats stats.safetensors")
    energy = document(f"{APPLY} --stats stats.safetensors --macs 0.5 --criterion gate-energy --dry-run")
    assert found["plan"]["groups"] == energy["plan"]["groups"]
    assert found["plan"]["groups"] != applied["plan"]["groups"]  # with the least-squares repair to follow
    for other in (line, line.replace("--repair none", "--stats stats.safetensors --dry-run")):
        code, _, err = call(other)  # the control: without them, or with that repair, images are needed
        assert code == 2
        assert "measures images: add --data; --criterion gate-energy does with --stats" in err


def test_a_dry_run_plans_the_same_and_writes_nothing(place, applied):
    before = files(place)
    line = f"apply {NET} --data data --stats stats.safetensors --macs 0.5 --dry-run"
    found = document(f"{line} -o dry.safetensors")
    assert files(place) == before
    assert found["output"] is None
    assert found["plan"] == applied["plan"]


def test_for_some_classes(place):
    line = f"apply {NET} --data data --macs 0.5 -o three.safetensors"
    document(f"{line} --classes 'sneaker, Bag,Trouser'")
    header = read_header("three.safetensors")
    assert header.classes == ("trouser", "sneaker", "bag")
    found = document(
        f"evaluate three.safetensors --data data --against {NET.split(maxsplit=1)[0]} --against-pretrained"
    )
    assert found["n"] == 36  # of 120 test images of ten classes
    assert set(found["per_class"]) == {"trouser", "sneaker", "bag"}
    assert min(found["top1"], found["against"]["top1"]) > 0.9
    document("finetune three.safetensors --data data --epochs 1 -o tuned.safetensors")
    assert read_header("tuned.safetensors").classes == header.classes
    document("export tuned.safetensors --data data --to onnx -o three.onnx")
    assert document(f"analyze {NET} --data data --classes bag,coat -o two.safetensors")["n"] == 60
    code, _, err = call(f"{line} --classes sneaker,bag,dress --stats two.safetensors")
    assert code == 1
    assert "the statistics are of 2 classes, the network has 3" in err


def test_evaluate_and_against(applied):
    alone = document(f"evaluate {NET} --data data")
    assert {"n", "top1", "top5", "top1_ci95", "loss"} <= set(alone)
    assert alone["n"] == 120
    low, high = alone["top1_ci95"]
    assert 0.8 < alone["top1"] <= 1
    assert low < alone["top1"] <= high
    pair = document("evaluate cut.safetensors --data data --against zoo:se_resnet20 --against-pretrained")
    assert pair["against"]["top1"] == alone["top1"]
    assert pair["against"]["top1_difference"] == pytest.approx(pair["top1"] - alone["top1"])


def test_finetune_with_a_teacher(applied):
    teacher = "--teacher zoo:se_resnet20 --teacher-pretrained"
    found = document(f"finetune cut.safetensors --data data {teacher} --epochs 1 -o tuned.safetensors")
    assert found["n"] == 120
    assert document("evaluate tuned.safetensors --data data")["top1"] == found["top1"]


def test_export(applied):
    found = document("export cut.safetensors --data data -o cut.onnx --images 32")
    assert {"output", "bytes", "max_abs_diff", "latency_ms"} <= set(found)
    assert Path("cut.onnx").stat().st_size == found["bytes"]
    assert found["max_abs_diff"] < 1e-3


def test_bench_beside_the_dense_network(applied):
    found = document("bench cut.safetensors --rounds 3 --batch 1,2 --per-layer")
    rows = found["rows"]
    assert [(row["network"], row["batch_size"]) for row in rows] == [
        (name, batch) for batch in (1, 2) for name in ("cut.safetensors", "zoo:se_resnet20, dense")
    ]
    assert all(row["peak_bytes"] > 0 for row in rows)
    assert rows[0]["speedup"] > 0
    assert len(found["per_layer"]) == 2
    assert {"conv1", "fc"} <= {o["layer"] for o in found["per_layer"][0]["operations"]}
    for line in ("bench cut.safetensors --batch 1,x", "bench cut.safetensors --runtime onnx"):
        assert call(line)[0] == 2


def test_sweep_keeps_what_is_finished(place):
    line = f"sweep {NET} --data data --macs 0.7 --criterion l1,l2 --repair none --latency-rounds 0 -o swept"
    first = document(line)
    assert [point["kept"] for point in first["points"]] == [False, False]
    assert all(0.69 < point["macs"] <= 0.7 for point in first["points"])
    assert Path("swept/report.html").is_file()
    told = json.loads(Path("swept/l1-macs-0.7/run.json").read_text(encoding="utf-8"))["command"]
    assert told == f"se-prune {line} --json"
    again = document(line)
    assert [point["kept"] for point in again["points"]] == [True, True]
    assert [p["top1"] for p in again["points"]] == [p["top1"] for p in first["points"]]
    code, _, err = call(f"{line} --seed 3")
    assert code == 2
    assert "holds a run of other settings" in err


def test_train(place):
    found = document("train --arch zoo:se_mobilenet_x025 --data data --epochs 1 --lr 0.01 -o new.safetensors")
    assert found["n"] == 120
    assert document("evaluate new.safetensors --data data")["top1"] == found["top1"]


def test_run_and_report(place):
    Path("tiny.toml").write_text(RECIPE, encoding="utf-8")
    found = document("run tiny.toml -o out")
    assert set(found["files"]) == {"artifact", "run", "report", "markdown", "onnx"}
    assert all(Path(file).is_file() for file in found["files"].values())
    assert found["after"]["macs"] <= 0.5 * found["before"]["macs"]
    page = document("report out -o page.html")
    assert page["runs"] == 1
    assert {Path(file).name for file in page["files"]} == {"page.html", "page.md", "page.json"}


@pytest.fixture(scope="module")
def theirs(place):
    """Checkpoints of others: a plain one with its average beside, and one that fits two architectures."""
    state = open_model("zoo:se_resnet20", pretrained=True).module.state_dict()
    average = {key: value * 2 if key == "fc.bias" else value for key, value in state.items()}
    torch.save({"state_dict": state, "state_dict_ema": average}, "theirs.pth")
    torch.save(timm.create_model("mobilenetv3_small_100").state_dict(), "twofold.pth")


def test_a_checkpoint_needs_no_arch_and_says_what_it_was_taken_for(theirs):
    code, out, err = call(
        "apply theirs.pth --sparsity 0.2 --criterion l2 --repair none -o told.safetensors --json"
    )
    assert code == 0, err
    assert json.loads(out)["channels_removed"] > 0
    told = "theirs.pth has the tensors of zoo:se_resnet20 with 10 classes; --arch overrules this."
    assert err.splitlines()[:2] == [told, "theirs.pth holds averaged weights as well; --ema opens those."]
    assert read_header("told.safetensors").arch.ref == "zoo:se_resnet20"
    code, _, err = call("inspect theirs.pth --arch zoo:se_resnet20 --ema")
    assert code == 0
    assert "theirs.pth" not in err


EMA = [
    "inspect {}",
    "analyze {} --data data",
    "apply {} --sparsity 0.2 --data data -o x.safetensors",
    "finetune {} --data data -o x.safetensors",
    "evaluate {} --data data",
    "export {} --data data -o x.onnx",
]


@pytest.mark.parametrize("command", EMA)
def test_ema_reaches_the_file(command, theirs):
    with mock.patch("se_prune.checkpoint.read_weights", side_effect=CheckpointError("read.")) as read:
        code, _, _ = call(command.format("theirs.pth --arch zoo:se_resnet20 --ema"))
        assert (code, read.call_args.kwargs) == (1, {"ema": True})
        call(command.format("theirs.pth --arch zoo:se_resnet20"))
        assert read.call_args.kwargs == {"ema": False}


def test_without_json_the_table_is_on_stdout(place):
    code, out, _ = call("archs se_resnet20")
    assert code == 0
    assert "zoo:se_resnet20" in out
    with pytest.raises(json.JSONDecodeError):
        json.loads(out)


# Mistakes.


def files(place):
    return {p.relative_to(place).as_posix(): p.stat().st_size for p in sorted(place.rglob("*"))}


class Touch:
    def __reduce__(self):
        return (open, ("marker", "w"))


@pytest.fixture(scope="module")
def broken(applied, theirs):
    """Files with something wrong in them."""
    whole = Path("cut.safetensors").read_bytes()
    Path("half.safetensors").write_bytes(whole[: len(whole) // 2])
    Path("code.pth").write_bytes(pickle.dumps({"fc.weight": Touch()}, protocol=2))
    Path("typo.toml").write_text(RECIPE.replace("macs =", "mac ="), encoding="utf-8")
    Path("file").write_text("", encoding="utf-8")
    png_folder(Path("torn"))
    Path("torn/train/bee/1.png").write_bytes(b"no image")


APPLY = f"apply {NET} --data data -o x.safetensors"
BAD = {
    "missing file": ("inspect gone.safetensors", "gone.safetensors"),
    "truncated artifact": ("inspect half.safetensors", "half.safetensors"),
    "wrong arch": ("inspect cut.safetensors --arch zoo:se_mobilenet_x025", "se_resnet20"),
    "unknown arch": ("inspect zoo:se_resnet2", "did you mean"),
    "wrong class count": (f"evaluate {NET} --data two", "10 of them are not in two: t-shirt"),
    "budgets of a sweep": (f"sweep {NET} --data data --macs half -o swept", "--macs takes numbers"),
    "budget 0": (f"{APPLY} --macs 0", "got 0"),
    "budget 1.5": (f"{APPLY} --macs 1.5", "got 1.5"),
    "budget -1": (f"{APPLY} --macs=-1", "got -1"),
    "budget nan": (f"{APPLY} --macs nan", "got nan"),
    "sparsity nan": (f"{APPLY} --sparsity nan", "got nan"),
    "two budgets": (f"{APPLY} --macs 0.5 --sparsity 0.5", "exactly one budget"),
    "no budget": (APPLY, "exactly one budget"),
    "no output": (f"apply {NET} --data data --macs 0.5", "--dry-run"),
    "no data to repair on": (f"apply {NET} --macs 0.5 -o x.safetensors", "--repair none"),
    "gates and nothing to measure them on": (
        f"apply {NET} --fold-gates all --repair none -o x.safetensors",
        "--fold-gates measures the gates: add --data, or --stats",
    ),
    "more gates than there are": (
        f"{APPLY} --stats stats.safetensors --fold-gates 10",
        "asks for more sites than the 9",
    ),
    "unknown gate": (
        f"{APPLY} --stats stats.safetensors --fold-gates layer1.0",
        "no gate site 'layer1.0' (did you mean",
    ),
    "tolerance without auto": (
        f"{APPLY} --fold-gates all --fold-tolerance 0.1",
        "goes with --fold-gates auto",
    ),
    "empty data": (f"evaluate {NET} --data empty", "empty"),
    "missing data": (f"evaluate {NET} --data nowhere", "nowhere"),
    "code in a pickle": ("inspect code.pth --arch zoo:se_resnet20", "code.pth is a pickle that calls"),
    "two architectures": ("inspect twofold.pth", "choose one, such as --arch timm:mobilenetv3_small_100"),
    "no average": ("inspect twofold.pth --ema", "holds no averaged weights"),
    "unknown criterion": (f"{APPLY} --macs 0.5 --criterion excitaton", "did you mean 'excitation'"),
    "unknown device": (f"evaluate {NET} --data data --device gpu", "--device gpu"),
    "device without values": (f"evaluate {NET} --data data --device meta", "--device meta"),
    "unknown recipe key": ("run typo.toml -o typo", "did you mean 'macs'"),
    "unknown recipe": ("run demmo -o typo", "did you mean 'demo'"),
    "output below a file": (f"{APPLY} --macs 0.5".replace("x.s", "file/x.s"), "file"),
    "statistics below a file": (f"analyze {NET} --data data -o file/stats.safetensors", "file"),
    "round to 0": (f"{APPLY} --macs 0.5 --round-to 0", "round-to"),
    "no epochs": ("finetune cut.safetensors --data data --epochs 0 -o x.safetensors", "epochs"),
    "a rate that is no number": (
        "finetune cut.safetensors --data data --lr nan -o x.safetensors",
        "lr must be at least 0.0 and finite, got nan",
    ),
    "a state below a file": (
        "finetune cut.safetensors --data data --epochs 1 --state file/state -o x.safetensors",
        "cannot make the folder file/state",
    ),
    "a broken image": (
        "train --arch zoo:se_resnet20 --data torn --epochs 1 -o x.safetensors",
        "torn/train/bee/1.png cannot be read",
    ),
    "statistics of another network": (
        "apply cut.safetensors --data data --stats stats.safetensors --macs 0.5 -o x.safetensors",
        "se-prune analyze",
    ),
    "no run record": ("report gone.json", "gone.json"),
    "unknown target": ("export cut.safetensors --data data --to onx -o x.onx", "onnx"),
}


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning", "ignore:This DataLoader will:UserWarning")
@pytest.mark.parametrize("name", BAD)
def test_a_mistake_ends_in_one_sentence(place, broken, name):
    line, part = BAD[name]
    before = files(place)
    code, out, err = call(line)
    assert code in {1, 2}
    assert files(place) == before  # no marker of the pickle either
    lines = [text for text in err.splitlines() if text.strip()]
    assert [text for text in lines if text.startswith("error: ")] == lines[-1:], err
    assert part in lines[-1]
    assert "Traceback" not in err + out
    assert lines[-1].endswith((".", "?"))


@pytest.mark.parametrize(
    ("job", "line"),
    [
        ("train", "train --arch zoo:se_resnet20 --data data -o file/x.safetensors"),
        ("finetune", "finetune cut.safetensors --data data -o file/x.safetensors"),
        ("plan", f"{APPLY} --macs 0.5".replace("x.s", "file/x.s")),
        ("analyze", f"analyze {NET} --data data -o file/x.safetensors"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(place, broken, job, line):
    with mock.patch(f"se_prune.pipeline.{job}", side_effect=ZeroDivisionError) as work:
        code, _, err = call(line)
        assert (code, work.call_count) == (1, 0)
        assert "cannot write file/x.safetensors" in err
        with pytest.raises(ZeroDivisionError):  # the control: with a good output, this is the work
            app_main(line.replace("file/x.s", "x.s"))
    assert not Path("x.safetensors").exists()


def app_main(line):
    with (
        mock.patch.object(sys, "argv", ["se-prune", *shlex.split(line)]),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        app.main()


def test_the_code_in_the_pickle_is_real(broken, tmp_path):
    code = Path("code.pth").read_bytes()
    with contextlib.chdir(tmp_path):
        pickle.loads(code)["fc.weight"].close()
        assert Path("marker").is_file()


def test_a_defect_of_ours_keeps_its_traceback(place):
    with (
        mock.patch("se_prune.pipeline.inspect", side_effect=ZeroDivisionError),
        mock.patch.object(sys, "argv", ["se-prune", "inspect", "zoo:se_resnet20"]),
        contextlib.redirect_stderr(io.StringIO()),
        pytest.raises(ZeroDivisionError),
    ):
        app.main()


# Words.

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", app.COMMANDS)
def test_every_command_has_help(name):
    code, out, _ = call(f"{name} --help")
    assert code == 0
    assert f"se-prune {name}" in re.sub(r"\s+", " ", out)
    assert "--json" in out


def test_the_readme_names_the_commands():
    told = {name for name in app.COMMANDS if re.search(rf"se-prune {name}\b|make {name}\b", README)}
    assert set(app.COMMANDS) == told
    written = set(re.findall(r"^se-prune ([a-z]+) ", README, re.MULTILINE))
    assert written
    assert written <= set(app.COMMANDS)  # nothing that is not there
