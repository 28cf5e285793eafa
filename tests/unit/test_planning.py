"""The planner by hand: what leaves, what stays at its floor, and what is refused."""

import itertools
import math
import re
from dataclasses import replace

import pytest

from se_prune.errors import BudgetError, UsageError
from se_prune.planning import make_plan
from se_prune.problem import FLOOR_SHARE
from se_prune.records import Budget, ChannelGroup, Coupling, LayerCost, LayerSlice, Scores
from tests.built import built, random_plan, random_scores

KINDS = ("sparsity", "macs", "params")


def layer(into, out, positions=4):
    weights = into * out
    return LayerCost(
        in_channels=into,
        out_channels=out,
        weights=weights,
        biases=0,
        macs=positions * weights,
        channelwise=False,
    )


def chain(*widths, inputs=3, outputs=2):
    """A chain of 1×1 layers l0, l1, ... of the given widths and an output layer; groups are named after them."""
    sizes = [inputs, *widths, outputs]
    costs = {f"l{i}": layer(a, b) for i, (a, b) in enumerate(itertools.pairwise(sizes))}
    found = []
    for i, width in enumerate(widths):
        every = tuple(range(width))
        slices = tuple(
            LayerSlice(layer=f"l{i + step}", role=role, index=every, root=every)
            for step, role in ((0, "out"), (1, "in"))
        )
        group = ChannelGroup(name=f"l{i}", kind="inner", channels=width, members=(f"l{i}", f"l{i + 1}"))
        found.append(Coupling(group=group, slices=slices))
    return tuple(found), costs


def scores(*groups, comparable=False):
    return Scores(
        criterion="hand", comparable=comparable, groups={f"l{i}": tuple(g) for i, g in enumerate(groups)}
    )


def plan(found, costs, given, kind="sparsity", value=0.5, **options):
    return make_plan(found, costs, given, Budget(kind=kind, value=value), **options)


def tied(found, times):
    """Return a chain whose first group loses channels of `times` groups at once."""
    first = replace(found[0], group=replace(found[0].group, tied=times))
    return (first, *found[1:])


def test_channels_that_leave_together_are_taken_by_their_mean_score():
    found, costs = chain(6)
    found = tied(found, 2)  # 0 and 3, 1 and 4, 2 and 5
    given = scores([0.1, 3.0, 1.0, 5.0, 4.0, 1.5])
    result = plan(found, costs, given, value=0.3)
    assert result.groups[0].removed == (2, 5)
    assert (result.channels_removed, result.channels_total) == (2, 6)
    assert plan(found, costs, given, value=0.4).groups[0].removed == (0, 2, 3, 5)
    alone = plan(chain(6)[0], costs, given, value=0.3)
    assert alone.groups[0].removed == (0, 2)


def test_rounding_counts_channels_and_not_those_of_one_group():
    found, costs = chain(16)
    found = tied(found, 4)
    kept = 16 - len(plan(found, costs, scores(range(16)), value=0.4, round_to=8).groups[0].removed)
    assert kept == 8
    with pytest.raises(BudgetError, match=r"at most 0\.75 is reachable"):
        plan(found, costs, scores(range(16)), value=0.9)
    narrow = tied(chain(4)[0], 4)
    assert "cannot be narrower" in plan(narrow, chain(4)[1], scores(range(4)), value=0.0).groups[0].note
    rounded = plan(tied(chain(6)[0], 3), chain(6)[1], scores(range(6)), value=0.0, round_to=4)
    assert rounded.groups[0].note == "too narrow for multiples of 12 (3 channels leave together)"


def test_the_lowest_scores_leave_by_hand():
    found, costs = chain(4)
    result = plan(found, costs, scores([3.0, 1.0, 4.0, 2.0]))
    assert result.groups[0].removed == (1, 3)
    # l0 3·4 and l1 4·2 weights, 20 together, times 4 positions; with two channels 10
    assert (result.params_before, result.params_after) == (20, 10)
    assert (result.macs_before, result.macs_after) == (80, 40)
    assert (result.channels_removed, result.channels_total) == (2, 4)


def test_scores_in_different_units_are_divided_by_their_groups_mean():
    found, costs = chain(4, 4)
    small, large = [0.1, 0.2, 0.3, 0.4], [99.0, 100.0, 101.0, 100.0]
    result = plan(found, costs, scores(large, small), value=0.25)
    assert [g.removed for g in result.groups] == [(), (0, 1)]
    # the same numbers times anything are the same plan
    again = plan(found, costs, scores([v * 1e-6 for v in large], small), value=0.25)
    assert again.groups == result.groups


def test_comparable_scores_share_one_threshold():
    found, costs = chain(4, 4, inputs=4, outputs=4)  # both groups save the same
    low, high = [0.2, 0.2, 0.2, 0.2], [9.0, 9.0, 9.0, 9.0]
    result = plan(found, costs, scores(high, low, comparable=True), value=0.25)
    assert [len(g.removed) for g in result.groups] == [0, 2]
    turned = plan(found, costs, scores(low, high, comparable=True), value=0.25)
    assert [len(g.removed) for g in turned.groups] == [2, 0]


def test_what_a_dear_step_makes_needless_is_put_back():
    """400 + 16 + 4 weights; without a channel of l1 415, without one of l0 too 312, and 316 with that of l1 back."""
    found, costs = chain(4, 4, inputs=100, outputs=1)
    given = scores([0.2, 10, 10, 10], [0.1, 10, 10, 10])
    result = plan(found, costs, given, "macs", 0.8)
    assert [g.removed for g in result.groups] == [(0,), ()]
    assert (result.macs_before, result.macs_after) == (4 * 420, 4 * 316)
    # 315 of 420 leave no room for it
    assert [g.removed for g in plan(found, costs, given, "macs", 0.75).groups] == [(0,), (0,)]


def test_ties_leave_from_the_front():
    found, costs = chain(4)
    assert plan(found, costs, scores([1.0, 1.0, 1.0, 1.0])).groups[0].removed == (0, 1)


def test_the_floor_is_a_sixteenth():
    found, costs = chain(64, 64)
    given = scores([0.0] * 64, [1.0 + i for i in range(64)])
    result = plan(found, costs, given, value=0.49)
    kept = [g.channels - len(g.removed) for g in result.groups]
    assert kept[0] == 64 * FLOOR_SHARE == 4
    assert result.groups[0].note == "at its floor"
    assert result.groups[1].note == "the rest score above the cut"
    uncut = plan(found, costs, given, value=0.3)
    assert [g.note for g in uncut.groups] == ["the rest score above the cut", "all score above the cut"]
    both = plan(found, costs, scores(range(64), [0.5 + i for i in range(64)]), value=0.5)
    assert [g.note for g in both.groups] == ["the rest score above the cut"] * 2


def test_groups_that_cannot_be_cut_stand_in_the_plan_with_their_reason():
    found, costs = chain(4, 4)
    stuck = replace(found[1].group, prunable=False, reason="a bare parameter depends on it")
    result = plan((found[0], replace(found[1], group=stuck)), costs, scores(range(4), range(4)))
    assert [g.name for g in result.groups] == ["l0"]
    assert [(g.name, g.channels, g.removed, g.note) for g in result.refused] == [
        ("l1", 4, (), "a bare parameter depends on it")
    ]
    assert (result.channels_total, result.channels_removed) == (4, 2)


@pytest.mark.parametrize("policy", ["tie", "prune", "keep"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_hidden_units_do(policy, kind):
    network = built("zoo:se_mobilenet_x025")
    result = random_plan(network, kind, 0.5, hidden=policy)
    hidden = [g for g in result.groups if g.kind == "hidden"]
    assert len(hidden) == 13
    assert result.hidden == policy
    lost = [len(g.removed) for g in hidden]
    shares = {len(g.removed) / g.channels for g in hidden}
    if policy == "keep":
        assert set(lost) == {0}
        assert {g.note for g in hidden} == {"hidden units are kept"}
    elif policy == "tie":
        assert sum(lost) > 0
        assert {g.note for g in hidden} <= {"follows the channels it gates", "gates uncut channels"}
    else:
        assert sum(lost) > 0
        assert len(shares) > 2
    measure = {
        "macs": result.macs_after / result.macs_before,
        "params": result.params_after / result.params_before,
    }
    if kind in measure:
        assert 0.49 < measure[kind] <= 0.5


def test_a_budget_that_only_other_hidden_units_would_meet():
    found = built("zoo:se_mobilenet_x025")
    assert random_plan(found, "params", 0.012, hidden="prune").params_after > 0
    with pytest.raises(BudgetError, match="must stay"):
        random_plan(found, "params", 0.012, hidden="keep")


@pytest.mark.parametrize("least", [1, 2, 3, 5])
def test_min_channels_stay(least):
    found, costs = chain(8, 8)
    given = scores([0.0] * 8, [1.0 + i for i in range(8)])
    result = plan(found, costs, given, value=0.35, min_channels=least)
    assert len(result.groups[0].removed) == min(8 - least, math.ceil(0.35 * 16))
    assert result.min_channels == least


def test_a_group_narrower_than_min_channels_is_left_alone():
    found, costs = chain(3, 8)
    result = plan(found, costs, scores([0.0] * 3, [1.0] * 8), value=0.3, min_channels=4)
    assert [len(g.removed) for g in result.groups] == [0, 4]
    assert result.groups[0].note == "at its floor already"


def test_too_narrow_for_the_multiple_is_said():
    found, costs = chain(3, 16)
    result = plan(found, costs, scores([0.0] * 3, [1.0] * 16), value=0.4, round_to=8)
    assert [len(g.removed) for g in result.groups] == [0, 8]
    assert result.groups[0].note == "too narrow for multiples of 8"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [2, 4, 8])
def test_widths_that_are_cut_are_multiples(step, kind):
    network = built("zoo:se_mobilenet_x025")
    result = random_plan(network, kind, 0.5, round_to=step)
    kept = [g.channels - len(g.removed) for g in result.groups if g.removed and g.kind != "hidden"]
    assert len(kept) > 3
    assert all(k % step == 0 for k in kept)
    free = random_plan(network, kind, 0.5)
    assert any((g.channels - len(g.removed)) % step for g in free.groups if g.kind != "hidden")


@pytest.mark.parametrize("name", ["zoo:se_resnet20", "zoo:se_mobilenet_x025", "functional"])
def test_hidden_units_follow_the_channels_that_they_gate(name):
    network = built(name)
    result = random_plan(network, "sparsity", 0.5, seed=3)
    groups = {g.name: g for g in result.groups}
    maker = {layer: c.group.name for c in network.couplings for layer in c.layers("out")}
    followed = 0
    for site in network.sites:
        hidden, leader = groups[site.reduce], groups[maker[site.expand]]
        assert hidden.kind == "hidden"
        width = leader.channels - len(leader.removed)
        wanted = max(min(2, hidden.channels), math.ceil(hidden.channels * width / leader.channels))
        assert hidden.channels - len(hidden.removed) == wanted
        followed += bool(hidden.removed)
    assert followed or name == "functional"


def test_the_lowest_scored_hidden_units_leave():
    network = built("zoo:se_mobilenet_x025")
    given = random_scores(network.couplings, 1)
    result = make_plan(network.couplings, network.layers, given, Budget(kind="sparsity", value=0.5))
    checked = 0
    for group in result.groups:
        order = sorted(range(group.channels), key=given.groups[group.name].__getitem__)
        assert set(group.removed) == set(order[: len(group.removed)])
        checked += group.kind == "hidden" and len(group.removed) > 0
    assert checked > 3


def test_groups_that_cannot_be_cut_are_no_part_of_the_plan():
    found, costs = chain(4, 4)
    locked = replace(found[0], group=replace(found[0].group, prunable=False, reason="test"))
    given = scores([0.0] * 4, [1.0] * 4)
    assert [g.name for g in plan((locked, found[1]), costs, given).groups] == ["l1"]
    assert [g.name for g in plan(found, costs, given).groups] == ["l0", "l1"]


def test_nothing_to_cut_is_a_budget_error():
    with pytest.raises(BudgetError, match="no channel group can be cut"):
        plan((), {"l0": layer(3, 2)}, scores())


@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("value", [0.0, -0.1, 1.01, float("nan"), float("inf")])
def test_fractions_out_of_range_are_refused(kind, value):
    found, costs = chain(8)
    with pytest.raises(UsageError, match=f"--{kind} must be above 0 and at most 1, got"):
        plan(found, costs, scores(range(8)), kind, value)
    assert plan(found, costs, scores(range(8)), kind, 1.0).channels_removed == 0


@pytest.mark.parametrize("value", [-0.1, 1.0, 1.01, float("nan"), float("inf")])
def test_sparsities_out_of_range_are_refused(value):
    found, costs = chain(8)
    with pytest.raises(UsageError, match=r"--sparsity must be at least 0 and below 1, got .*0\.5 halves"):
        plan(found, costs, scores(range(8)), "sparsity", value)
    assert plan(found, costs, scores(range(8)), "sparsity", 0.0).channels_removed == 0


@pytest.mark.parametrize("option", ["round_to", "min_channels"])
@pytest.mark.parametrize("value", [0, -1])
def test_options_below_one_are_refused(option, value):
    found, costs = chain(8)
    with pytest.raises(UsageError, match=f"must be at least 1, got .*{value}"):
        plan(found, costs, scores(range(8)), **{option: value})
    assert plan(found, costs, scores(range(8)), **{option: 1}).channels_removed == 4


@pytest.mark.parametrize("options", [{}, {"round_to": 8}, {"min_channels": 7}])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["zoo:se_resnet20", "zoo:se_mobilenet_x025", "residual", "depthwise"])
def test_an_impossible_budget_names_a_number_that_is_reachable(name, kind, options):
    network = built(name)
    value = 0.999 if kind == "sparsity" else 0.0001
    with pytest.raises(BudgetError, match="cannot be met: with --round-to") as caught:
        random_plan(network, kind, value, **options)
    number = re.search(r"at (?:most|least) ([\d.]+)", str(caught.value))
    named = float(number[1])
    assert named != value
    result = random_plan(network, kind, named, **options)
    beyond = named + 0.002 if kind == "sparsity" else named - 0.002
    with pytest.raises(BudgetError):
        random_plan(network, kind, beyond, **options)
    if name.startswith("zoo") and not options:
        assert result.channels_removed > 0


def test_the_same_input_gives_the_same_plan():
    first, second = (random_plan(built("zoo:se_resnet20"), "macs", 0.5, seed=2) for _ in range(2))
    assert first == second
    assert first != random_plan(built("zoo:se_resnet20"), "macs", 0.5, seed=4)


def branches(*widths):
    """A concatenation of 1×1 layers b0, b1, ... that one layer reads, as one group."""
    total = sum(widths)
    every = tuple(range(total))
    costs = {f"b{i}": layer(3, width) for i, width in enumerate(widths)} | {"l1": layer(total, 2)}
    slices = [LayerSlice(layer="l1", role="in", index=every, root=every)]
    for i, (start, width) in enumerate(zip(itertools.accumulate((0, *widths)), widths, strict=False)):
        slices.append(
            LayerSlice(
                layer=f"b{i}", role="out", index=tuple(range(width)), root=tuple(range(start, start + width))
            )
        )
    group = ChannelGroup(name="l0", kind="stream", channels=total, members=tuple(costs))
    return (Coupling(group=group, slices=tuple(slices)),), costs


@pytest.mark.parametrize(("least", "stay"), [(1, {3, 7}), (2, {2, 3, 6, 7})])
def test_every_branch_of_a_concatenation_keeps_its_best_channels(least, stay):
    found, costs = branches(4, 12)
    low_first = (1, 2, 3, 4, *range(10, 22))
    got = plan(found, costs, scores(low_first), value=0.75, min_channels=least)
    kept = set(range(16)) - set(got.groups[0].removed)
    assert len(kept) == 4
    assert {c for c in kept if c < 4} == {c for c in stay if c < 4}
    whole = (replace(found[0], slices=found[0].slices[:1]),)  # the control: no branches, the best four stay
    assert set(range(16)) - set(plan(whole, costs, scores(low_first), value=0.75).groups[0].removed) == {
        12,
        13,
        14,
        15,
    }


def test_only_units_leave_and_further_channels_stay():
    found, costs = chain(10)
    units = ((0, 5, 7), (1, 6, 8))
    found = (replace(found[0], group=replace(found[0].group, tied=3, units=units)),)
    got = plan(found, costs, scores((5, 1, 0, 0, 0, 5, 1, 5, 1, 0)), value=0.3)
    assert got.groups[0].removed == (1, 6, 8)
    with pytest.raises(BudgetError, match=r"at most 0\.6 is reachable"):
        plan(found, costs, scores(range(10)), value=0.7)
