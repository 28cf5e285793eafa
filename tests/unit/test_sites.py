"""Gate sites: found however they are written, and found nowhere else."""

import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

from se_prune.gates.sites import find_sites
from se_prune.records import ArchSpec
from se_prune.zoo.registry import build
from tests.nets import ALL, RESIDUAL, ConvSE, LinearSE

IMAGE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Gated(nn.Module):
    """A convolution and the four layers that any way to write a gate can use; `way` is that way."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.reduce, self.expand = nn.Linear(6, 2), nn.Linear(2, 6)
        self.conv_reduce, self.conv_expand = nn.Conv2d(6, 2, 1), nn.Conv2d(2, 6, 1)
        self.one = nn.Linear(6, 6)
        self.scale, self.where = nn.Parameter(torch.rand(6)), nn.Parameter(torch.rand(1, 1, 8, 8))

    def forward(self, x):
        return self.way(self, self.conv(x))

    def logits(self, u):
        return self.expand(self.reduce(u.mean((2, 3))).relu())

    def conv_logits(self, u):
        return self.conv_expand(self.conv_reduce(F.adaptive_avg_pool2d(u, 1)).relu())


def image_gate(logits):
    return logits.sigmoid()[:, :, None, None]


def steps(net, u):
    z = u.mean(2).mean(2)
    return u * net.expand(net.reduce(z).relu()).sigmoid().view(-1, 6, 1, 1)


def gate_first(net, u):
    return net.conv_logits(u).sigmoid() * u


def expand_as(net, u):
    return u * net.conv_logits(u).sigmoid().expand_as(u)


def expanded_gate_first(net, u):
    return net.conv_logits(u).sigmoid().expand(-1, -1, *u.shape[2:]) * u


def in_place(net, u):
    return u.mul_(image_gate(net.logits(u)))


def augmented(net, u):
    u *= net.conv_logits(u).sigmoid()
    return u


def function(net, u):
    return torch.mul(u, other=net.conv_logits(u).sigmoid())


def hard(net, u):
    return u * F.hardsigmoid(net.conv_logits(u))


def relu6(net, u):
    return u * (F.relu6(net.conv_logits(u) + 3) / 6)


def clamped(net, u):
    return u * torch.clamp(net.conv_logits(u) * 0.2 + 0.5, 0, 1)


def functional_layers(net, u):
    z = F.linear(u.sum((2, 3)) / 64, net.reduce.weight, net.reduce.bias).relu()
    return u * image_gate(F.linear(z, net.expand.weight, net.expand.bias))


def activation_between(net, u):
    """The squeeze reads the map before an activation, the multiply the one after it."""
    return u.relu() * net.conv_logits(u).sigmoid()


FC = ("reduce", "expand")
CONV = ("conv_reduce", "conv_expand")
WAYS = {
    steps: (FC, 1, "sigmoid"),
    gate_first: (CONV, 0, "sigmoid"),
    expand_as: (CONV, 1, "sigmoid"),
    expanded_gate_first: (CONV, 0, "sigmoid"),
    in_place: (FC, 1, "sigmoid"),
    augmented: (CONV, 1, "sigmoid"),
    function: (CONV, 1, "sigmoid"),
    hard: (CONV, 1, "hardsigmoid"),
    relu6: (CONV, 1, "hardtanh"),
    clamped: (CONV, 1, "clamp"),
    functional_layers: (FC, 1, "sigmoid"),
    activation_between: (CONV, 1, "sigmoid"),
}


@pytest.mark.parametrize("facts", ALL.values(), ids=ALL)
def test_sites_are_the_hand_known_ones(facts):
    sites = find_sites(facts.build(), facts.images())
    assert {s.name: (s.channels, s.hidden, s.reduce, s.expand) for s in sites} == facts.sites


def test_sites_name_the_layer_that_makes_the_features():
    residual = find_sites(RESIDUAL.build(), RESIDUAL.images())
    assert [s.features for s in residual] == ["blocks.0.conv2", "blocks.1.conv2"]
    assert [s.owner for s in residual] == ["blocks.0.se", "blocks.1.se"]
    depthwise = find_sites(ALL["depthwise"].build(), ALL["depthwise"].images())
    assert [s.features for s in depthwise] == ["blocks.0.pw", "blocks.1.pw"]
    (functional,) = find_sites(ALL["functional"].build(), ALL["functional"].images())
    # The network itself multiplies: first x · sigmoid(x), then the gate.
    assert (functional.features, functional.owner, functional.multiply) == ("conv1", "", 1)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_gate_is_found_however_it_is_written(way):
    (reduce, expand), operand, activation = WAYS[way]
    (site,) = find_sites(Gated(way), IMAGE)
    assert (site.reduce, site.expand, site.gate_operand) == (reduce, expand, operand)
    assert (site.channels, site.hidden, site.features) == (6, 2, "conv")
    assert (site.owner, site.multiply, site.gate_activation) == (
        "",
        1 if way is clamped else 0,
        activation,
    )


def test_a_gate_of_one_layer_has_no_hidden_units():
    (site,) = find_sites(Gated(lambda net, u: u * image_gate(net.one(u.mean((2, 3))))), IMAGE)
    assert (site.reduce, site.expand, site.hidden, site.channels) == (None, "one", 0, 6)


class Blocks(nn.Module):
    """An SE module of any kind after a convolution."""

    def __init__(self, se):
        super().__init__()
        self.conv, self.se = nn.Conv2d(3, 6, 3, padding=1), se

    def forward(self, x):
        return self.se(self.conv(x))


@pytest.mark.parametrize("se", [ConvSE(6, 2), LinearSE(6, 2)], ids=["conv", "linear with views"])
def test_a_module_of_its_own_names_its_site(se):
    (site,) = find_sites(Blocks(se), IMAGE)
    assert (site.name, site.owner, site.channels, site.hidden) == ("se", "se", 6, 2)


def test_a_shared_module_is_a_site_each_time_it_runs():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.se = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), ConvSE(6, 2)

        def forward(self, x):
            return self.se(self.b(self.se(self.a(x))))

    sites = find_sites(Twice(), IMAGE)
    assert [(s.name, s.owner, s.call, s.features) for s in sites] == [
        ("se", "se", 0, "a"),
        ("se#2", "se", 1, "b"),
    ]


# What is no gate. Each pair differs in the one thing that makes a gate of it.


def spatial(net, u):
    """CBAM's second half: one value per position, pooled over channels."""
    return u * net.conv_reduce(u).mean(1, keepdim=True).sigmoid()


def learned(net, u):
    return u * net.scale.view(1, -1, 1, 1)


def learned_gate(net, u):
    return u * net.scale.sigmoid()[None, :, None, None]


def maps(net, u):
    return u * (u + 1)


def swish(net, u):
    return u * u.sigmoid()


def unpooled(net, u):
    return u * net.conv_expand(net.conv_reduce(u).relu()).sigmoid()


def no_layer(net, u):
    return u * u.mean((2, 3), keepdim=True).sigmoid()


def no_activation(net, u):
    return u * net.conv_logits(u)


def other_map(net, u):
    """A gate that another map's squeeze computes (here: one that a convolution has changed since)."""
    return net.conv_expand(net.conv_reduce(u)) * net.conv_logits(u).sigmoid()


def by_position(net, u):
    """A gate that differs from position to position, though pooled values are all that it depends on."""
    return u * (net.conv_logits(u).sigmoid() * net.where)


def scalar(net, u):
    return u * 0.5


def two_vectors(net, u):
    logits = net.logits(u)
    return logits * logits.sigmoid()


NO_GATES = (
    spatial,
    learned,
    learned_gate,
    maps,
    swish,
    unpooled,
    no_layer,
    no_activation,
    other_map,
    by_position,
    scalar,
    two_vectors,
)


@pytest.mark.parametrize("way", NO_GATES, ids=lambda way: way.__name__)
def test_no_site_is_invented(way):
    """The positive control is in the same network: with a real gate after it, that one alone is found."""
    net = Gated(way)
    if way not in {no_activation, two_vectors}:
        assert find_sites(Gated(lambda n, u: gate_first(n, way(n, u))), IMAGE) != ()
    assert find_sites(net, IMAGE) == ()


class LayerScaled(nn.Module):
    """A residual block with LayerScale and, if asked, a gate."""

    def __init__(self, gate):
        super().__init__()
        self.conv, self.se = nn.Conv2d(3, 3, 3, padding=1), ConvSE(3, 1) if gate else nn.Identity()
        self.gamma = nn.Parameter(1e-6 * torch.ones(3, 1, 1))

    def forward(self, x):
        return x + self.gamma * self.se(self.conv(x))


def test_layer_scale_is_no_gate():
    assert find_sites(LayerScaled(gate=False), IMAGE) == ()
    assert [s.name for s in find_sites(LayerScaled(gate=True), IMAGE)] == ["se"]


class Cbam(nn.Module):
    """CBAM: a channel gate (shared layers on average and maximum), then a spatial gate."""

    def __init__(self, channel):
        super().__init__()
        self.channel = channel
        self.conv = nn.Conv2d(3, 6, 1)
        self.reduce, self.expand = nn.Conv2d(6, 2, 1), nn.Conv2d(2, 6, 1)
        self.spatial = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x):
        u = self.conv(x)
        if self.channel:
            pooled = F.adaptive_avg_pool2d(u, 1), F.adaptive_max_pool2d(u, 1)
            u = u * sum(self.expand(self.reduce(p).relu()) for p in pooled).sigmoid()
        both = torch.cat([u.mean(1, keepdim=True), u.amax(1, keepdim=True)], 1)
        return u * self.spatial(both).sigmoid()


def test_the_spatial_gate_of_cbam_is_no_site_but_its_channel_gate_is():
    assert find_sites(Cbam(channel=False), IMAGE) == ()
    (site,) = find_sites(Cbam(channel=True), IMAGE)
    assert (site.reduce, site.expand, site.channels) == ("reduce", "expand", 6)


SE_CLASSES = {"SEBlock", "SEModule", "SqueezeExcite", "SqueezeExcitation"}
LIBRARIES = {
    "timm:mobilenetv3_small_050": 9,
    "timm:legacy_seresnet18": 8,
    "timm:regnety_002": 13,
    "timm:ghostnet_050": 7,
    "torchvision:mobilenet_v3_small": 9,
}


@pytest.mark.parametrize(("name", "count"), LIBRARIES.items(), ids=LIBRARIES)
def test_libraries_have_a_site_for_every_se_module(name, count):
    library, _, short = name.partition(":")
    model = timm.create_model(short) if library == "timm" else models.get_model(short, weights=None)
    modules = [n for n, m in model.named_modules() if type(m).__name__ in SE_CLASSES]
    sites = find_sites(model, torch.randn(1, 3, 64, 64))
    assert len(modules) == count
    assert [s.name for s in sites] == modules


@pytest.mark.parametrize(
    ("name", "count"),
    [("se_resnet20", 9), ("resnet20", 0), ("se_mobilenet_x025", 13), ("mobilenet_x025", 0)],
)
def test_the_zoo_has_sites_where_its_names_say_so(name, count):
    model = build(ArchSpec(ref=f"zoo:{name}"))
    modules = [n for n, m in model.named_modules() if type(m).__name__ in SE_CLASSES]
    assert [s.name for s in find_sites(model, torch.randn(1, 1, 28, 28))] == modules
    assert len(modules) == count


@pytest.mark.parametrize("name", ["resnet10t"])
def test_libraries_without_se_have_no_site(name):
    assert find_sites(timm.create_model(name), torch.randn(1, 3, 64, 64)) == ()


def test_batch_size_and_input_size_do_not_change_the_sites():
    model = RESIDUAL.build()
    one = find_sites(model, torch.randn(1, 3, 8, 8))
    assert one == find_sites(model, torch.randn(3, 3, 8, 8)) == find_sites(model, torch.randn(2, 3, 16, 12))
    assert len(one) == 2


def test_the_model_is_left_as_it_was():
    model = RESIDUAL.build().train()
    model.blocks[0].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    example = RESIDUAL.images(2)
    copy = example.clone()
    find_sites(model, example)
    assert [m.training for m in model.modules()] == modes
    assert True in modes
    assert False in modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(example, copy)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_failing_forward_leaves_no_hook_and_no_mode():
    model = RESIDUAL.build().train()

    def fail(*_):
        raise ZeroDivisionError

    handle = model.blocks[1].se.reduce.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        find_sites(model, RESIDUAL.images())
    handle.remove()
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(find_sites(model, RESIDUAL.images())) == 2
