"""Reading and replacing gates: what a tap sees is what is multiplied, and what it puts there is used."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import _get_current_function_mode_stack

from se_prune.errors import SurgeryError
from se_prune.gates.sites import find_sites
from se_prune.gates.tap import constant_gates, tap
from tests.nets import ALL, DEPTHWISE, FUNCTIONAL, RESIDUAL, ConvSE


def eager(model, images):
    with torch.no_grad():
        return model.eval()(images)


def tapped(model, sites, images, on_gate):
    with tap(model, sites, on_gate):
        return eager(model, images)


def clean(model):
    """Say whether no hook and no mode is left."""
    return not _get_current_function_mode_stack() and not any(
        m._forward_hooks or m._forward_pre_hooks for m in model.modules()
    )


@pytest.mark.parametrize("facts", ALL.values(), ids=ALL)
def test_a_tap_sees_features_and_gate_and_changes_nothing(facts):
    model, images = facts.build(), facts.images(3)
    sites = find_sites(model, images)
    plain, seen = eager(model, images), []
    result = tapped(model, sites, images, lambda site, u, s: seen.append((site.name, u, s)))
    assert torch.equal(result, plain)
    assert [name for name, _, _ in seen] == [site.name for site in sites]
    for site, (_, u, s) in zip(sites, seen, strict=True):
        assert u.shape[:2] == (3, site.channels)
        assert u.ndim == 4
        assert s.shape == (3, site.channels, 1, 1)
        assert s.min() >= 0
        assert s.max() <= 1
    assert clean(model)


@pytest.mark.parametrize("facts", [RESIDUAL, DEPTHWISE], ids=["residual", "depthwise"])
def test_features_times_gate_are_the_blocks_output(facts):
    model, images = facts.build(), facts.images(2)
    sites = find_sites(model, images)
    outputs, inputs, products = {}, {}, {}

    def keep(name):
        def hook(_, args, out):
            inputs[name], outputs[name] = args[0].clone(), out.clone()

        return hook

    handles = [model.get_submodule(s.name).register_forward_hook(keep(s.name)) for s in sites]
    tapped(model, sites, images, lambda site, u, s: products.update({site.name: (u.clone(), u * s)}))
    for handle in handles:
        handle.remove()
    assert len(products) == 2
    for name, (u, v) in products.items():
        assert torch.equal(u, inputs[name])
        assert torch.equal(v, outputs[name])
        assert not torch.equal(u, v)


def test_the_gate_of_a_whole_network_is_told_from_its_other_multiplies():
    model, images = FUNCTIONAL.build(), FUNCTIONAL.images(2)
    sites, seen = find_sites(model, images), []
    tapped(model, sites, images, lambda _, u, s: seen.append((u, s)))
    ((u, s),) = seen
    with torch.no_grad():
        x = model.conv1(images)
        x = x * x.sigmoid()
        gate = F.relu6(model.expand(F.silu(model.reduce(x.mean((2, 3))))) + 3) / 6
    assert torch.allclose(u, x)
    assert torch.allclose(s[:, :, 0, 0], gate)


class Block(nn.Module):
    """An owner with a layer scale, a swish and a mask around its gate, written in several ways."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.reduce, self.expand = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)
        self.scale = nn.Parameter(torch.rand(4, 1, 1) + 0.5)

    def gate(self, u):
        return self.expand(self.reduce(u.mean((2, 3), keepdim=True)).relu()).sigmoid()

    def forward(self, x):
        u = self.conv(x) * self.scale
        u = 2 * (u * u.sigmoid())
        return self.way(u, self.gate(u)) * self.scale + x[:, :1] * 0.5


class Stack(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.first, self.second = Block(way), Block(way)

    def forward(self, x):
        return self.second(self.first(x)[:, :3] * 0.7)


WAYS = {
    "u * s": lambda u, s: u * s,
    "s * u": lambda u, s: s * u,
    "u * s.expand_as(u)": lambda u, s: u * s.expand_as(u),
    "s.expand_as(u) * u": lambda u, s: s.expand_as(u) * u,
    "u.mul_(s)": lambda u, s: u.mul_(s),
    "torch.mul(s, u)": torch.mul,
    "torch.mul(u, other=s)": lambda u, s: torch.mul(u, other=s),
    "torch.mul(other=s, input=u)": lambda u, s: torch.mul(other=s, input=u),
    "u.multiply(other=s)": lambda u, s: u.multiply(other=s),
}


class Twin(Stack):
    """The same network with constants (C,) where the gates stand."""

    def __init__(self, constants):
        super().__init__(lambda u, s: u * s)
        for block, value in zip((self.first, self.second), constants, strict=True):
            block.gate = lambda _, value=value: value.view(1, -1, 1, 1)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_constants_in_place_of_gates_equal_a_twin_made_by_hand(way):
    model, images = Stack(way), torch.randn(2, 3, 6, 6)
    sites = find_sites(model, images)
    assert [(s.owner, s.expand) for s in sites] == [("first", "first.expand"), ("second", "second.expand")]
    values = [torch.rand(4), torch.rand(4)]
    twin = Twin(values)
    twin.load_state_dict(model.state_dict())
    gates = constant_gates({s.name: value for s, value in zip(sites, values, strict=True)})
    replaced = tapped(model, sites, images, gates)
    assert torch.allclose(replaced, eager(twin, images), atol=1e-6)
    assert not torch.allclose(replaced, eager(model, images), atol=1e-4)
    assert clean(model)


def test_gates_of_one_are_a_network_without_se():
    model, images = RESIDUAL.build(), RESIDUAL.images(2)
    sites = find_sites(model, images)
    ones = tapped(model, sites, images, lambda _, __, s: torch.ones_like(s))
    plain = eager(model, images)
    for block in model.blocks:
        block.se = nn.Identity()
    assert torch.equal(ones, eager(model, images))
    assert not torch.allclose(ones, plain, atol=1e-4)


def test_sites_without_a_constant_keep_their_gate():
    model, images = RESIDUAL.build(), RESIDUAL.images(2)
    first, second = find_sites(model, images)
    one = tapped(model, [first, second], images, constant_gates({second.name: torch.full((4,), 0.25)}))
    model.blocks[1].se.expand.weight.data.zero_()
    model.blocks[1].se.expand.bias.data.fill_(float(torch.logit(torch.tensor(0.25))))
    assert torch.allclose(one, eager(model, images), atol=1e-6)
    assert torch.equal(tapped(model, [first, second], images, constant_gates({})), eager(model, images))


def test_a_site_that_is_not_asked_for_is_not_seen():
    model, images, seen = RESIDUAL.build(), RESIDUAL.images(), []
    _, second = find_sites(model, images)
    tapped(model, [second], images, lambda site, *_: seen.append(site.name))
    assert seen == [second.name]


def test_every_call_of_a_shared_module_is_its_own_site():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.se = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), ConvSE(4, 2)

        def forward(self, x):
            self.kept = [self.a(x)]
            self.kept.append(self.b(self.se(self.kept[0])))
            return self.se(self.kept[1])

    model, images, seen = Shared(), torch.randn(2, 3, 5, 5), []
    sites = find_sites(model, images)
    with tap(model, sites, lambda site, u, _: seen.append((site.name, u))):
        for _ in range(2):  # calls are counted anew in every forward pass
            seen.clear()
            eager(model, images)
    assert [name for name, _ in seen] == ["se", "se#2"]
    assert all(torch.equal(u, kept) for (_, u), kept in zip(seen, model.kept, strict=True))


def test_a_tap_inside_a_tap_sees_what_the_outer_one_left():
    model, images = RESIDUAL.build(), RESIDUAL.images()
    sites, outer, inner = find_sites(model, images), [], []
    with tap(model, sites, lambda site, *_: outer.append(site.name)):
        tapped(model, sites, images, lambda site, *_: inner.append(site.name))
        eager(model, images)
    assert inner == [s.name for s in sites]
    assert outer == inner * 2
    assert clean(model)


class BrokenError(Exception):
    pass


@pytest.mark.parametrize("where", ["blocks.0.se.reduce", "blocks.1.conv1", "blocks.1.se.sigmoid", "fc"])
def test_an_exception_in_the_network_leaves_nothing_behind(where):
    model, images, seen = RESIDUAL.build(), RESIDUAL.images(), []
    sites = find_sites(model, images)

    def fail(*_):
        raise BrokenError

    handle = model.get_submodule(where).register_forward_pre_hook(fail)
    with pytest.raises(BrokenError):
        tapped(model, sites, images, lambda *_: None)
    handle.remove()
    assert clean(model)
    tapped(model, sites, images, lambda site, *_: seen.append(site.name))
    assert seen == [s.name for s in sites]


def test_within_an_open_tap_a_failed_pass_does_not_disturb_the_next():
    model, images, seen = RESIDUAL.build(), RESIDUAL.images(), []
    sites = find_sites(model, images)

    def once(site, *_):
        seen.append(site.name)
        if len(seen) == 1:
            raise BrokenError

    with tap(model, sites, once):
        with contextlib.suppress(BrokenError):
            eager(model, images)
        assert not _get_current_function_mode_stack()
        eager(model, images)
        assert not _get_current_function_mode_stack()
    assert seen == [sites[0].name, *(s.name for s in sites)]
    assert clean(model)


def test_the_mode_is_active_only_while_an_owner_runs():
    model, images, depth = RESIDUAL.build(), RESIDUAL.images(), []
    sites = find_sites(model, images)
    names = ["stem", "blocks.0.conv1", "blocks.0.se.reduce", "fc"]
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda *_: depth.append(len(_get_current_function_mode_stack()))
        )
        for name in names
    ]
    tapped(model, sites, images, lambda *_: None)
    for handle in handles:
        handle.remove()
    assert depth == [0, 0, 1, 0]


def test_sites_of_another_network_are_refused():
    sites = find_sites(RESIDUAL.build(), RESIDUAL.images())
    other = FUNCTIONAL.build()
    with (
        pytest.raises(SurgeryError, match=r"no module 'blocks\.0\.se'; these gate sites belong to another"),
        tap(other, sites, lambda *_: None),
    ):
        pytest.fail("the tap opened")
    assert clean(other)
