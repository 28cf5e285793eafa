"""The slopes of scales and shifts, and the rows of their curvature, are those of autograd, on many architectures."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional

from se_prune.artifact import NORM_TYPES
from se_prune.surgery.knobs import find_knobs, slopes_of
from tests.built import built
from tests.nets import ALL

FOREIGN = (
    "zoo:se_resnet20",
    "zoo:se_mobilenet_x025",
    "zoo:se_resnext29_8x4d",
    "timm:mobilenetv3_small_050",  # a convolution after the pool, hard-swish in place
    "timm:tinynet_e",  # an EfficientNet
    "timm:regnety_002",
    "timm:ghostnet_050",
    "torchvision:mobilenet_v3_small",
)
IMAGES = 4

network = functools.cache(built)


class Calmed(nn.Module):
    """A network whose random weights are not sure of any class, which would leave no slope to compare."""

    def __init__(self, inner, images):
        super().__init__()
        self.inner, self.scale = inner, 1.0
        with torch.no_grad():
            self.scale = 1 / inner(images).std()

    def forward(self, images):
        return self.inner(images) * self.scale


class Flat(nn.Module):
    """A BN of rows and one whose scale is partly 0 or vanishing."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6)
        self.fc, self.rows, self.out = nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.Linear(5, 3)
        with torch.no_grad():
            self.bn.weight[:2] = torch.tensor([0.0, 1e-40])

    def forward(self, images):
        return self.out(self.rows(self.fc(self.bn(self.conv(images)).relu().mean((2, 3)))).relu())


@pytest.mark.parametrize("name", [*ALL, *FOREIGN])
def test_slopes_and_rows_are_those_of_autograd(name):
    found = network(name)
    compare(copy.deepcopy(found.model), found.example.shape[1:])


def test_a_batch_norm_of_rows_and_scales_of_zero():
    torch.manual_seed(0)
    slopes = compare(Flat(), (1, 8, 8))
    assert len(slopes) == 2 * (6 + 5 + 3)
    assert slopes[6:8].tolist() == [0, 0], "shifts of the channels without a scale"


def test_a_batch_norm_without_running_statistics_stays_as_it_is():
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6, track_running_stats=False), nn.Flatten()
    ).eval()
    model.append(nn.Linear(6 * 36, 3))
    assert [k.module for k in find_knobs(model, torch.randn(4, 1, 8, 8))] == [model[3]]


def compare(net, size):
    """Hold slopes and rows against autograd; return the slopes."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn((IMAGES, *size), generator=generator, dtype=torch.float64)
    net = net.double().eval()
    model = Calmed(net, images)
    knobs = find_knobs(net, images)
    norms = sum(isinstance(m, NORM_TYPES) and m.running_var is not None for m in model.modules())
    assert sum(isinstance(knob.module, NORM_TYPES) for knob in knobs) == norms
    changes, logits = turned(model, knobs, images)
    wanted = torch.randn(logits.shape, generator=generator, dtype=torch.float64).softmax(1)
    signs = 2 * torch.randint(0, 2, logits.shape, generator=generator) - 1
    rows, gradient = slopes_of(model, knobs, [(images, wanted, signs)])

    divergence = functional.kl_div(logits.log_softmax(1), wanted, reduction="sum")
    slopes = slope_of(divergence, changes)
    assert slopes.norm() > 0
    assert (gradient - slopes).norm() < 1e-4 * slopes.norm()
    q = logits.detach().softmax(1)
    for i in range(IMAGES):
        root = q[i].sqrt() * signs[i]
        row = slope_of(logits[i] @ (root - q[i] * root.sum()), changes)
        assert (rows[0][i].double() - row).norm() < 1e-4 * row.norm()
    return gradient


def turned(model, knobs, images):
    """Return what scales and shifts (2·C each) are changed by, all zero, and the logits as a function of them."""
    changes = [torch.zeros(2 * k.channels, dtype=torch.float64, requires_grad=True) for k in knobs]
    names = {id(module): name for name, module in model.named_modules()}
    state = {}
    for knob, change in zip(knobs, changes, strict=True):
        weight, bias = knob.module.weight.detach(), knob.module.bias.detach()
        scale, shift = change.chunk(2)
        name = names[id(knob.module)]
        state[f"{name}.weight"] = weight * (1 + scale).view(-1, *(1,) * (weight.ndim - 1))
        state[f"{name}.bias"] = bias + shift * knob.spread
    return changes, torch.func.functional_call(model, state, (images,))


def slope_of(value, changes):
    found = torch.autograd.grad(value, changes, retain_graph=True, allow_unused=True)
    return torch.cat([torch.zeros_like(c) if f is None else f for f, c in zip(found, changes, strict=True)])
