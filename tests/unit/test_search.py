"""The search for the smallest network within a drop: which fractions it tries, and how it goes on."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from se_prune_cli import whole
from se_prune_cli.output import Output

from se_prune.data.source import DataSource
from se_prune.errors import NotKept
from se_prune.pipeline import search
from se_prune.recipe import ApplyTable, ModelTable, RunRecipe
from se_prune.report import markdown
from se_prune.results import Drop, MaxDrop, Try
from se_prune.schema import from_json, to_json
from se_prune.settings import SearchTable
from tests.runs import make_run
from tests.tiny import stripes

TABLE = SearchTable(max_drop=0.5, least=0.2, tolerance=0.06)
DROP = Drop(n=2000, drop=0.004, ci95=(-0.001, 0.009), upper=0.0062)


class Course:
    """As much of a course as the search itself touches."""

    def __init__(self, folder, tries=()):
        self.progress = SimpleNamespace(record=SimpleNamespace(tries=tries), folder=folder, note=self.note)
        self.show = search.measure.Silent()
        self.noted = []

    def note(self, tries):
        self.noted.append(tries)


@pytest.fixture
def keeping(monkeypatch):
    """Let networks of at least so much of the MACs keep the drop; return the fractions that are tried."""
    tried = []

    def from_(least):
        def fake(_course, _table, budget):
            tried.append(budget)
            return Try(budget=budget, macs=budget - 0.001, drop=DROP, keeps=budget >= least)

        monkeypatch.setattr(search, "_tried", fake)
        return tried

    return from_


def test_half_of_what_is_left_goes_with_every_try(tmp_path, keeping):
    tried, course = keeping(0.43), Course(tmp_path)
    assert search.smallest(course, TABLE) == pytest.approx(0.45)
    assert tried == pytest.approx([0.6, 0.4, 0.5, 0.45])
    assert [len(tries) for tries in course.noted] == [1, 2, 3, 4]


def test_a_search_goes_on_where_it_was(tmp_path, keeping):
    tried, first = keeping(0.43), Course(tmp_path)
    search.smallest(first, TABLE)
    tried.clear()
    again = Course(tmp_path, first.noted[1])
    assert search.smallest(again, TABLE) == pytest.approx(0.45)
    assert tried == pytest.approx([0.5, 0.45])


def test_the_least_fraction_bounds_the_search(tmp_path, keeping):
    tried = keeping(0.0)
    assert 0.2 < search.smallest(Course(tmp_path), TABLE) <= 0.26
    assert min(tried) > 0.2


def test_where_nothing_keeps_it_the_largest_network_says_by_how_much(tmp_path, keeping):
    keeping(2.0)
    with pytest.raises(
        NotKept, match=r"at most 0\.5 points.*with 9\d\.\d % .* 0\.40 points on 2000 .* 0\.62"
    ) as error:
        search.smallest(Course(tmp_path), TABLE)
    assert error.value.exit_code == 3


def test_budgets_that_cannot_be_met_do_not_keep_it(tmp_path, monkeypatch):
    monkeypatch.setattr(
        search, "_tried", lambda _c, _t, budget: Try(budget=budget, refused="--macs cannot be met.")
    )
    with pytest.raises(NotKept, match="cannot be met"):
        search.smallest(Course(tmp_path), TABLE)


def of(train, test):
    return DataSource(ref="stripes", classes=("a", "b", "c"), train=train, test=test)


def test_what_decides_is_in_no_try_and_in_no_proof():
    data = of(stripes(90, seed=1), stripes(60, seed=2))
    deciding, rest = search.parted(data, replace(TABLE, held_out=0.2), 0)
    assert rest is data
    assert (len(deciding.train), len(deciding.test)) == (72, 18)
    both = torch.cat([deciding.train.images, deciding.test.images]).flatten(1)
    assert len(torch.unique(both, dim=0)) == 90
    deciding, rest = search.parted(data, replace(TABLE, held_out=0.2, images="test"), 0)
    assert deciding.train is rest.train is data.train
    assert (len(deciding.test), len(rest.test)) == (12, 48)
    both = torch.cat([rest.test.images, deciding.test.images]).flatten(1)
    assert len(torch.unique(both, dim=0)) == 60


def found(upper):
    tries = (Try(budget=0.525, macs=0.524, drop=DROP), Try(budget=0.3, refused="--macs 0.3 cannot be met."))
    proof = Drop(n=10_000, drop=0.0031, ci95=(-0.001, 0.008), upper=upper)
    return MaxDrop(max_drop=0.005, confidence=0.8, images="train", tries=tries, proof=proof)


def test_the_record_and_the_report_tell_the_search():
    run = make_run(max_drop=found(0.0048))
    assert from_json(type(run), to_json(run)) == run
    page = markdown.render([run])
    assert "A drop of at most 0.5 points is kept: top-1 falls by 0.31 points" in page
    assert "(95 % interval -0.10 to 0.80, at most 0.48 at a confidence of 0.8) on 10,000 test images" in page
    assert "52.4 %" in page
    assert "cannot be met" in page
    assert "smallest network" not in markdown.render([make_run()])


@pytest.mark.parametrize(("upper", "kept"), [(0.0048, True), (0.0052, False)])
def test_a_proof_that_fails_ends_in_exit_code_3(tmp_path, monkeypatch, capsys, upper, kept):
    outcome = SimpleNamespace(run=make_run(max_drop=found(upper)), files={"report": tmp_path / "report.html"})
    recipe = RunRecipe(
        model=ModelTable(ref="zoo:se_resnet20"), apply=ApplyTable(macs=0.5), data="fashion-mnist"
    )
    asked = []

    def fake(chosen, *_args, **_options):
        asked.append(chosen)
        return outcome

    monkeypatch.setattr("se_prune.recipe.read_run", lambda _: recipe)
    monkeypatch.setattr("se_prune.pipeline.run_recipe", fake)

    def run():
        whole.run_and_show(
            "demo",
            tmp_path,
            "se-prune run demo",
            Output(True),
            device="cpu",
            seed=None,
            resume=True,
            max_drop=0.7,
        )

    if kept:
        run()
    else:
        with pytest.raises(NotKept, match=r"is NOT kept: top-1 falls by 0\.31 points.*the files are in"):
            run()
    assert f'"kept": {str(kept).lower()}' in capsys.readouterr().out  # the document is there in any case
    assert asked[0].search == SearchTable(max_drop=0.7)
    assert asked[0].apply.macs is None
