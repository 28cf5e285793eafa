"""The predicted loss of what leaves a group, from scores alone."""

import random
from dataclasses import replace

import pytest

from se_prune.errors import UsageError
from se_prune.planning import sensitivity
from tests.unit.test_planning import chain, plan, scores, tied


def test_a_curve_by_hand():
    found, _ = chain(4, 2)
    given = scores([0.4, 0.1, 0.3, 0.2], [5.0, 1.0], comparable=True)
    curves = sensitivity(found, given, (0.0, 0.5, 0.75, 1.0))
    assert list(curves) == ["l0", "l1"]
    assert [n for n, _ in curves["l0"]] == [0, 2, 3, 4]
    assert [loss for _, loss in curves["l0"]] == pytest.approx([0, 0.3, 0.6, 1.0])
    assert curves["l1"][1] == (1, 1.0)


def test_channels_that_leave_together_count_together():
    found = tied(chain(4)[0], 2)  # 0 and 2, 1 and 3
    given = scores([0.4, 0.1, 0.3, 0.2], comparable=True)
    ((count, loss),) = sensitivity(found, given, (0.5,))["l0"]
    assert (count, loss) == (2, pytest.approx(0.3))


def test_the_order_of_the_channels_does_not_matter():
    found, _ = chain(9)
    values = [random.Random(i).random() for i in range(9)]
    shuffled = random.Random(1).sample(values, 9)
    assert shuffled != values
    shares = [i / 9 for i in range(10)]
    first, second = (sensitivity(found, scores(v, comparable=True), shares)["l0"] for v in (values, shuffled))
    assert [n for n, _ in first] == [n for n, _ in second] == list(range(10))
    assert [loss for _, loss in first] == pytest.approx([loss for _, loss in second])


def test_groups_that_cannot_be_cut_have_no_curve():
    found, _ = chain(4, 2)
    found = (found[0], replace(found[1], group=replace(found[1].group, prunable=False)))
    assert list(sensitivity(found, scores([1, 2, 3, 4], comparable=True), (0.5,))) == ["l0"]


def test_scores_in_no_common_unit_have_no_curves():
    found, _ = chain(4)
    with pytest.raises(UsageError, match="take excitation"):
        sensitivity(found, scores([1, 2, 3, 4]), (0.5,))


def test_a_plan_says_what_its_channels_are_predicted_to_cost():
    found, costs = chain(4)
    given = scores([3.0, 1.0, 4.0, 2.0], comparable=True)
    (group,) = plan(found, costs, given).groups
    assert (group.removed, group.predicted_loss) == ((1, 3), 3.0)
    assert plan(found, costs, scores([3.0, 1.0, 4.0, 2.0])).groups[0].predicted_loss is None
