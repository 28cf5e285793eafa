"""Every command on a small data set: one JSON document on stdout; and words about the commands."""

import json
import re
from pathlib import Path
from unittest import mock

import pytest
from se_prune_cli import app

from se_prune.artifact import read_header
from se_prune.errors import CheckpointError
from tests.calls import APPLY, NET, RECIPE, call, document, files

pytestmark = pytest.mark.slow


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


def test_analyze_says_what_channel_groups_would_lose(analysed):
    found = analysed["sensitivity"]
    assert (found["criterion"], found["shares"]) == ("gate-energy", [0.25, 0.5, 0.75])
    losses = [group["predicted_loss"] for group in found["groups"]]
    assert len(losses) == 12  # three streams, and one inner group a block
    assert all(0 <= a <= b <= c for a, b, c in losses)
    assert [middle for _, middle, _ in losses] == sorted((m for _, m, _ in losses), reverse=True)
    assert losses[0][1] > 2 * losses[-1][1]
    assert {group["kind"] for group in found["groups"]} == {"inner", "stream"}
    assert all(group["removed"][1] == group["channels"] // 2 for group in found["groups"])
    code, out, err = call(f"analyze {NET} --data data --images 50")
    assert code == 0
    assert out.count("stream") + out.count("inner") == 8
    assert "the 8 most sensitive of 12 groups, without repair" in err
    code, out, _ = call(f"analyze {NET} --data data --images 50 --sensitivity excitation")
    assert code == 0
    assert out.count("stream") + out.count("inner") == 12


def test_a_criterion_that_predicts_no_loss_is_refused_before_anything_is_measured(place):
    code, _, err = call(f"analyze {NET} --data data --sensitivity l1")
    assert code == 2
    assert "criterion 'l1' ranks channels within a group only" in err.replace("\n", " ")
    assert "gates" not in err


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
    assert set(found["files"]) == {"artifact", "run", "card", "report", "markdown", "onnx"}
    assert all(Path(file).is_file() for file in found["files"].values())
    assert found["after"]["macs"] <= 0.5 * found["before"]["macs"]
    page = document("report out -o page.html")
    assert page["runs"] == 1
    assert {Path(file).name for file in page["files"]} == {"page.html", "page.md", "page.json"}


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
