"""The commands that write reports: pages and figures of gates, model cards, the terminal, the schema."""

import json
from pathlib import Path

import pytest

from se_prune.results import GateReport, Run
from se_prune.schema import from_json, to_json
from tests.calls import NET, call, document
from tests.runs import make_run

pytestmark = pytest.mark.slow


def test_analyze_draws_gates_of_chosen_classes(place):
    found = document(
        f"analyze {NET} --data data --images 60 --report gates.html --figures drawn --show bag,boot"
    )
    files = [Path(file) for file in found["files"]]
    assert all(file.is_file() for file in files)
    assert [file.name for file in files[:3]] == ["gates.html", "gates.md", "gates.json"]
    names = {file.name for file in files if file.suffix == ".svg"}
    assert {
        "gates-layer1.0.se.svg",
        "within-layer3.2.se.svg",
        "class-specificity.svg",
        "saturated.svg",
    } <= names
    assert len(names) == 9 + 9 + 2
    (record,) = json.loads(Path("gates.json").read_text())
    report = from_json(GateReport, json.dumps(record))
    assert report.n == 60
    assert len(report.sites) == 9
    assert set(report.profiles[0].per_class) == {"bag", "boot"}
    assert report.command.startswith("se-prune analyze zoo:se_resnet20")
    page, prose = Path("gates.html").read_text(), Path("gates.md").read_text()
    assert page.count('data-name="boot"') == 9
    assert 'data-name="coat"' not in page
    for site in report.sites:
        assert site.name in prose
    assert report.outlook.split(":")[0] in prose
    assert len(report.sensitivity) == 12
    for group in report.sensitivity:
        assert f"| {group.name} | {group.kind} | {group.channels} |" in prose
    assert "What channel groups would lose" in page
    assert "the lowest of gate-energy first" in page


def test_analyze_refuses_classes_that_are_not_there(place):
    code, _, err = call(f"analyze {NET} --data data --images 60 --report never.html --show bag,sandel")
    assert code == 2
    assert "there is no class 'sandel' (did you mean 'sandal'?)" in err.replace("\n", " ")
    assert not Path("never.html").exists()


def test_evaluate_writes_a_model_card(place, applied):
    found = document(
        f"evaluate cut.safetensors --data data --against {NET.split()[0]} --against-pretrained --card C.md"
    )
    card = Path(found["card"]).read_text()
    assert f"| top-1 | {100 * found['top1']:.2f} % | {100 * found['against']['top1']:.2f} % |" in card
    assert 'open_model("cut.safetensors")' in card
    assert "Channels removed by the criterion" in card
    assert "| cut.safetensors |" in card


@pytest.fixture
def records(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(to_json(make_run(name=name)))
    return f"{tmp_path}/one {tmp_path}/two"


def test_the_terminal_shows_a_report_and_writes_nothing(place, records):
    before = set(Path().iterdir())
    code, out, err = call(f"report {records} --terminal")
    assert (code, err) == (0, "")
    assert set(Path().iterdir()) == before
    for part in ("Comparison", "94.31 %", "keeps 48.9 % of its MACs", "██", "How to reproduce"):
        assert part in out
    found = document(f"report {records} --terminal -o page.html")
    assert [Path(file).name for file in found["files"]] == ["page.html", "page.md", "page.json"]


def test_figures_of_several_runs(place, records):
    found = document(f"report {records} -o both.html --figures both")
    files = {Path(file).as_posix() for file in found["files"]}
    assert {"both.html", "both/tradeoff-macs.svg", "both/1-one/stages.svg", "both/2-two/stages.svg"} <= files


def test_the_schema_is_printed_without_a_run(place):
    for name, cls in (("run", Run), ("gates", GateReport)):
        code, out, _ = call(f"report --schema {name}")
        assert code == 0
        assert json.loads(out)["title"] == f"{cls.__name__}, schema version 1"
