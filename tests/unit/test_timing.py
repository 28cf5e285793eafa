"""Layer times: interpolation by hand, widths, the planner's budget of milliseconds, and what a table is kept for."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from se_prune.errors import BudgetError, UsageError
from se_prune.planning import fastest, make_plan, predicted
from se_prune.records import Budget
from se_prune.results import OperationTime
from se_prune.runtimes import table
from se_prune.runtimes.base import RUNTIMES, Runtime, require_runtime
from se_prune.runtimes.bench import aligned, alignment, ratio_of_medians
from se_prune.runtimes.table import latency_model, measure_grids, shapes_of, widths
from se_prune.timing import LatencyModel, LayerGrid, LayerShape, LayerTimes
from tests.unit.test_planning import chain, scores

GRID = LayerGrid(into=(2, 4), out=(1, 3), ms=((1.0, 3.0), (2.0, 6.0)))


@pytest.mark.parametrize(
    ("into", "out", "ms"),
    [(2, 1, 1.0), (4, 3, 6.0), (2, 2, 2.0), (3, 1, 1.5), (3, 2, 3.0), (9, 9, 6.0), (1, 1, 1.0)],
)
def test_times_between_measured_widths_are_linear_and_constant_outside(into, out, ms):
    assert GRID.at(into, out) == pytest.approx(ms)


def test_a_grid_of_one_width_is_constant_along_it():
    assert LayerGrid(into=(7,), out=(2, 4), ms=((1.0, 3.0),)).at(3, 3) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("width", "round_to", "groups", "expected"),
    [
        (64, 8, 1, (8, 40, 64)),
        (64, 1, 1, (9, 17, 33, 49, 64)),
        (8, 8, 1, (8,)),
        (10, 1, 1, (1, 3, 5, 7, 10)),
        (64, 8, 32, (32, 64)),
        (3, 8, 1, (3,)),
    ],
)
def test_layers_are_timed_at_odd_multiples_of_the_rounding(width, round_to, groups, expected):
    assert widths(width, round_to, groups) == expected


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depth = nn.Conv2d(8, 8, (3, 5), padding="same", groups=8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.depth(self.conv(x)).mean((2, 3)))


def test_shapes_of_a_network():
    shapes = shapes_of(Net(), torch.zeros(1, 3, 9, 9))
    conv, depth, fc = shapes["conv"], shapes["depth"], shapes["fc"]
    assert (conv.size, conv.input_size, conv.macs) == ((5, 5), (9, 9), 25 * 8 * 27)
    assert depth.depthwise
    assert (depth.padding, depth.input_size, depth.macs) == ((0, 0), (7, 9), 25 * 8 * 15)
    assert (fc.kind, fc.size, fc.macs) == ("linear", (1, 1), 40)
    assert depth.at(4, 4).groups == 4


@pytest.mark.parametrize("name", RUNTIMES)
def test_every_runtime_times_single_layers(name):
    pytest.importorskip(RUNTIMES[name].package)
    shapes = shapes_of(Net(), torch.zeros(1, 3, 9, 9)).values()
    times = require_runtime(name).layers(list(shapes), 2, 1)
    assert len(times) == 3
    assert all(0 <= t < 1000 for t in times)


def fake_runtime(calls):
    def layers(shapes, batch, threads):
        calls.append((len(shapes), batch, threads))
        return [1e-3 * s.into * s.out for s in shapes]

    return Runtime(name="fake", package="torch", form="torch", open=lambda *_: lambda: None, layers=layers)


def test_a_table_is_measured_once_and_kept_for_the_machine(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("SE_PRUNE_CACHE", str(tmp_path))
    calls = []
    shape = LayerShape(kind="conv", into=16, out=32, size=(4, 4))
    options = {"round_to": 8, "batch": 1, "threads": 2}
    first = measure_grids(fake_runtime(calls), [shape, shape], **options)
    again = measure_grids(fake_runtime(calls), [shape], **options)
    assert first == again
    assert calls == [(2 * 3, 1, 2)]
    assert first[shape.key()].at(16, 32) == pytest.approx(0.512)
    measure_grids(fake_runtime(calls), [shape], **{**options, "round_to": 4})
    assert len(calls) == 2
    (file,) = tmp_path.iterdir()
    assert len(json.loads(file.read_text())["grids"]) == 2
    file.write_text("{", encoding="utf-8")
    assert measure_grids(fake_runtime(calls), [shape], **options) == first
    assert "measured again" in caplog.text


def test_a_table_that_cannot_be_kept_is_used_all_the_same(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("SE_PRUNE_CACHE", str(tmp_path / "file"))
    shape = LayerShape(kind="linear", into=8, out=8, size=(1, 1))
    assert measure_grids(fake_runtime([]), [shape], round_to=1, batch=1, threads=1)
    assert "not kept" in caplog.text
    assert table.cache_folder() == tmp_path / "file"


def test_the_model_explains_the_dense_network():
    shape = LayerShape(kind="conv", into=8, out=8, size=(4, 4))
    grids = {shape.key(): LayerGrid(into=(8,), out=(4, 8), ms=((1.0, 2.0),))}
    operations = [
        OperationTime(name="a", kind="Conv", ms=3.0, layer="a"),
        OperationTime(name="mul", kind="Mul", ms=1.5),
        OperationTime(name="add", kind="Add", ms=0.5),
    ]
    model = latency_model({"a": shape}, grids, operations, 6.0)
    assert model.scales == {"a": 1.5}
    assert (model.elementwise_ms, model.fixed_ms) == (1.0, 2.0)  # two operations of 0.5 are launches
    assert model.layer_ms("a", 8, 4) == pytest.approx(1.5)
    assert model.layer_ms("unknown", 8, 4) == 0.0


def proportional(costs):
    """A model in which a layer takes a millisecond per 100 weights, and nothing else takes time."""
    grids = {
        name: LayerGrid(
            into=(0, c.in_channels),
            out=(0, c.out_channels),
            ms=((0.0, 0.0), (0.0, c.in_channels * c.out_channels / 100)),
        )
        for name, c in costs.items()
    }
    return LatencyModel(grids=grids, scales=dict.fromkeys(grids, 1.0), elementwise_ms=0.0, fixed_ms=0.0)


def test_a_budget_of_milliseconds_is_met_as_one_of_macs():
    found, costs = chain(16, 16)
    given = scores(range(1, 17), range(1, 17))
    model = proportional(costs)
    dense = predicted(found, costs, model)
    assert dense == pytest.approx((3 * 16 + 16 * 16 + 16 * 2) / 100)
    macs = make_plan(found, costs, given, Budget(kind="macs", value=0.5))
    fraction = make_plan(found, costs, given, Budget(kind="latency", value=0.5), times=model)
    absolute = make_plan(found, costs, given, Budget(kind="latency_ms", value=0.5 * dense), times=model)
    assert macs.groups == fraction.groups == absolute.groups
    assert predicted(found, costs, model, fraction) <= 0.5 * dense


def test_elementwise_time_grows_with_what_the_layers_write():
    _, costs = chain(4)
    times = LayerTimes.of(replace(proportional(costs), elementwise_ms=6.0), costs)
    assert times.at("l0", 3, 4) - 3 * 4 / 100 == pytest.approx(4.0)  # 4 of 6 channels, 4 positions each
    assert times.at("l0", 3, 2) - 3 * 2 / 100 == pytest.approx(2.0)


@pytest.mark.parametrize(("kind", "value"), [("latency", 0.001), ("latency_ms", 1e-5)])
def test_an_impossible_latency_names_what_must_stay(kind, value):
    found, costs = chain(16, 16)
    model = proportional(costs)
    with pytest.raises(BudgetError, match=r"--latency(-ms)? .* cannot be met: .* at least 0\.\d+ must stay"):
        make_plan(found, costs, scores(range(16), range(16)), Budget(kind=kind, value=value), times=model)
    assert fastest(found, costs, model) == pytest.approx((3 * 2 + 2 * 2 + 2 * 2) / 100)


@pytest.mark.parametrize(("kind", "value"), [("latency", 0.0), ("latency", 1.5), ("latency_ms", -1.0)])
def test_latencies_out_of_range_are_refused(kind, value):
    found, costs = chain(4)
    with pytest.raises(UsageError, match="--latency"):
        make_plan(found, costs, scores(range(4)), Budget(kind=kind, value=value), times=proportional(costs))


def test_the_ratio_of_medians_and_its_interval():
    ratio, (low, high) = ratio_of_medians([10.0, 11.0, 12.0] * 10, [5.0, 5.5, 6.0] * 10)
    assert ratio == pytest.approx(2.0)
    assert low == pytest.approx(2.0)  # rounds are drawn in pairs, and each has this ratio
    assert high == pytest.approx(2.0)
    _, (low, high) = ratio_of_medians([10.0, 20.0] * 10, [10.0] * 20)
    assert low < 1.5 < high


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (LayerShape(kind="conv", into=3, out=13, size=(4, 4)), (3, 16)),
        (LayerShape(kind="conv", into=9, out=16, size=(4, 4)), (16, 16)),
        (LayerShape(kind="conv", into=12, out=12, size=(4, 4), groups=12), (16, 16)),
        (LayerShape(kind="linear", into=60, out=10, size=(1, 1)), (64, 10)),
    ],
)
def test_the_next_multiples_of_eight(shape, expected):
    assert (aligned(shape).into, aligned(shape).out) == expected
    assert aligned(aligned(shape)) == aligned(shape)


def test_what_alignment_costs_is_summed_up():
    rows = [
        OperationTime(name="a", kind="Conv", ms=2.0, layer="a", aligned_ms=1.5),
        OperationTime(name="b", kind="Conv", ms=3.0, layer="b"),
    ]
    effect = alignment(rows)
    assert (effect.layers, effect.ms, effect.aligned_ms, effect.whole_ms) == (1, 2.0, 1.5, 5.0)


def test_an_unknown_runtime_names_the_known_ones():
    with pytest.raises(
        UsageError, match=r"no runtime 'onnxruntim' \(did you mean 'onnxruntime'\?\); .* torch"
    ):
        require_runtime("onnxruntim")
