"""Plans by random scores: budgets are met from below and closely, and the numbers are those of the real network."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from se_prune.cost import count_cost
from se_prune.gates.sites import find_sites
from se_prune.planning import make_plan
from se_prune.records import Budget, Scores
from se_prune.surgery.cut import cut
from tests.built import built, random_plan, random_scores

ZOO = ["zoo:se_resnet20", "zoo:se_mobilenet_x025"]
NETWORKS = [*ZOO, "residual", "depthwise", "functional"]
network = functools.cache(built)
few = settings(max_examples=6, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)


def counted(plan, kind):
    return {
        "sparsity": (plan.channels_total - plan.channels_removed) / plan.channels_total,
        "macs": plan.macs_after / plan.macs_before,
        "params": plan.params_after / plan.params_before,
    }[kind]


def kept(kind, value):
    return 1 - value if kind == "sparsity" else value


@pytest.mark.parametrize("comparable", [False, True])
@pytest.mark.parametrize("kind", ["sparsity", "macs", "params"])
@pytest.mark.parametrize("name", ZOO)
@few
@given(seed=seeds, value=st.floats(0.1, 0.9))
def test_budgets_are_met_from_below_within_one_percent(name, kind, comparable, seed, value):
    found = network(name)
    scores = random_scores(found.couplings, seed, comparable=comparable)
    plan = make_plan(found.couplings, found.layers, scores, Budget(kind=kind, value=value))
    wanted = kept(kind, value)
    assert wanted - 0.01 <= counted(plan, kind) <= wanted + 1e-9
    if kind == "sparsity":  # whole channels allow no fewer
        assert plan.channels_removed == math.ceil(value * plan.channels_total - 1e-6)


@pytest.mark.parametrize("kind", ["sparsity", "macs", "params"])
@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=3, deadline=None, derandomize=True)
@given(seed=seeds, value=st.floats(0.0, 0.35))
def test_planned_costs_are_those_of_the_network_that_is_cut(name, kind, seed, value):
    found = network(name)
    plan = random_plan(found, kind, value if kind == "sparsity" else 1 - value, seed)
    assert (plan.macs_before, plan.params_before) == (found.cost.macs, found.cost.params)
    result = cut(found.model, found.example, plan)
    after = count_cost(result, found.preprocessing, find_sites(result, found.example))
    assert (plan.macs_after, plan.params_after) == (after.macs, after.params)
    assert (after.params < found.cost.params) == (plan.channels_removed > 0)


@pytest.mark.parametrize("name", ZOO)
@few
@given(seed=seeds, permutation=seeds)
def test_permuting_scores_permutes_what_leaves(name, seed, permutation):
    found = network(name)
    scores = random_scores(found.couplings, seed)
    generator = torch.Generator().manual_seed(permutation)
    orders = {
        key: torch.randperm(len(values), generator=generator).tolist()
        for key, values in scores.groups.items()
    }
    turned = Scores(
        criterion="random",
        comparable=False,
        groups={key: tuple(values[i] for i in orders[key]) for key, values in scores.groups.items()},
    )
    budget = Budget(kind="macs", value=0.5)
    plans = [make_plan(found.couplings, found.layers, s, budget) for s in (scores, turned)]
    for plain, other in zip(plans[0].groups, plans[1].groups, strict=True):
        assert {orders[other.name][i] for i in other.removed} == set(plain.removed)
    assert plans[0].macs_after == plans[1].macs_after
    assert plans[0].channels_removed > 0


@pytest.mark.parametrize("name", ZOO)
@few
@given(seed=seeds, value=st.floats(0.1, 0.4), round_to=st.sampled_from([1, 2, 4]), least=st.integers(1, 3))
def test_floors_hold_and_the_lowest_scores_leave(name, seed, value, round_to, least):
    found = network(name)
    scores = random_scores(found.couplings, seed)
    options = {"round_to": round_to, "min_channels": least}
    budget = Budget(kind="sparsity", value=value)
    plan = make_plan(found.couplings, found.layers, scores, budget, **options)
    assert plan.channels_removed > 0
    for group in plan.groups:
        width = group.channels - len(group.removed)
        assert width >= min(group.channels, max(least, group.channels / 16))
        if group.removed and group.kind != "hidden":
            assert width % round_to == 0
        values = scores.groups[group.name]
        gone = [values[i] for i in group.removed]
        stay = [v for i, v in enumerate(values) if i not in group.removed]
        assert max(gone, default=0) <= min(stay)
