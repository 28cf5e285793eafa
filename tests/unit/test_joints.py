"""Channels of splits, slices and concatenations."""

import copy

import pytest
import timm
import torch
import torch_pruning as tp
from torch import nn

from se_prune.errors import SurgeryError
from se_prune.surgery.cut import cut, difference, verify
from tests.coupled import IMAGES, groups_of, planned


class Split(nn.Module):
    """A part of a map that two layers read, the other beside their sum (cross-stage networks)."""

    def __init__(self, split):
        super().__init__()
        self.split = split
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 5, 1), nn.Conv2d(5, 4, 1)
        self.out, self.fc = nn.Conv2d(8, 6, 1), nn.Linear(6, 2)

    def forward(self, x):
        first, second = self.split(self.a(x))
        return self.fc(self.out(torch.cat([self.c(self.b(second).relu()) + second, first], 1)).mean((2, 3)))


def test_parts_of_a_split_lose_equally_many_channels():
    model = Split(lambda x: x.chunk(2, 1)).eval()
    found = groups_of(model)
    group = found["a"].group
    assert (group.prunable, group.together) == (True, ((0, 4), (1, 5), (2, 6), (3, 7)))
    plan = planned(found, "a", (0, 2, 4, 6))
    result = cut(model, IMAGES, plan)
    assert (result.b.in_channels, result.c.out_channels, result.out.in_channels) == (2, 2, 4)
    assert verify(model, result, tuple(found.values()), plan, IMAGES) <= 1e-9


@pytest.mark.parametrize("split", [lambda x: x.split(4, 1), lambda x: torch.split(x, [4, 4], 1)])
def test_a_split_into_fixed_widths_is_refused(split):
    found = groups_of(Split(split))
    assert found["a"].group.reason == "a split into fixed widths reads its channels"
    assert found["b"].group.prunable


class Partly(nn.Module):
    """Adds each map to the first channels of a wider one, as ReXNet does; `inner` widens and narrows in between."""

    def __init__(self, depth):
        super().__init__()
        widths = [8 + 4 * i for i in range(depth + 1)]
        self.stem, self.fc = nn.Conv2d(3, widths[0], 1), nn.Linear(widths[-1], 2)
        self.inner = nn.ModuleList(nn.Conv2d(w, 6, 1) for w in widths[:-1])
        self.outer = nn.ModuleList(nn.Conv2d(6, w, 1) for w in widths[1:])

    def forward(self, x):
        x = self.stem(x)
        for inner, outer in zip(self.inner, self.outer, strict=True):
            y = outer(inner(x).relu())
            x = torch.cat([y[:, : x.shape[1]] + x, y[:, x.shape[1] :]], 1)
        return self.fc(x.mean((2, 3)))


def test_channels_that_a_slice_of_fixed_bounds_reads_are_refused_alone():
    found = groups_of(Partly(5))
    assert {c.group.reason for n, c in found.items() if n.startswith("outer")} == {
        "a slice of fixed bounds reads its channels"
    }
    assert {name for name, c in found.items() if c.group.prunable} == {f"inner.{i}" for i in range(5)}
    assert found["inner.2"].layers("in") == ("outer.2",)


class Concatenated(nn.Module):
    """A map beside a depthwise function of itself, or beside an independent map (Ghost modules do the first)."""

    def __init__(self, ghost):
        super().__init__()
        self.ghost = ghost
        self.a, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(8)
        self.dw, self.c = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(3, 4, 3, padding=1)
        self.mix = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.out, self.fc = nn.Conv2d(8, 5, 1), nn.Linear(5, 2)

    def forward(self, x):
        a = self.a(x)
        both = torch.cat([a, self.dw(a) if self.ghost else self.c(x)], 1)
        return self.fc(self.out(self.mix(self.bn(both))).mean((2, 3)))


def test_channels_that_take_others_along_leave_with_them():
    model = Concatenated(ghost=True).eval()
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=IMAGES, verbose=False)
    one = graph.get_pruning_group(model.mix, tp.prune_depthwise_conv_out_channels, [0])
    touched = {i for dep, idxs in one if dep.target.module is model.mix for i in idxs}
    assert touched > {0}  # torch-pruning's own: one channel asked for, more leave
    found = groups_of(model)
    assert {name for name, c in found.items() if not c.group.prunable} == {"fc"}
    assert found["mix"].group.together == ((0, 4), (1, 5), (2, 6), (3, 7))
    plan = planned(found, "mix", (1, 5))
    assert verify(model, cut(model, IMAGES, plan), tuple(found.values()), plan, IMAGES) <= 1e-9


def test_concatenations_of_independent_maps_are_cut():
    model = Concatenated(ghost=False).eval()
    found = groups_of(model)
    assert {n: c.group.prunable for n, c in found.items()} == {"mix": True, "out": True, "fc": False}
    made = {s.layer: (s.index, s.root) for s in found["mix"].slices if s.role == "out"}
    assert made == {"a": ((0, 1, 2, 3), (0, 1, 2, 3)), "c": ((0, 1, 2, 3), (4, 5, 6, 7))}
    plan = planned(found, "mix", (1, 2, 6))
    result = cut(model, IMAGES, plan)
    assert verify(model, result, tuple(found.values()), plan, IMAGES) <= 1e-9
    assert difference(model, result, IMAGES) > 1e-6
    assert (result.a.out_channels, result.c.out_channels, result.mix.groups) == (2, 3, 5)


def test_a_cut_that_torch_pruning_gets_wrong_is_refused():
    class Halved(nn.Module):
        """Half of a map is convolved, the other passes by."""

        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.fc = nn.Linear(8, 2)

        def forward(self, x):
            first, second = self.a(x).chunk(2, 1)
            return self.fc(torch.cat([self.b(first), second], 1).mean((2, 3)))

    model = Halved().eval()
    found = groups_of(model)
    plan = planned(found, "b", (0,))
    with pytest.raises(SurgeryError, match=r"does not run .*nothing was written.* please report"):
        verify(model, cut(model, IMAGES, plan), tuple(found.values()), plan, IMAGES)


class Attention(nn.Module):
    """Single-head attention on a part of the map, and a convolved part in front (SHViT)."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.outer = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1)
        self.qkv, self.proj, self.fc = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 2)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.outer(self.inner(x).relu())
        first, second = torch.split(x, [4, 4], 1)
        q, k, v = (part.flatten(2) for part in torch.split(self.qkv(first), [2, 2, 4], 1))
        mixed = (v @ (q.transpose(-2, -1) @ k).softmax(-1).transpose(-2, -1)).reshape(first.shape)
        x = x + self.proj(torch.cat([mixed, second], 1))
        return self.fc(x.mean((2, 3)))


def test_a_reshape_on_which_torch_pruning_divides_by_zero_is_refused_alone():
    model = Attention().eval()
    with pytest.raises(ZeroDivisionError):
        tp.DependencyGraph().build_dependency(model, example_inputs=IMAGES, verbose=False)
    found = groups_of(model)
    assert [name for name, c in found.items() if c.group.prunable] == ["inner"]
    plan = planned(found, "inner", (1, 4))
    assert verify(model, cut(model, IMAGES, plan), tuple(found.values()), plan, IMAGES) <= 1e-9


def test_attention_that_torch_pruning_follows_in_ever_longer_lists_is_refused_alone():
    model = timm.create_model("efficientvit_m0").eval()
    found = groups_of(model, torch.randn(1, 3, 224, 224))
    copy.deepcopy(model)  # what it keeps for later is no part of autograd's graph
    endless = [n for n, c in found.items() if "without end" in (c.group.reason or "")]
    assert any("attn" in name for name in endless)
    ready = [name for name, c in found.items() if c.group.prunable]
    assert {name for name in ready if ".ffn" in name} >= {"stages.0.blocks.0.ffn0.m.pw1.conv"}
