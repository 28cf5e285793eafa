"""Channel groups against those worked out by hand, and every way in which torch-pruning is not taken at its word."""

import pytest
import torch
from torch import nn

from se_prune.channels import IMPORTANCES, couplings, importance
from se_prune.errors import SurgeryError
from se_prune.gates.sites import find_sites
from se_prune.layers import layer_costs
from se_prune.records import LayerCost, LayerSlice
from se_prune.surgery.cut import cut, verify
from tests.coupled import IMAGES, Middle, groups_of, planned, structure
from tests.nets import ALL, DEPTHWISE, RESIDUAL

# first layer: (what makes the channels, what reads them, what maps each to itself, gate site)
LAYERS = {
    "residual": {
        "stem": (
            {"stem", *(f"blocks.{i}.{x}" for i in (0, 1) for x in ("conv2", "se.expand"))},
            {"fc", *(f"blocks.{i}.{x}" for i in (0, 1) for x in ("conv1", "se.reduce"))},
            {"bn", "blocks.0.bn2", "blocks.1.bn2"},
            None,
        ),
        "blocks.0.conv1": ({"blocks.0.conv1"}, {"blocks.0.conv2"}, {"blocks.0.bn1"}, None),
        "blocks.0.se.reduce": ({"blocks.0.se.reduce"}, {"blocks.0.se.expand"}, set(), "blocks.0.se"),
        "blocks.1.conv1": ({"blocks.1.conv1"}, {"blocks.1.conv2"}, {"blocks.1.bn1"}, None),
        "blocks.1.se.reduce": ({"blocks.1.se.reduce"}, {"blocks.1.se.expand"}, set(), "blocks.1.se"),
    },
    "depthwise": {
        "stem": ({"stem"}, {"blocks.0.pw"}, {"bn", "blocks.0.dw", "blocks.0.bn1"}, None),
        "blocks.0.pw": (
            {"blocks.0.pw", "blocks.0.se.fc.2"},
            {"blocks.0.se.fc.0", "blocks.1.pw"},
            {"blocks.0.bn2", "blocks.1.dw", "blocks.1.bn1"},
            "blocks.0.se",
        ),
        "blocks.0.se.fc.0": ({"blocks.0.se.fc.0"}, {"blocks.0.se.fc.2"}, set(), "blocks.0.se"),
        "blocks.1.pw": (
            {"blocks.1.pw", "blocks.1.se.fc.2"},
            {"blocks.1.se.fc.0", "fc"},
            {"blocks.1.bn2"},
            "blocks.1.se",
        ),
        "blocks.1.se.fc.0": ({"blocks.1.se.fc.0"}, {"blocks.1.se.fc.2"}, set(), "blocks.1.se"),
    },
    "functional": {
        "conv1": ({"conv1", "expand"}, {"reduce", "conv2"}, set(), "expand"),
        "reduce": ({"reduce"}, {"expand"}, set(), "expand"),
        "conv2": ({"conv2"}, {"fc"}, set(), None),
    },
}


@pytest.mark.parametrize("name", ALL)
def test_groups_are_the_hand_known_ones(name):
    facts = ALL[name]
    model, _, found = structure(facts)
    cuttable = [c for c in found if c.group.prunable]
    assert {c.group.name: (c.group.kind, c.group.channels) for c in cuttable} == facts.groups
    for coupling in cuttable:
        out, into, channelwise, site = LAYERS[name][coupling.group.name]
        assert set(coupling.layers("out")) == out
        assert set(coupling.layers("in")) == into
        assert set(coupling.layers("channelwise")) == channelwise
        assert set(coupling.group.members) == out | into | channelwise
        assert coupling.group.site == site
        assert coupling.group.reason is None
    order = list(dict(model.named_modules()))
    assert [c.group.name for c in found] == sorted((c.group.name for c in found), key=order.index)


@pytest.mark.parametrize("facts", ALL.values(), ids=ALL)
def test_the_output_layer_is_a_group_that_cannot_be_cut(facts):
    _, _, found = structure(facts)
    (refused,) = (c.group for c in found if not c.group.prunable)
    assert (refused.name, refused.channels, refused.reason) == ("fc", facts.classes, "output layer")


def test_every_slice_of_a_plain_group_maps_each_channel_to_itself():
    _, _, found = structure(RESIDUAL)
    (stream,) = (c for c in found if c.group.kind == "stream")
    assert len(stream.slices) == 13
    for piece in stream.slices:
        assert piece.index == piece.root == (0, 1, 2, 3)
    # plain records: nothing of torch-pruning's group objects is left in them
    assert all(type(v) is int for piece in stream.slices for v in (*piece.index, *piece.root))


class Flat(nn.Module):
    """2 channels of 3×3 positions flattened into a linear layer."""

    def __init__(self, activation=None):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 2, 6), activation or nn.ReLU()
        self.fc, self.out = nn.Linear(18, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(self.act(self.fc(self.conv(x).flatten(1))))


def test_a_flattened_channel_is_many_inputs():
    found = groups_of(Flat())
    assert found["conv"].slices == (
        LayerSlice(layer="conv", role="out", index=(0, 1), root=(0, 1)),
        LayerSlice(layer="fc", role="in", index=tuple(range(18)), root=(0,) * 9 + (1,) * 9),
    )
    assert found["fc"].group.prunable


def test_layers_with_parameters_that_cannot_be_cut_are_named():
    found = groups_of(Flat(nn.PReLU(5)))
    assert (found["fc"].group.prunable, found["fc"].group.reason) == (False, "act is a PReLU")
    assert found["conv"].group.prunable


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x):
        return x * self.gamma


def test_channels_of_all_groups_of_a_convolution_leave_together():
    found = groups_of(Middle(nn.Conv2d(4, 4, 3, padding=1, groups=2)))
    assert {k: (v.group.prunable, v.group.tied) for k, v in found.items()} == {
        "a": (True, 2),
        "middle": (True, 2),
        "b": (True, 1),
        "fc": (False, 1),
    }
    depthwise = groups_of(Middle(nn.Conv2d(4, 4, 3, padding=1, groups=4)))
    assert {k: v.group.prunable for k, v in depthwise.items()} == {"a": True, "b": True, "fc": False}
    assert depthwise["a"].layers("channelwise") == ("middle",)


def test_a_channel_multiplier_loses_outputs_alone():
    class Wide(Middle):
        def __init__(self):
            super().__init__(nn.Conv2d(4, 8, 3, padding=1, groups=4))
            self.b = nn.Conv2d(8, 6, 3)

    found = groups_of(Wide())
    assert found["a"].group.reason == "the groups of middle have one channel each"
    assert (found["middle"].group.prunable, found["middle"].group.tied) == (True, 4)
    assert found["b"].group.prunable


@pytest.mark.parametrize("gates", [1, 3])
def test_channels_that_a_gate_mixes_with_their_neighbours_are_refused(gates):
    class Along(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 5, 1), nn.Conv2d(5, 6, 1)
            self.mix = nn.ModuleList(nn.Conv1d(1, 1, 3, padding=1, bias=False) for _ in range(gates))
            self.fc = nn.Linear(6, 2)

        def forward(self, x):
            x = self.a(x)
            for mix in self.mix:
                gate = mix(x.mean((2, 3)).view(len(x), 1, -1)).sigmoid().view(len(x), -1, 1, 1)
                x = self.c(self.b(x).relu()) + x * gate.expand_as(x)
            return self.fc(x.mean((2, 3)))

    model = Along().eval()
    found = groups_of(model)
    assert found["a"].group.reason == "a gate's convolution along the channels mixes each with its neighbours"
    assert [name for name, c in found.items() if c.group.prunable] == ["b"]
    plan = planned(found, "b", (1, 3))
    assert verify(model, cut(model, IMAGES, plan), tuple(found.values()), plan, IMAGES) <= 1e-9


def test_bare_parameters_are_refused():
    found = groups_of(Middle(Scaled()))
    assert found["a"].group.reason == "a bare parameter depends on it"
    assert found["b"].group.prunable


def test_what_torch_pruning_cannot_trace_is_a_surgery_error():
    class Raises(Middle):
        def forward(self, x):
            raise KeyError("nothing goes here")

    with pytest.raises(SurgeryError, match=r"cannot trace this network \(KeyError: .*it cannot be cut"):
        couplings(Raises(nn.Identity()), IMAGES, ())
    assert couplings(Middle(nn.Identity()), IMAGES, ())


def test_the_network_is_left_as_it_was():
    model = RESIDUAL.build().train()
    model.blocks[0].eval()
    model.stem.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    gradients = [p.grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    sites = find_sites(model, RESIDUAL.images())
    found = couplings(model, RESIDUAL.images(), sites)
    random = torch.get_rng_state()
    for name in IMPORTANCES:
        importance(model, RESIDUAL.images(), name, seed=3, wanted=found[:2], sites=sites)
    assert torch.equal(random, torch.get_rng_state())
    assert [m.training for m in model.modules()] == modes
    assert {True, False} == set(modes) == set(flags)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(torch.equal(g, torch.ones_like(g)) for g in gradients)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_sizes_and_macs_of_every_layer():
    costs = layer_costs(RESIDUAL.build(), RESIDUAL.per_layer)
    assert costs["stem"] == LayerCost(
        in_channels=3, out_channels=4, weights=108, biases=0, macs=6912, channelwise=False
    )
    assert costs["bn"] == LayerCost(
        in_channels=4, out_channels=4, weights=4, biases=4, macs=0, channelwise=True
    )
    assert costs["fc"] == LayerCost(
        in_channels=4, out_channels=5, weights=20, biases=5, macs=20, channelwise=False
    )
    assert sum(c.weights + c.biases for c in costs.values()) == RESIDUAL.params
    assert sum(c.macs for c in costs.values()) == RESIDUAL.macs
    assert layer_costs(DEPTHWISE.build(), {})["blocks.1.dw"].channelwise
    assert not layer_costs(DEPTHWISE.build(), {})["blocks.1.pw"].channelwise


def test_norms_without_scale_and_shift_are_proven_too():
    model = Middle(nn.BatchNorm2d(4, affine=False)).eval()
    model.middle.running_mean.uniform_(1, 2)
    found = groups_of(model)
    plan = planned(found, "a", (0, 2))
    assert verify(model, cut(model, IMAGES, plan), tuple(found.values()), plan, IMAGES) <= 1e-9
