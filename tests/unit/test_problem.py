"""What a group's width saves, counted by the layers near it, and how often layers are counted."""

import random

import pytest

from se_prune import problem
from se_prune.planning import make_plan
from se_prune.problem import pose, saved, settled, totals
from se_prune.records import Budget, ChannelGroup, Coupling, LayerCost, LayerSlice
from tests.built import built, random_scores


@pytest.mark.parametrize("hidden", ["tie", "prune", "keep"])
@pytest.mark.parametrize("name", ["residual", "depthwise", "functional"])
def test_what_a_group_saves_is_the_difference_of_the_totals(name, hidden):
    network, generator = built(name), random.Random(0)
    posed = pose(network.couplings, network.layers, 1, 1, hidden)
    followed = 0
    for _ in range(20):
        kept = [generator.choice(options) for options in posed.options]
        for number, options in enumerate(posed.options):
            after = list(kept)
            after[number] = generator.choice(options)
            expected = [a - b for a, b in zip(totals(posed, kept), totals(posed, after), strict=True)]
            assert list(saved(posed, kept, after, number)) == expected
            changed = sum(a != b for a, b in zip(settled(posed, kept), settled(posed, after), strict=True))
            followed += changed > 1
    assert (followed > 0) == (hidden == "tie")


def chain(depth):
    """Return the groups and costs of a chain of convolutions of 8 channels."""
    every = tuple(range(8))

    def group(i):
        info = ChannelGroup(name=f"c{i}", kind="inner", channels=8, members=(f"c{i}", f"c{i + 1}"))
        pieces = [
            LayerSlice(layer=f"c{i + s}", role=("out", "in")[s], index=every, root=every) for s in (0, 1)
        ]
        return Coupling(group=info, slices=tuple(pieces))

    cost = LayerCost(in_channels=8, out_channels=8, weights=64, biases=0, macs=6400, channelwise=False)
    return tuple(group(i) for i in range(depth)), {f"c{i}": cost for i in range(depth + 1)}


def test_planning_counts_layers_in_proportion_to_depth(monkeypatch):
    counted, original = [], problem._layer_cost
    monkeypatch.setattr(problem, "_layer_cost", lambda *given: counted.append(1) or original(*given))
    calls = []
    for depth in (40, 80, 160):
        counted.clear()
        groups, costs = chain(depth)
        plan = make_plan(
            groups, costs, random_scores(groups, comparable=True), Budget(kind="macs", value=0.5)
        )
        assert plan.macs_after <= 0.5 * plan.macs_before
        calls.append(len(counted))
    assert calls[0] > 40
    assert calls[2] / calls[1] < 2.6
    assert calls[1] / calls[0] < 2.6
