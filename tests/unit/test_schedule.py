"""The steps of a cut: what each leaves, how the epochs are shared, and plans that add up."""

from dataclasses import replace

import pytest
import torch

from se_prune.artifact import Network
from se_prune.errors import SurgeryError
from se_prune.pipeline import jobs, structure
from se_prune.records import ArchSpec, ArtifactHeader, Budget, GroupPlan, Plan, SitePlan
from se_prune.schedule import compose, epochs_of, goals, kept_after, of_what_is_left
from tests.nets import DepthwiseSE, FunctionalSE, ResidualSE
from tests.tiny import GREY

MACS = Budget(kind="macs", value=0.2)


def test_what_stays_after_each_step():
    assert kept_after("linear", 0.2, 4) == pytest.approx((0.8, 0.6, 0.4, 0.2))
    assert kept_after("cubic", 0.2, 2) == pytest.approx((1 - 0.8 * 7 / 8, 0.2))
    assert kept_after("geometric", 0.25, 2) == pytest.approx((0.5, 0.25))
    for shape in ("linear", "cubic", "geometric"):
        assert kept_after(shape, 0.3, 1) == (0.3,)
        falling = kept_after(shape, 0.3, 5)
        assert falling[-1] == 0.3
        assert list(falling) == sorted(falling, reverse=True)


@pytest.mark.parametrize(
    ("total", "steps", "expected"),
    [(6, 1, (6,)), (6, 3, (1, 1, 4)), (60, 3, (10, 10, 40)), (3, 3, (1, 1, 1)), (5, 2, (1, 4))],
)
def test_the_epochs_are_shared_and_the_last_step_gets_the_larger_part(total, steps, expected):
    assert epochs_of(total, steps) == expected
    assert sum(epochs_of(total, steps)) == total


def test_goals_count_channels_by_what_leaves_and_the_rest_by_what_stays():
    assert goals(MACS, "cubic", 1) == (MACS,)
    assert [b.value for b in goals(Budget(kind="params", value=0.25), "geometric", 2)] == [0.5, 0.25]
    assert [b.value for b in goals(Budget(kind="sparsity", value=0.6), "linear", 3)] == pytest.approx(
        [0.2, 0.4, 0.6]
    )


def test_a_goal_becomes_one_of_what_is_left():
    assert of_what_is_left(MACS, 100, 40).value == pytest.approx(0.5)
    assert of_what_is_left(MACS, 100, 15).value == 1.0  # met already
    half = Budget(kind="sparsity", value=0.5)
    assert of_what_is_left(half, 100, 80).value == pytest.approx(0.375)  # 30 of 80 leave, 50 stay
    assert of_what_is_left(half, 100, 40).value == 0.0


def plan(groups, **options):
    values = {
        "criterion": "excitation",
        "budget": Budget(kind="macs", value=0.5),
        "round_to": 1,
        "min_channels": 2,
        "macs_before": 100,
        "macs_after": 50,
        "params_before": 10,
        "params_after": 5,
    }
    made = [
        GroupPlan(name=name, kind="inner", channels=channels, removed=removed)
        for name, (channels, removed) in groups.items()
    ]
    return Plan(groups=tuple(made), **(values | options))


def test_two_plans_add_up_in_the_numbering_of_the_dense_network():
    site = SitePlan(name="se", action="fold", loss=0.0, constants=(1.0,))
    first = plan({"a": (6, (1, 4)), "gone": (3, (0,))}, sites=(site,))
    then = plan({"a": (4, (0, 2)), "new": (5, (3,))}, macs_before=50, macs_after=20, params_after=2)
    whole = compose(first, then, MACS)
    groups = {g.name: (g.channels, g.removed) for g in whole.groups}
    # of 6, the first leaves 0, 2, 3, 5; of these the second takes the first and the third
    assert groups == {"a": (6, (0, 1, 3, 4)), "new": (5, (3,)), "gone": (3, (0,))}
    assert (whole.macs_before, whole.macs_after, whole.params_before, whole.params_after) == (100, 20, 10, 2)
    assert whole.budget == MACS
    assert whole.sites == (site,)


def test_a_group_that_can_be_cut_no_more_keeps_what_left_it():
    first = plan({"a": (6, (1, 4))})
    still = GroupPlan(name="a", kind="inner", channels=4, removed=(), note="too small")
    whole = compose(first, plan({}, refused=(still,)), MACS)
    assert [(g.name, g.removed) for g in whole.groups] == [("a", (1, 4))]
    assert whole.refused == ()


def test_the_first_plan_is_one_of_the_dense_network_itself():
    first = plan({"a": (6, (1, 4))})
    assert compose(None, first, MACS) == replace(first, budget=MACS)


def test_plans_that_do_not_follow_each_other_are_refused():
    with pytest.raises(SurgeryError, match=r"5 channels of 'a' cannot follow one that leaves 4"):
        compose(plan({"a": (6, (1, 4))}), plan({"a": (5, (0,))}), MACS)


@pytest.mark.parametrize("cls", [ResidualSE, DepthwiseSE, FunctionalSE])
@pytest.mark.parametrize("hidden", ["tie", "prune"])
def test_cutting_twice_is_cutting_once_by_the_plan_that_adds_both_up(cls, hidden):
    torch.manual_seed(1)
    preprocessing = replace(GREY, input_size=(1, 8, 8))
    header = ArtifactHeader(arch=ArchSpec(ref="in hand"), preprocessing=preprocessing)
    dense = Network(module=cls(num_classes=3, in_channels=1).eval(), header=header)
    network, whole, removed = dense, None, []
    for kept in (0.8, 0.7):
        found = structure(network)
        budget = Budget(kind="params", value=kept)
        chosen = jobs.plan(
            network, found, budget, criterion="l1", device=torch.device("cpu"), min_channels=1, hidden=hidden
        )
        network = jobs.built(network, found, chosen)
        whole = compose(whole, chosen, MACS)
        removed.append(whole.channels_removed)
    assert 0 < removed[0] < removed[1]
    once = jobs.built(dense, structure(dense), whole).module.state_dict()
    twice = network.module.state_dict()
    assert once.keys() == twice.keys()
    assert all(torch.equal(value, twice[name]) for name, value in once.items())
