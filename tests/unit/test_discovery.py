"""Gate sites from the graph: every spelling of a gate, what is left alone and why, and taps at all of them."""

import math
import weakref

import pytest
import torch
from torch import nn

from se_prune.gates.bounds import bounds_of
from se_prune.gates.sites import discover, explain, find_sites
from se_prune.gates.statistics import Collector
from se_prune.gates.tap import constant_gates, tap
from se_prune.gates.trace import trace
from se_prune.records import GateSite, LeftAlone
from se_prune.schema import from_dict, from_json, to_dict, to_json
from tests.nets import RESIDUAL, ConvSE
from tests.spelled import IMAGE, LOOKALIKES, ONE, ORDINARY, WAYS, C, Spelled, mean

POSITIONS = pytest.mark.parametrize("images", [IMAGE, ONE], ids=["8×8 positions", "1 position"])


@POSITIONS
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_gate_is_found_however_it_is_written(way, images):
    found = discover(Spelled(way.forward), images)
    (site,) = found.sites
    assert (site.kind, site.squeeze, site.hidden) == (way.kind, way.squeeze, way.hidden)
    assert (site.reduce, site.expand) == way.layers
    assert (site.gate_activation, site.scale, site.channels) == (way.activation, way.scale, C)
    if images is IMAGE:
        assert site.features == way.features
        assert len(found.left_alone) == (way is WAYS["in a larger attention module"])


def run(net, images, sites=(), on_gate=lambda *_: None):
    with torch.no_grad(), tap(net.eval(), sites, on_gate):
        return net(images)


@POSITIONS
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_tap_reads_and_replaces_every_gate(way, images):
    net, seen = Spelled(way.forward), []
    sites = find_sites(net, images)
    plain = run(net, images)
    assert torch.equal(run(net, images, sites, lambda _, __, s: s.clone()), plain)
    run(net, images, sites, lambda _, u, s: seen.append((u.shape, s)))
    ((shape, gate),) = seen
    assert shape == (2, C, *images.shape[2:])
    assert gate.shape == (2, C, 1, 1)
    assert 0 <= gate.min() <= gate.max() <= sites[0].scale
    closed = run(net, images, sites, constant_gates({sites[0].name: torch.full((C,), 0.9)}))
    assert not torch.allclose(closed, plain, atol=1e-4)


@pytest.mark.parametrize(("way", "reason"), LOOKALIKES.values(), ids=LOOKALIKES)
def test_what_looks_like_a_gate_is_left_alone_with_the_reason(way, reason):
    found = discover(Spelled(way), IMAGE)
    assert found.sites == ()
    assert {a.reason for a in found.left_alone if reason in a.reason}
    assert len({a.reason for a in found.left_alone}) == 1
    assert all(a.name == "" and math.prod(a.shape) >= C * 64 for a in found.left_alone)


@pytest.mark.parametrize("name", LOOKALIKES)
def test_no_lookalike_becomes_a_site_on_a_map_of_one_position(name):
    """But that a pool of any extent is a squeeze where there is one position to pool."""
    found = discover(Spelled(LOOKALIKES[name][0]), ONE)
    assert len(found.sites) == (name == "gather-excite of a small extent")
    assert bool(found.left_alone) != bool(found.sites)


@POSITIONS
@pytest.mark.parametrize("way", ORDINARY.values(), ids=ORDINARY)
def test_ordinary_multiplies_are_not_even_mentioned(way, images):
    """The positive control: with a gate after it, that one is found."""
    found = discover(Spelled(way), images)
    assert (found.sites, found.left_alone) == ((), ())
    if way is not ORDINARY["two vectors"]:
        assert len(find_sites(Spelled(lambda n, u: WAYS["doubled"].forward(n, way(n, u))), images)) == 1


class Halves(nn.Module):
    """Two halves of a map, each of which may have its own gate or the other's."""

    def __init__(self, swapped):
        super().__init__()
        self.swapped = swapped
        self.conv, self.a, self.b = nn.Conv2d(3, 8, 1), ConvSE(4, 2), ConvSE(4, 2)

    def forward(self, x):
        u, v = self.conv(x).chunk(2, 1)
        if self.swapped:
            u, v = u * self.gate(self.a, v), v * self.gate(self.b, u)
        else:
            u, v = self.a(u), self.b(v)
        return torch.cat([u, v], 1)

    def gate(self, se, pooled):
        return se.sigmoid(se.expand(se.relu(se.reduce(se.squeeze(pooled)))))


def test_the_parts_of_a_split_are_different_maps():
    assert [s.name for s in find_sites(Halves(swapped=False), IMAGE)] == ["a", "b"]
    swapped = discover(Halves(swapped=True), IMAGE)
    assert swapped.sites == ()
    assert len(swapped.left_alone) == 2


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("whole", [True, False], ids=["the whole network", "its SE block"])
def test_gates_in_scripted_code_are_seen_and_left_alone(whole):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), ConvSE(4, 2)).eval()
    assert len(find_sites(net, IMAGE)) == 1
    if whole:
        net = torch.jit.script(net)
    else:
        net[1] = torch.jit.script(net[1])
    found = discover(net, IMAGE)
    assert found.sites == ()
    assert ["scripted code" in a.reason for a in found.left_alone] == [True]


def test_a_gate_interpolated_with_weights_is_found_too():
    """Replaced by itself it differs by rounding: the weights of one value do not add up to exactly 1."""
    net = Spelled(
        lambda n, u: u * nn.functional.interpolate(n.logits(mean(u)).sigmoid(), size=8, mode="bilinear")
    )
    (site,) = find_sites(net, IMAGE)
    same = run(net, IMAGE, [site], lambda _, __, s: s.clone())
    assert torch.allclose(same, run(net, IMAGE), atol=1e-6)


def test_a_scale_after_the_multiply_stays_in_the_network():
    net = Spelled(WAYS["a gain after it"].forward)
    (site,) = find_sites(net, IMAGE)
    ones = run(net, IMAGE, [site], lambda _, __, s: torch.ones_like(s))
    with torch.no_grad():
        assert torch.equal(ones, 2.0 * net.conv(IMAGE))


def test_a_scaled_gate_fills_the_histogram_over_its_scale():
    net = Spelled(WAYS["doubled"].forward)
    (site,) = find_sites(net, IMAGE)
    assert site.scale == 2
    collector = Collector([site], 1, torch.device("cpu"))
    collector.begin(torch.zeros(2, dtype=torch.long))
    gate = torch.tensor([0.1, 1.0, 1.98, 0.1, 1.0, 1.98]).view(1, C, 1, 1).expand(2, C, 1, 1)
    collector.on_gate(site, torch.ones(2, C, 3, 3), gate)
    sums = collector.result()[site.name]
    assert sums.histogram.argmax(1).tolist() == [5, 50, 99] * 2
    assert torch.allclose(
        sums.s[0], 2 * gate[0, :, 0, 0].double()
    )  # the sums are of the gate as it multiplies


def test_activations_are_dropped_as_in_plain_inference():
    """The trace of a deep network must not hold every map."""
    net, refs, alive = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(6))), [], []

    def note(_, __, out):
        alive.append(sum(ref() is not None for ref in refs))
        refs.append(weakref.ref(out))

    for layer in net:
        layer.register_forward_hook(note)
    discover(net, IMAGE)
    assert alive == [0, 1, 1, 1, 1, 1]  # the input of the layer that has just run


def test_every_node_of_a_walk_is_visited_once():
    """A chain of sums that each read the one before twice has 2^n paths."""

    def way(net, u):
        for _ in range(60):
            u = u + u.relu()
        gate = mean(u)
        for _ in range(20):
            gate = gate + gate.relu()
        return u * net.logits(gate).sigmoid()

    assert len(find_sites(Spelled(way), IMAGE)) == 1


def explained(name):
    (site,) = find_sites(Spelled(WAYS[name].forward), IMAGE)
    return explain(site)


def test_a_gate_applied_by_einsum_is_left_alone_for_that_reason():
    def way(net, u):
        return torch.einsum("nchw,nc->nchw", u, net.logits(u.mean((2, 3), keepdim=True)).sigmoid()[..., 0, 0])

    found = discover(Spelled(way), IMAGE)
    assert found.sites == ()
    assert "einsum" in found.left_alone[0].reason


def test_a_second_call_is_explained_like_the_first():
    block = RESIDUAL.build().blocks[0]
    first, second = find_sites(nn.Sequential(nn.Conv2d(3, 4, 1), block, block), RESIDUAL.images())
    assert second.name == f"{first.name}#2"
    assert "→ reduce (2 hidden) → expand → sigmoid" in explain(first)
    assert "→ reduce (2 hidden) → expand → sigmoid" in explain(second)
    assert "multiplied in" not in explain(second)


def test_a_site_is_explained_in_one_line():
    assert explained("after an activation") == (
        "avg squeeze → reduce (2 hidden) → expand → sigmoid, × conv, multiplied in the network itself"
    )
    assert explained("ECA").startswith("avg squeeze → along along the channels → sigmoid, ×")
    assert "→ 2·sigmoid, ×" in explained("doubled")
    assert "× a map of 6 channels, multiplied" in explained("on a concatenation")
    assert explained("raw parameters").startswith(
        "avg squeeze → parameters of the network itself (2 hidden) → parameters of the network itself → sigmoid"
    )
    first, _ = find_sites(RESIDUAL.build(), RESIDUAL.images())
    assert explain(first) == "avg squeeze → reduce (2 hidden) → expand → sigmoid, × blocks.0.conv2"


def test_sites_written_before_they_had_a_kind_still_read_equal():
    (site, _) = find_sites(RESIDUAL.build(), RESIDUAL.images())
    old = {k: v for k, v in to_dict(site).items() if k not in {"kind", "squeeze", "scale"}}
    assert from_dict(GateSite, old) == site
    (eca,) = find_sites(Spelled(WAYS["ECA"].forward), IMAGE)
    assert from_json(GateSite, to_json(eca)) == eca
    left = LeftAlone(name="a", shape=(3, 2, 2), reason="b")
    assert from_json(LeftAlone, to_json(left)) == left


CHAINS = {
    "sigmoid": (lambda z: z.sigmoid(), (0, 1)),
    "relu6 over 6": (lambda z: nn.functional.relu6(z + 3) / 6, (0, 1)),
    "one minus": (lambda z: 1 - z.sigmoid() / 2, (0.5, 1)),
    "minus one": (lambda z: z.tanh() - 1, (-2, 0)),
    "negative factor": (lambda z: -3 * z.sigmoid(), (-3, 0)),
    "clamp below": (lambda z: z.clamp(min=-1), (-1, math.inf)),
    "clamp above": (lambda z: z.clamp(max=2), (-math.inf, 2)),
    "both": (lambda z: z.clamp(0, 1).clamp_max(0.5), (0, 0.5)),
    "product": (lambda z: z.sigmoid() * (z * 2).sigmoid(), (0, 1)),
    "alpha": (lambda z: torch.add(z.sigmoid(), z.sigmoid(), alpha=5), (-math.inf, math.inf)),
    "reciprocal": (lambda z: (1 + z.exp()).reciprocal(), (0, 1)),
    "over zero": (lambda z: 1 / z.sigmoid(), (-math.inf, math.inf)),
    "softmax": (lambda z: z.softmax(1), (0, 1)),
    "joined": (lambda z: torch.cat([z.sigmoid(), z.tanh()], 1), (-1, 1)),
    "softplus": (nn.functional.softplus, (0, math.inf)),
    "unknown": (lambda z: z.sigmoid().cumsum(0), (-math.inf, math.inf)),
}


@pytest.mark.parametrize(("chain", "expected"), CHAINS.values(), ids=CHAINS)
def test_bounds_are_those_of_the_operations(chain, expected):
    class Chain(nn.Module):
        def forward(self, x):
            return chain(x)

    images = 4 * IMAGE
    record, known = trace(Chain(), images), []
    for node in record.nodes:
        known.append(bounds_of(node, known))
    assert known[-1] == pytest.approx(expected)
    value = chain(images)
    assert known[-1][0] <= value.min() <= value.max() <= known[-1][1]
