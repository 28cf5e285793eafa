"""Folding: the folded network equals the one whose gates are constants, and nothing of the SE block is left."""

import copy
from collections import Counter
from dataclasses import replace

import onnx
import pytest
import torch
from torch import nn

from se_prune.artifact import Network
from se_prune.errors import SurgeryError
from se_prune.export import export
from se_prune.gates.sites import find_sites
from se_prune.gates.tap import constant_gates, tap
from se_prune.gates.trace import trace
from se_prune.records import ArchSpec, ArtifactHeader, Preprocessing, SitePlan
from se_prune.surgery.cut import cut, verify
from se_prune.surgery.fold import find_ways, fold, kept_constants
from se_prune.zoo.registry import build, default_preprocessing
from tests.built import built, examine, lively, random_plan
from tests.nets import ALL, ConvSE

#: Network to how often each way is taken.
NETWORKS = {
    "residual": {"maker": 2},
    "depthwise": {"maker": 2},
    "zoo:se_resnet20": {"maker": 9},
    "zoo:se_mobilenet_x025": {"maker": 13},
    "zoo:moskomule_se_resnet20": {"maker": 9},
    "timm:legacy_seresnet18": {"maker": 8},
    "timm:regnety_002": {"maker": 13},
    "timm:mobilenetv3_small_050": {"consumer": 8, "maker": 1},
    "timm:efficientnet_b0": {"consumer": 16},
    "torchvision:mobilenet_v3_small": {"consumer": 8, "maker": 1},
}


def opened(name):
    """Return a network in float64 with lively weights, and images for it."""
    torch.manual_seed(0)
    if name in ALL:
        model, preprocessing = ALL[name].build(), ALL[name].preprocessing
    else:
        model = build(ArchSpec(ref=name))
        preprocessing = default_preprocessing(ArchSpec(ref=name), model)
        if "Joined" in name:
            preprocessing = Preprocessing(input_size=(3, 8, 8), mean=(0.0,) * 3, std=(1.0,) * 3)
        elif not name.startswith("zoo:"):
            preprocessing = Preprocessing(input_size=(3, 48, 48), mean=(0.0,) * 3, std=(1.0,) * 3)
    images = torch.randn(2, *preprocessing.input_size, dtype=torch.float64)
    return lively(model, preprocessing).double(), images


def some(sites, seed=0):
    """Return a constant per channel of each site, some of them 0."""
    generator = torch.Generator().manual_seed(seed)
    return {
        site.name: torch.rand(site.channels, generator=generator, dtype=torch.float64).sub(0.05).clamp(0)
        for site in sites
    }


@torch.no_grad()
def run(model, images, sites=(), constants=None):
    with tap(model, sites, constant_gates(constants or {})):
        return model.eval()(images)


def gap(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_folded_network_equals_its_twin_with_constant_gates(name):
    model, images = opened(name)
    sites = find_sites(model, images)
    ways = find_ways(model, images, sites)
    assert (Counter(way.kind for way in ways.found.values()), ways.refused) == (NETWORKS[name], {})
    constants, before = some(sites), copy.deepcopy(model.state_dict())
    folded, kinds = fold(model, images, constants)
    twin = run(model, images, sites, constants)
    assert gap(run(folded, images), twin) <= 1e-9
    assert gap(run(model, images), twin) > 1e-3  # the controls: gates matter, and so do the constants
    assert gap(run(fold(model, images, some(sites, 1))[0], images), twin) > 1e-3
    assert set(kinds) == {site.owner for site in sites}
    assert find_sites(folded, images) == ()
    ran = {node.module for node in trace(folded, images).nodes}
    assert not {m for m in ran if m.startswith(tuple(f"{site.owner}." for site in sites))}
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_every_site_can_be_folded_alone():
    model, images = opened("timm:mobilenetv3_small_050")
    sites = find_sites(model, images)
    constants = some(sites)
    for site in sites[::3]:
        one = {site.name: constants[site.name]}
        folded, _ = fold(model, images, one)
        assert gap(run(folded, images), run(model, images, sites, one)) <= 1e-9
        assert [s.name for s in find_sites(folded, images)] == [s.name for s in sites if s is not site]


class Around(nn.Module):
    """A convolution, something, SE, something, a convolution; and whatever `forward` of a test does with them."""

    def __init__(self, before=None, after=None, use=None, groups=1):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.before, self.after = before or nn.Identity(), after or nn.Identity()
        self.se = ConvSE(4, 2)
        self.last = nn.Conv2d(4, 4, 3, padding=1, groups=groups)
        self.use = use

    def forward(self, x):
        if self.use is not None:
            return self.use(self, x)
        return self.last(self.after(self.se(self.before(self.first(x)))))


def also_outside(net, x):
    u = net.first(x)
    return net.last(net.se(u)) + u


def overwritten(net, x):
    u = net.first(x).relu()
    v = net.se(u)
    v += 1
    return net.last(v)


def twice_read(net, x):
    u = torch.nn.functional.silu(net.first(x))
    v = net.se(u)
    return net.last(v) + v


def on_a_sum(net, x):
    v = net.se(net.first(x) + x[:, :1])
    return net.last(v).relu_() + v


def shared_layer(net, x):
    return net.last(net.se(net.first(x))) + net.first(x)


def overwritten_elsewhere(net, x):
    u = torch.nn.functional.silu(net.first(x))
    v = net.se(u).relu_()
    return net.last(v) + u


WAYS = {
    "a convolution": (Around(), "maker", "first"),
    "ReLU": (Around(nn.ReLU(inplace=True)), "maker", "first"),
    "leaky ReLU": (Around(nn.LeakyReLU(0.1)), "maker", "first"),
    "PReLU": (Around(nn.PReLU(4)), "maker", "first"),
    "BN and pooling": (Around(nn.Sequential(nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.Dropout())), "maker", "before.0"),
    "BN without scale": (Around(nn.BatchNorm2d(4, affine=False)), "consumer", "last"),
    "SiLU": (Around(nn.SiLU()), "consumer", "last"),
    "ReLU6": (Around(nn.ReLU6()), "consumer", "last"),
    "SiLU, then ReLU": (Around(nn.SiLU(), nn.ReLU()), "consumer", "last"),
    "two groups": (Around(nn.SiLU(), groups=2), "consumer", "last"),
    "a depthwise reader": (Around(nn.SiLU(), groups=4), "consumer", "last"),
    "SiLU on both sides": (Around(nn.SiLU(), nn.SiLU()), "scale", "se"),
    "u read elsewhere": (Around(use=also_outside), "consumer", "last"),
    "v overwritten": (Around(use=overwritten), "scale", "se"),
    "v read twice": (Around(use=twice_read), "scale", "se"),
    "a sum": (Around(use=on_a_sum), "scale", "se"),
    "a layer that runs twice": (Around(use=shared_layer), "consumer", "last"),
    "v overwritten, u read elsewhere": (Around(use=overwritten_elsewhere), "scale", "se"),
}  # fmt: skip


@pytest.mark.parametrize("name", WAYS)
def test_constants_go_where_that_is_exact(name):
    torch.manual_seed(1)
    model, kind, layer = WAYS[name]
    model, images = copy.deepcopy(model).double(), torch.randn(3, 3, 6, 6, dtype=torch.float64)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    sites = find_sites(model.eval(), images)
    (way,) = find_ways(model, images, sites).found.values()
    assert (way.kind, way.layer) == (kind, layer)
    constants = some(sites)
    folded, kinds = fold(model, images, constants)
    assert kinds == {"se": "scale" if kind == "scale" else "identity"}
    assert gap(run(folded, images), run(model, images, sites, constants)) <= 1e-9
    assert gap(run(model, images), run(model, images, sites, constants)) > 1e-3
    folded.train()(images).sum().backward()  # what is left can be trained


def twice(net, x):
    return net.se(net.last(net.se(net.first(x))))


def test_a_block_that_runs_twice_is_refused():
    model, images = Around(use=twice), torch.randn(2, 3, 6, 6)
    sites = find_sites(model, images)
    ways = find_ways(model, images, sites)
    assert not ways.found
    assert set(ways.refused) == {site.name for site in sites}
    reason = "se runs more than once, and se.expand runs more than once"
    assert set(ways.refused.values()) == {reason}
    with pytest.raises(SurgeryError, match=f"cannot be folded: {reason}"):
        fold(model, images, {sites[0].name: torch.ones(4)})


@pytest.mark.parametrize(
    ("constants", "message"),
    [
        ({"blocks.0.s": torch.ones(4)}, r"no gate site 'blocks\.0\.s' \(did you mean 'blocks\.0\.se'"),
        ({"blocks.0.se": torch.ones(5)}, r"has 4 channels, got constants of shape \(5,\)"),
        ({"blocks.0.se": torch.tensor([1.0, -0.1, 1, 1])}, "at least 0"),
        ({"blocks.0.se": torch.tensor([1.0, torch.nan, 1, 1])}, "at least 0"),
    ],
)
def test_wrong_constants_are_refused(constants, message):
    model, images = opened("residual")
    with pytest.raises(SurgeryError, match=message):
        fold(model, images, constants)
    fold(model, images, {"blocks.0.se": torch.ones(4)})  # the control


def test_folding_in_float32_is_folding_in_float64_rounded():
    model, images = opened("timm:mobilenetv3_small_050")
    model = model.float()
    constants = some(find_sites(model, images.float()))
    single, _ = fold(model, images, constants)
    double, _ = fold(copy.deepcopy(model).double(), images, constants)
    state = double.state_dict()
    assert all(torch.equal(v, state[k].to(v.dtype)) for k, v in single.state_dict().items())
    assert {v.dtype for v in single.parameters()} == {torch.float32}


def with_folds(plan, sites, names, seed=0):
    constants = some(sites, seed)
    return replace(
        plan,
        sites=tuple(
            SitePlan(name=s.name, action="fold", loss=0.0, constants=tuple(constants[s.name].tolist()))
            if s.name in names
            else SitePlan(name=s.name, action="keep", loss=0.0)
            for s in sites
        ),
    )


class Joined(nn.Module):
    """SE on a concatenation, between activations: its constants stay in a depthwise convolution."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 6, 3, padding=1)
        self.se = ConvSE(10, 3)
        self.last, self.fc = nn.Conv2d(10, 5, 1), nn.Linear(5, 3)

    def forward(self, x):
        v = self.se(torch.cat([self.left(x), self.right(x)], 1))
        return self.fc(self.last(nn.functional.silu(v)).mean((2, 3)))


def network(name):
    if name != "joined":
        return built(name)
    torch.manual_seed(0)
    return examine(Joined(), Preprocessing(input_size=(3, 8, 8), mean=(0.0,) * 3, std=(1.0,) * 3))


@pytest.mark.parametrize("name", ["depthwise", "joined", "zoo:se_resnet20", "timm:mobilenetv3_small_050"])
def test_cut_and_folded_equals_the_masked_twin_with_constant_gates(name):
    found = network(name)
    plan = random_plan(found, "sparsity", 0.4)
    assert plan.channels_removed > 0
    names = [site.name for site in found.sites][::2]
    plan = with_folds(plan, found.sites, names)
    small = cut(found.model, found.example, plan)
    assert verify(found.model, small, found.couplings, plan, found.example, sites=found.sites) <= 1e-9
    folded, _ = fold(small, found.example, kept_constants(plan, found.sites, found.couplings))
    assert [s.name for s in find_sites(folded, found.example)] == [
        s.name for s in found.sites if s.name not in names
    ]
    # the control: constants of other channels are seen
    wrong = with_folds(plan, found.sites, names, seed=1)
    with pytest.raises(SurgeryError, match="differs from its masked twin"):
        verify(found.model, folded, found.couplings, replace(wrong, sites=()), found.example)


def test_what_folding_leaves_in_a_blocks_place_can_be_cut():
    found = network("joined")
    folded, kinds = fold(found.model, found.example, some(found.sites))
    assert kinds == {"se": "scale"}
    again = examine(folded, found.preprocessing)
    assert again.sites == ()
    plan = random_plan(again, "sparsity", 0.4)
    small = cut(folded, again.example, plan)
    assert small.se.in_channels < 10
    assert verify(folded, small, again.couplings, plan, again.example) <= 1e-9


def test_a_plan_of_another_network_is_refused():
    found = network("depthwise")
    plan = with_folds(random_plan(found, "sparsity", 0.3), found.sites, ["blocks.0.se"])
    short = replace(plan.sites[0], constants=(0.5,))
    for sites in ((replace(plan.sites[0], name="other"),), (short,)):
        with pytest.raises(SurgeryError, match="does not have in that size"):
            kept_constants(replace(plan, sites=sites), found.sites, found.couplings)
    assert set(kept_constants(plan, found.sites, found.couplings)) == {"blocks.0.se"}  # the control


def test_an_exported_folded_network_computes_the_same_without_any_gate(tmp_path):
    facts = ALL["depthwise"]
    model, images = opened("depthwise")
    model, images = model.float(), images.float()
    folded, kinds = fold(model, images, some(find_sites(model, images)))
    header = ArtifactHeader(arch=ArchSpec(ref="tiny"), preprocessing=facts.preprocessing, folded=kinds)
    result = export(Network(module=folded, header=header), "onnx", tmp_path / "folded.onnx", images)
    assert result.max_abs_diff < 1e-5
    operations = Counter(node.op_type for node in onnx.load(tmp_path / "folded.onnx").graph.node)
    assert operations["Conv"] == 5  # the stem, and two a block
    assert not {"Sigmoid", "Mul"} & set(operations)
