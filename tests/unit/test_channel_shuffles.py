"""Channels behind channel shuffles."""

import pytest
import torch
from torch import nn

from se_prune.errors import SurgeryError
from se_prune.surgery.cut import cut, difference, verify
from tests.coupled import IMAGES, groups_of, planned


class Shuffled(nn.Module):
    """A channel shuffle between two convolutions, or the same views without the transpose."""

    def __init__(self, *, shuffle):
        super().__init__()
        self.shuffle = shuffle
        self.a, self.b, self.fc = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1), nn.Linear(4, 2)

    def forward(self, x):
        x = self.a(x).relu()
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w)
        x = x.transpose(1, 2).reshape(n, c, h, w) if self.shuffle else x.reshape(n, c, h, w)
        return self.fc(self.b(x).mean((2, 3)))


def test_channels_behind_a_shuffle_leave_by_its_rows():
    model = Shuffled(shuffle=True).eval()
    found = groups_of(model)
    assert found["a"].group.together == ((0, 3), (1, 4), (2, 5))
    assert {p.layer: (p.index, p.root) for p in found["a"].slices}["b"] == (
        tuple(range(6)),
        (0, 3, 1, 4, 2, 5),
    )
    plan = planned(found, "a", (1, 4))
    result = cut(model, IMAGES, plan)
    assert torch.equal(result.b.weight, model.b.weight[:, [0, 1, 4, 5]])
    assert verify(model, result, tuple(found.values()), plan, IMAGES) <= 1e-9
    assert groups_of(Shuffled(shuffle=False))["a"].group.together == tuple((i,) for i in range(6))


SPELLINGS = {
    "transpose": lambda x, n, c, h, w: x.view(n, 3, c // 3, h, w).transpose(1, 2).reshape(n, c, h, w),
    "negative": lambda x, n, c, h, w: x.reshape(n, 3, c // 3, h, w).transpose(-4, -3).flatten(1, 2),
    "permute": lambda x, n, c, h, w: (
        x.view(n, 3, c // 3, h, w).permute(0, 2, 1, 3, 4).contiguous().view(n, c, h, w)
    ),
    "torch": lambda x, n, c, h, w: nn.functional.channel_shuffle(x, 3),
}


class Unit(nn.Module):
    """A ShuffleNet unit's branch: grouped 1×1, shuffle, depthwise, grouped 1×1, between plain convolutions."""

    def __init__(self, width, spelling):
        super().__init__()
        self.spelling = SPELLINGS[spelling]
        self.stem, self.a = nn.Conv2d(3, 6, 1), nn.Conv2d(6, width, 1, groups=3)
        self.bn, self.dw = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.b, self.fc = nn.Conv2d(width, 9, 1, groups=3), nn.Linear(9, 2)

    def forward(self, x):
        x = self.bn(self.a(self.stem(x))).relu()
        return self.fc(self.b(self.dw(self.spelling(x, *x.shape))).mean((2, 3)))


@pytest.mark.parametrize(
    ("width", "spelling", "units", "size"),
    [
        (18, "transpose", 2, 9),
        (60, "transpose", 6, 9),
        (24, "negative", 2, 9),
        (60, "permute", 6, 9),
        (60, "torch", 6, 9),
        (9, "transpose", None, None),
    ],
)
def test_a_shuffle_between_grouped_convolutions_leaves_equal_shares(width, spelling, units, size):
    model = Unit(width, spelling).eval()
    found = groups_of(model)
    group = found["a"].group
    if units is None:
        assert not group.prunable
        assert "equal shares" in group.reason
        return
    assert (len(group.together), group.tied, group.prunable) == (units, size, True)
    assert sum(map(len, group.together)) == len({c for unit in group.together for c in unit}) == units * size
    gone = tuple(sorted(c for unit in group.together[1:] for c in unit))
    plan = planned(found, "a", gone)
    result = cut(model, IMAGES, plan)
    assert result.dw.groups == result.b.in_channels == width - len(gone)
    assert verify(model, result, tuple(found.values()), plan, IMAGES) <= 1e-9
    assert difference(model, result, IMAGES) > 1e-6
    with pytest.raises(SurgeryError, match="must lose equally many; plan it again"):
        cut(model, IMAGES, planned(found, "a", (0,)))


class Halves(nn.Module):
    """ShuffleNet v2: half of a map passes by, the other is convolved; both are shuffled."""

    def __init__(self, units):
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 16, 1), nn.Linear(16, 2)
        self.first, self.second = (nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(units)) for _ in range(2))

    def forward(self, x):
        x = self.stem(x)
        for first, second in zip(self.first, self.second, strict=True):
            kept, changed = x.chunk(2, 1)
            x = torch.cat([kept, second(first(changed).relu())], 1)
            n, c, h, w = x.shape
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("units", [1, 2, 8])
def test_the_middle_of_a_unit_is_cut_where_its_stream_is_refused(units):
    model = Halves(units).eval()
    found = groups_of(model)
    middles = {f"first.{i}" for i in range(units)}
    assert {name for name, c in found.items() if c.group.prunable} == middles
    assert {"shuffle" in c.group.reason or "without end" in c.group.reason for n, c in found.items()
            if n not in middles | {"fc"}} == {True}  # fmt: skip
    plan = planned(found, "first.0", (1, 2, 6))
    assert verify(model, cut(model, IMAGES, plan), tuple(found.values()), plan, IMAGES) <= 1e-9
