"""Channels that take others of their group along: what a depthwise convolution makes of a map joins it in a stream."""

import pytest
import torch
from torch import nn

from se_prune.channels.groups import _leaving
from se_prune.errors import SurgeryError
from se_prune.surgery.cut import cut, verify
from tests.coupled import IMAGES, groups_of, planned


class Ghost(nn.Module):
    """A ghost module (Han et al. 2020) on a stream: a convolution, and a depthwise one of what it makes."""

    def __init__(self, width, *, joined=True):
        super().__init__()
        self.joined = joined
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.primary, self.bn = nn.Conv2d(width, width // 2, 1), nn.BatchNorm2d(width // 2)
        self.cheap = nn.Conv2d(width // 2, width // 2, 3, padding=1, groups=width // 2)
        self.other = nn.Conv2d(width, width // 2, 1)
        self.b, self.fc = nn.Conv2d(width, 5, 1), nn.Linear(5, 2)

    def forward(self, x):
        x = self.stem(x).relu()
        first = self.bn(self.primary(x)).relu()
        second = self.cheap(first) if self.joined else self.cheap(self.other(x))
        return self.fc(self.b(torch.cat([first, second], 1) + x).relu().mean((2, 3)))


def test_a_map_and_what_a_depthwise_convolution_makes_of_it_leave_together():
    model = Ghost(8).eval()
    found = groups_of(model)
    group = found["stem"].group
    assert (group.prunable, group.tied) == (True, 2)
    assert group.together == ((0, 4), (1, 5), (2, 6), (3, 7))
    plan = planned(found, group.name, (1, 3, 5, 7))
    result = cut(model, IMAGES, plan)
    assert torch.equal(result.stem.weight, model.stem.weight[[0, 2, 4, 6]])
    assert torch.equal(result.primary.weight, model.primary.weight[[0, 2]][:, [0, 2, 4, 6]])
    assert torch.equal(result.cheap.weight, model.cheap.weight[[0, 2]])
    assert verify(model, result, tuple(found.values()), plan, IMAGES) <= 1e-9


def test_half_of_a_pair_cannot_leave():
    model = Ghost(8).eval()
    found = groups_of(model)
    plan = planned(found, "stem", (1,))
    with pytest.raises(SurgeryError):
        verify(model, cut(model, IMAGES, plan), tuple(found.values()), plan, IMAGES)


def test_maps_of_two_convolutions_leave_one_by_one():
    found = groups_of(Ghost(8, joined=False).eval())
    assert found["stem"].group.together == tuple((i,) for i in range(8))


def test_neighbours_that_a_reshape_is_guessed_to_join_stay():
    assert _leaving(4, [], {}, [], [], along=[[0, 2], [1, 3]]) == (2, (), None)
    tied, units, reason = _leaving(4, [], {}, [], [], along=[[0, 1], [2, 3]])
    assert (tied, units, reason) == (1, (), "some of its channels take others along")
