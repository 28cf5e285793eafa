"""Ways to write a channel gate, and things that look like one: each takes the network and the features `u`.

`Spelled` holds the layers that any of them may use, on maps of six channels. `IMAGE` makes maps of 8×8 positions,
`ONE` of a single one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

C = 6
IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ONE = IMAGE[:, :, :1, :1]


class Spelled(nn.Module):
    """A convolution, then a gate written in the way given."""

    def __init__(self, way: Callable[[Spelled, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.conv, self.other = nn.Conv2d(3, C, 1), nn.Conv2d(C, C, 1)
        self.reduce, self.expand, self.third = nn.Conv2d(C, 2, 1), nn.Conv2d(2, C, 1), nn.Conv2d(C, C, 1)
        self.bn = nn.BatchNorm2d(2)
        self.fc1, self.fc2 = nn.Linear(C, 2), nn.Linear(2, C)
        self.along, self.up = nn.Conv1d(1, 1, 3, padding=1), nn.Conv1d(1, 4, 1)
        self.down = nn.Conv1d(4, 1, 3, padding=1)
        self.w1, self.w2 = nn.Parameter(torch.randn(2, C)), nn.Parameter(torch.randn(C, 2))
        self.spatial, self.branches = nn.Conv2d(2, 1, 3, padding=1), nn.Conv2d(2, 2 * C, 1)
        self.one, self.joined = nn.Conv2d(C, 1, 1), nn.Conv2d(2 * C, C, 1)
        self.scale = nn.Parameter(torch.rand(C))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.way(self, self.conv(x))

    def logits(self, pooled: torch.Tensor) -> torch.Tensor:
        return self.expand(self.reduce(pooled).relu())


def mean(u: torch.Tensor) -> torch.Tensor:
    return u.mean((2, 3), keepdim=True)


def wide(gate: torch.Tensor) -> torch.Tensor:
    return gate[:, :, None, None]


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to write a gate and what is to be found in it."""

    forward: Callable[[Spelled, torch.Tensor], torch.Tensor]
    kind: str = "se"
    squeeze: str = "avg"
    layers: tuple[str | None, str] = ("reduce", "expand")
    hidden: int = 2
    activation: str = "sigmoid"
    scale: float = 1.0
    features: str | None = "conv"


def _rows(net, u):
    z = u.mean(-1).mean(-1)
    return u * wide(net.fc2(net.fc1(z).relu()).sigmoid())


def _eca(net, u):
    z = u.mean((2, 3)).view(len(u), 1, -1)
    return u * net.along(z).sigmoid().view(len(u), -1, 1, 1).expand_as(u)


def _eca_transposed(net, u):
    z = F.adaptive_avg_pool2d(u, 1).squeeze(-1).transpose(-1, -2)
    return u * net.along(z).transpose(-1, -2).unsqueeze(-1).sigmoid()


def _eca_mlp(net, u):
    z = u.mean((2, 3)).view(len(u), 1, -1)
    return u * net.down(net.up(z).relu()).sigmoid().view(len(u), -1, 1, 1)


def _cbam(net, u):
    return u * (net.logits(F.adaptive_avg_pool2d(u, 1)) + net.logits(F.adaptive_max_pool2d(u, 1))).sigmoid()


def _both_first(net, u):
    return u * net.logits(0.5 * mean(u) + 0.5 * u.amax((2, 3), keepdim=True)).sigmoid()


def _raw(net, u):
    z = F.linear(u.mean((2, 3)), net.w1).relu()
    return u * wide(F.linear(z, net.w2).sigmoid())


def _swish_after(net, u):
    """The squeeze reads the map before a hand-written swish, the multiply the one after it."""
    return (u * u.sigmoid()) * net.logits(mean(u)).sigmoid()


def _concatenated(net, u):
    both = torch.cat([u[:, :3].relu(), u[:, 3:]], 1)
    return both * net.logits(mean(both)).sigmoid()


def _pooled_apart(net, u):
    """The parts of a concatenation are pooled each by itself."""
    a, b = u.chunk(2, 1)
    a = a.relu()
    return torch.cat([a, b], 1) * net.logits(torch.cat([mean(a), mean(b)], 1)).sigmoid()


def _branch(net, u):
    v = net.other(u)
    return u + v * net.logits(mean(v)).sigmoid()


def _inside(net, u):
    """A channel gate inside a larger attention module, beside a spatial gate."""
    channel = u * net.logits(mean(u)).sigmoid()
    pooled = torch.cat([u.mean(1, keepdim=True), u.amax(1, keepdim=True)], 1)
    return channel + u * net.spatial(pooled).sigmoid()


def _coarse(net, u):
    """Pooled to a coarser map first."""
    return u * net.logits(mean(F.avg_pool2d(u, 2, ceil_mode=True))).sigmoid()


def _kernel(net, u):
    return u * net.logits(F.avg_pool2d(u, u.shape[2:])).sigmoid()


def _repeated(net, u):
    return u * net.logits(mean(u)).sigmoid().repeat(1, 1, *u.shape[2:])


def _interpolated(net, u):
    return F.interpolate(net.logits(mean(u)).sigmoid(), size=u.shape[2:]) * u


def _spread_first(net, u):
    return u * net.logits(mean(u)).expand_as(u).sigmoid()


def _written(net, u):
    return u * (1 / (1 + torch.exp(-net.logits(mean(u)))))


def _written_into(net, u):
    gate = net.logits(mean(u)).sigmoid().expand_as(u).clone()
    return gate.mul_(u)


def _gained(net, u):
    """NF-nets: a gain after the multiply belongs to the network, not to the gate."""
    return 2.0 * (u * net.logits(mean(u)).sigmoid())


HARD = {"activation": "hardtanh"}
WAYS = {
    "mean of rows, then of columns": Way(forward=_rows, layers=("fc1", "fc2")),
    "mean of a flat view": Way(
        forward=lambda n, u: u * wide(n.fc2(n.fc1(u.flatten(2).mean(-1)).relu()).sigmoid()),
        layers=("fc1", "fc2"),
    ),
    "average pool by kernel": Way(forward=_kernel),
    "a coarser map first": Way(forward=_coarse),
    "maximum": Way(forward=lambda n, u: u * n.logits(F.adaptive_max_pool2d(u, 1)).sigmoid(), squeeze="max"),
    "average and maximum, layers shared": Way(forward=_cbam, squeeze="avg+max"),
    "average and maximum, added first": Way(forward=_both_first, squeeze="avg+max"),
    "sum over area": Way(
        forward=lambda n, u: u * n.logits(u.sum((2, 3), keepdim=True) / u[0, 0].numel()).sigmoid()
    ),
    "BN and swish between": Way(forward=lambda n, u: u * n.expand(F.silu(n.bn(n.reduce(mean(u))))).sigmoid()),
    "raw parameters": Way(forward=_raw, layers=("", "")),
    "ECA": Way(forward=_eca, kind="eca", layers=(None, "along"), hidden=0),
    "ECA, transposed": Way(forward=_eca_transposed, kind="eca", layers=(None, "along"), hidden=0),
    "ECA of two layers": Way(forward=_eca_mlp, kind="eca", layers=("up", "down"), hidden=4),
    "effective SE": Way(
        forward=lambda n, u: u * F.hardsigmoid(n.third(mean(u))),
        kind="effective-se",
        layers=(None, "third"),
        hidden=0,
        activation="hardsigmoid",
    ),
    "relu6 over 6": Way(forward=lambda n, u: u * F.relu6(n.logits(mean(u)) + 3) / 6, **HARD, scale=6.0),
    "relu6 over 6 first": Way(forward=lambda n, u: u * (F.relu6(n.logits(mean(u)) + 3.0) / 6.0), **HARD),
    "relu6 over 6 in place": Way(
        forward=lambda n, u: u * n.logits(mean(u)).add_(3.0).clamp_(0.0, 6.0).div_(6.0), activation="clamp"
    ),
    "hardtanh": Way(forward=lambda n, u: u * F.hardtanh(n.logits(mean(u)), 0.0, 1.0), **HARD),
    "clip": Way(
        forward=lambda n, u: u * torch.clip(0.2 * n.logits(mean(u)) + 0.5, min=0, max=1), activation="clamp"
    ),
    "half of tanh + 1": Way(
        forward=lambda n, u: u * (0.5 * (n.logits(mean(u)).tanh() + 1)), activation="tanh"
    ),
    "exp": Way(forward=_written, activation="exp"),
    "doubled": Way(forward=lambda n, u: u * (2 * n.logits(mean(u)).sigmoid()), scale=2.0),
    "a gain after it": Way(forward=_gained),
    "repeated": Way(forward=_repeated),
    "interpolated": Way(forward=_interpolated),
    "expanded, then sigmoid": Way(forward=_spread_first),
    "written into the expanded gate": Way(forward=_written_into),
    "after an activation": Way(forward=lambda n, u: u.relu() * n.logits(mean(u)).sigmoid()),
    "after a hand-written swish": Way(forward=_swish_after),
    "before an activation": Way(forward=lambda n, u: F.silu(u * n.logits(mean(u)).sigmoid())),
    "on a concatenation": Way(forward=_concatenated, features=None),
    "on a concatenation pooled in parts": Way(forward=_pooled_apart, features=None),
    "on a branch": Way(forward=_branch, features="other"),
    "in a larger attention module": Way(forward=_inside),
}


def _spatial(net, u):
    """CBAM's second half."""
    pooled = torch.cat([u.mean(1, keepdim=True), u.amax(1, keepdim=True)], 1)
    return u * net.spatial(pooled).sigmoid()


def _selective(net, u):
    """Selective kernels, branches on an axis of their own."""
    v = torch.stack([u, net.other(u)], 1)
    logits = net.branches(net.reduce(mean(v.sum(1))).relu())
    return (v * logits.view(len(u), 2, C, 1, 1).softmax(1)).sum(1)


def _selective_apart(net, u):
    """Selective kernels, a multiply a branch."""
    v = net.other(u)
    logits = net.branches(net.reduce(mean(u + v)).relu())
    first, second = logits.view(len(u), 2, C, 1, 1).softmax(1).unbind(1)
    return u * first + v * second


def _context(net, u):
    """Global context: positions are weighted by a softmax, not averaged."""
    weights = net.one(u).flatten(2).softmax(-1)
    pooled = (u.flatten(2) @ weights.transpose(1, 2)).unsqueeze(-1)
    return u * net.logits(pooled).sigmoid()


def _extent(net, u):
    """Gather-excite of a limited extent."""
    gathered = F.avg_pool2d(u, 3, 2, 1)
    return u * F.interpolate(net.logits(gathered), size=u.shape[2:]).sigmoid()


def _coordinate(net, u):
    return u * net.third(u.mean(3, keepdim=True)).sigmoid()


def _bottleneck(net, u):
    """BAM: channel and position together, never below 1."""
    return u * (1 + (net.logits(mean(u)) * net.one(u)).sigmoid())


def _separate(net, u):
    """Average and maximum with layers of their own."""
    high = net.third(u.amax((2, 3), keepdim=True))
    return u * (net.logits(mean(u)) + high).sigmoid()


def _half(net, u):
    """One half's gate on the other half."""
    a, b = torch.cat([u, net.other(u)], 1).chunk(2, 1)
    return a * net.logits(mean(b)).sigmoid()


def _last(net, u):
    v = u.permute(0, 2, 3, 1)
    return (v * net.fc2(net.fc1(v.mean((1, 2), keepdim=True)).relu()).sigmoid()).permute(0, 3, 1, 2)


OTHER = "other values than its own map's pooled ones"
#: What looks like a gate and is none: the way, and words of the reason on a map of many positions.
LOOKALIKES = {
    "spatial": (_spatial, "one value per position (a spatial gate), not per channel"),
    "one value per image": (
        lambda n, u: u * n.one(mean(u)).sigmoid(),
        "one value per image, not per channel",
    ),
    "selective kernels": (_selective, "a softmax over branches"),
    "selective kernels apart": (_selective_apart, "a softmax over branches"),
    "global context": (_context, "attention over positions"),
    "gather-excite of a small extent": (_extent, "from position to position"),
    "coordinate attention": (_coordinate, "along one axis"),
    "bottleneck attention": (_bottleneck, "from position to position"),
    "gated linear unit": (lambda n, u: u * n.other(u).sigmoid(), "from position to position"),
    "another map's gate": (lambda n, u: n.other(u) * n.logits(mean(u)).sigmoid(), OTHER),
    "the other half's gate": (_half, OTHER),
    "no layer": (lambda n, u: u * mean(u).sigmoid(), "no learned layer"),
    "three layers": (lambda n, u: u * n.third(n.logits(mean(u)).relu()).sigmoid(), "3 learned layers"),
    "layers apart": (_separate, "3 learned layers"),
    "no bound": (lambda n, u: u * n.logits(mean(u)).relu(), "not limited"),
    "signed": (lambda n, u: u * n.logits(mean(u)).tanh(), "not limited"),
    "never closed": (lambda n, u: u * (1 + n.logits(mean(u)).sigmoid()), "lie in [1, 2]: it never closes"),
    "channels last": (_last, "channels come last"),
}
#: Multiplies that do not even look like one.
ORDINARY = {
    "swish": lambda n, u: u * u.sigmoid(),
    "hard swish": lambda n, u: u * F.relu6(u + 3) / 6,
    "mish": lambda n, u: u * F.softplus(u).tanh(),
    "layer scale": lambda n, u: u * n.scale.view(1, -1, 1, 1),
    "learned gate": lambda n, u: u * n.scale.sigmoid().view(1, -1, 1, 1),
    "product of maps": lambda n, u: u * n.other(u),
    "constant": lambda n, u: u * 0.5,
    "global response": lambda n, u: u * (mean(u * u) + 1e-6).rsqrt(),
    "two vectors": lambda n, u: wide(n.fc1(u.mean((2, 3))) * n.fc1(u.mean((2, 3))).sigmoid()),
}
