"""Gate sites do not depend on how the parts of a gate are spelled, nor on what stands around it."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from se_prune.gates.sites import discover
from se_prune.gates.tap import constant_gates, tap
from tests.spelled import IMAGE, ONE, C, Spelled

IMAGES = {"image": IMAGE, "one": ONE}
SQUEEZES = {
    "avg": [
        lambda u: u.mean((2, 3)),
        lambda u: u.mean((-1, -2), keepdim=True).flatten(1),
        lambda u: u.mean(3).mean(2),
        lambda u: u.reshape(*u.shape[:2], -1).mean(2),
        lambda u: F.adaptive_avg_pool2d(u, 1).squeeze(3).squeeze(2),
        lambda u: F.avg_pool2d(u, u.shape[2:]).view(u.shape[:2]),
        lambda u: u.sum(2).sum(2) / (u.shape[2] * u.shape[3]),
        lambda u: u.permute(0, 2, 3, 1).mean((1, 2)),
    ],
    "max": [
        lambda u: u.amax((2, 3)),
        lambda u: F.adaptive_max_pool2d(u, 1).flatten(1),
        lambda u: u.flatten(2).max(2)[0],
    ],
}  # fmt: skip
GATES = [
    torch.sigmoid,
    F.hardsigmoid,
    lambda z: F.relu6(z + 3) * (1 / 6),
    lambda z: (z / 6 + 0.5).clamp(0, 1),
    lambda z: 1 - (-z).sigmoid(),
    lambda z: (z.tanh() + 1) / 2,
    lambda z: z.sigmoid() * z.sigmoid(),
]
HIDDEN = [F.relu, F.silu, F.gelu, torch.tanh, lambda z: z * z.sigmoid(), lambda z: z]
AROUND = [lambda u: u, F.relu, lambda u: u * u.sigmoid(), lambda u: F.hardtanh(u, -2, 2), lambda u: 0.5 * u]
SHAPES = [
    lambda s, _: s[:, :, None, None],
    lambda s, u: s.view(len(u), -1, 1, 1).expand_as(u),
    lambda s, u: s.unsqueeze(2).unsqueeze(3).repeat(1, 1, *u.shape[2:]),
    lambda s, u: F.interpolate(s[..., None, None], size=u.shape[2:]),
]
MULTIPLIES = [lambda u, s: u * s, lambda u, s: s * u, torch.mul, lambda u, s: u.clone().mul_(s)]


@st.composite
def ways(draw):
    """Draw a gate: the squeezes that are added, what stands between, and what is multiplied how."""
    kinds = draw(st.sets(st.sampled_from(sorted(SQUEEZES)), min_size=1))
    pools = [draw(st.sampled_from(SQUEEZES[kind])) for kind in sorted(kinds)]
    parts = [
        draw(st.sampled_from(options)) for options in (HIDDEN, GATES, AROUND, AROUND, SHAPES, MULTIPLIES)
    ]
    return kinds, pools, parts


def network(pools, parts, pooled=lambda _, u: u):
    hidden, gate, seen, scaled, shape, multiply = parts

    def way(net, u):
        z = sum(pool(seen(pooled(net, u))) for pool in pools)
        s = gate(net.fc2(hidden(net.fc1(z))))
        return multiply(scaled(u), shape(s, u))

    return Spelled(way).eval()


@settings(max_examples=60, deadline=None)
@given(ways(), st.sampled_from(["image", "one"]))
def test_any_composition_is_one_site_that_a_tap_reaches(drawn, size):
    kinds, pools, parts = drawn
    images = IMAGES[size]
    net = network(pools, parts)
    found = discover(net, images)
    (site,) = found.sites
    assert (site.reduce, site.expand, site.channels, site.hidden) == ("fc1", "fc2", C, 2)
    assert (site.squeeze, site.kind, site.scale) == ("+".join(sorted(kinds)), "se", 1.0)
    assert found.left_alone == ()
    with torch.no_grad():
        plain = net(images)
        with tap(net, [site], lambda _, __, s: s.clone()):
            assert torch.equal(net(images), plain)
        with tap(net, [site], constant_gates({site.name: torch.zeros(C)})):
            assert not net(images).any()
    assert plain.any()


@settings(max_examples=30, deadline=None)
@given(ways(), st.sampled_from(["image", "one"]))
def test_the_same_composition_on_another_map_is_none(drawn, size):
    _, pools, parts = drawn
    found = discover(network(pools, parts, pooled=lambda net, u: net.other(u)), IMAGES[size])
    assert found.sites == ()
    assert len(found.left_alone) == 1
