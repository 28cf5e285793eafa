"""Latency as a budget: the search against a machine that the table mispredicts; bench and profiles."""

from types import SimpleNamespace

import pytest
import torch

from se_prune.artifact import Network
from se_prune.errors import BudgetError, UsageError
from se_prune.pipeline import Timing
from se_prune.pipeline.latency import Comparison, Span, check_fastest, meet
from se_prune.pipeline.sweep import Point, pareto
from se_prune.planning import make_plan
from se_prune.recipe import budget_of, parse_round_to
from se_prune.records import ArchSpec, ArtifactHeader, Budget
from se_prune.runtimes import bench, profiled, require_runtime
from se_prune.runtimes.bench import Setting
from tests.nets import RESIDUAL
from tests.runs import evaluation, make_run
from tests.unit.test_planning import chain, scores
from tests.unit.test_timing import proportional

FOUND, COSTS = chain(64, 64)
GIVEN = scores(range(1, 65), range(1, 65))
MODEL = proportional(COSTS)
WIDTHS = {"round_to": 1, "min_channels": 2, "hidden": "tie"}
SPAN = Span(groups=FOUND, left=COSTS, dense=(FOUND, COSTS), widths=WIDTHS)


class Machine:
    """A stopwatch whose networks take what the table says, times something, plus something; nothing is timed."""

    def __init__(self, times=1.0, plus=0.0, **timing):
        self.timing, self.model, self.dense_ms = Timing(**timing), MODEL, 10.0
        self.runtime = SimpleNamespace(name="machine")
        self.times, self.plus, self.compared = times, plus, []

    def compare(self, plan, *, effort=1.0):
        share = self.times * SPAN.share(MODEL, plan) + self.plus
        self.compared.append((plan, effort))
        return Comparison(share=share, ci95=(share, share), rounds=int(10 * effort))


def choose(budget, model):
    return make_plan(FOUND, COSTS, GIVEN, budget, times=model, **WIDTHS)


def search(machine, kind="latency", value=0.5):
    return meet(machine, Budget(kind=kind, value=value), SPAN, choose, lambda plan: plan)


@pytest.mark.parametrize(("times", "plus"), [(1.0, 0.0), (1.4, 0.0), (0.6, 0.0), (0.8, 0.2), (0.6, 0.3)])
@pytest.mark.parametrize(("kind", "value"), [("latency", 0.5), ("latency_ms", 5.0)])
def test_what_was_measured_corrects_the_plan(times, plus, kind, value):
    machine = Machine(times, plus)
    latency = search(machine, kind, value).latency
    assert latency.within
    assert latency.measured_ms == pytest.approx(5.0, rel=0.05)
    assert latency.target_ms == pytest.approx(5.0)
    assert (latency.predicted_ms / 10) * times + plus == pytest.approx(latency.share)
    assert machine.compared[-1][1] == 2.0  # confirmed by a longer measurement
    assert latency.attempts == sum(effort == 1.0 for _, effort in machine.compared)
    assert (latency.attempts == 1) == ((times, plus) == (1.0, 0.0))


def test_attempts_end_and_the_nearest_is_told_honestly():
    latency = search(Machine(0.3, 0.5, attempts=1), value=0.6).latency
    assert not latency.within
    assert latency.met == (latency.measured_ms < latency.target_ms)
    assert latency.attempts == 1


def test_a_budget_that_even_the_narrowest_misses_names_what_it_takes():
    with pytest.raises(BudgetError, match=r"--latency 0\.5 cannot be met: .* takes [78]\.\d+ ms, 0\.[78]"):
        search(Machine(0.3, 0.7))
    with pytest.raises(BudgetError, match="is predicted to take"):
        check_fastest(Machine(), Budget(kind="latency", value=1e-5), SPAN)
    check_fastest(Machine(), Budget(kind="latency", value=0.5), SPAN)


@pytest.mark.parametrize("options", [{"threads": 0}, {"batch": 0}, {"attempts": 0}, {"runtime": "none"}])
def test_impossible_timings_are_refused(options):
    with pytest.raises(UsageError, match=r"at least 1|no runtime 'none'"):
        Timing(**options)


def test_one_budget_of_five():
    assert budget_of(None, None, None, latency=0.5) == Budget(kind="latency", value=0.5)
    assert budget_of(None, None, None, latency_ms=3.0).option == "--latency-ms 3"
    with pytest.raises(UsageError, match="exactly one budget"):
        budget_of(None, 0.5, None, latency=0.5)


def test_rounding_is_a_number_or_auto():
    assert (parse_round_to("8"), parse_round_to("auto")) == (8, "auto")
    with pytest.raises(UsageError, match="a number of channels or auto, got 'eight'"):
        parse_round_to("eight")


@pytest.fixture(scope="module")
def network():
    header = ArtifactHeader(arch=ArchSpec(ref="tests.nets:ResidualSE"), preprocessing=RESIDUAL.preprocessing)
    return Network(module=RESIDUAL.build().eval(), header=header)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "torch"])
def test_bench_and_profile(network, name):
    pytest.importorskip(name)
    setting = Setting(runtime=require_runtime(name), batch=2, threads=1)
    rows = bench([("a", network), ("b", network)], [setting], rounds=4, memory=False)
    assert [(r.network, r.batch_size, r.rounds, r.peak_bytes) for r in rows] == [
        ("a", 2, 4, None),
        ("b", 2, 4, None),
    ]
    assert rows[0].speedup > 0
    assert rows[1].speedup is None
    assert rows[0].images_per_second == pytest.approx(2000 / rows[0].median_ms)
    operations = profiled(network, setting, runs=2)
    layers = {o.layer: (o.into, o.out, o.macs) for o in operations if o.layer}
    assert set(layers) == set(RESIDUAL.per_layer)
    assert {name: macs // 2 for name, (_, _, macs) in layers.items()} == RESIDUAL.per_layer
    assert layers["blocks.0.conv1"][:2] == (4, 6)
    (conv,) = [o for o in operations if o.layer == "blocks.0.conv1"]
    assert conv.aligned_ms is not None
    assert any(o.layer is None for o in operations)


def test_bench_refuses_no_rounds(network):
    setting = Setting(runtime=require_runtime("torch"), batch=1, threads=1)
    with pytest.raises(UsageError, match="at least 1"):
        bench([("a", network)], [setting], rounds=0, memory=False)


def test_the_front_of_a_sweep(tmp_path):
    def point(name, right, macs):
        run = make_run()
        stage = type(run.stages[0])(stage="dense", evaluation=evaluation(right), seconds=0.0)
        run = make_run(stages=(stage,))
        return Point(criterion=name, budget=Budget(kind="macs", value=macs), folder=tmp_path / name, run=run)

    refused = Point(criterion="e", budget=Budget(kind="macs", value=0.1), folder=tmp_path / "e", refused="no")
    there = [("a", 9000, 0.5), ("b", 9100, 0.5), ("c", 8000, 0.3), ("d", 8500, 0.4), ("f", 7900, 0.4)]
    points = [*(point(*values) for values in there), refused]
    front = pareto(points, lambda p: p.budget.value)
    assert {path.name for path in front} == {"b", "c", "d"}


def test_threads_are_given_back(network):
    before = torch.get_num_threads()
    setting = Setting(runtime=require_runtime("torch"), batch=1, threads=before + 1)
    bench([("a", network)], [setting], rounds=1, memory=False)
    assert torch.get_num_threads() == before
