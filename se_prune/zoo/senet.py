"""SE-ResNet, SE-ResNeXt (32×4d) and SENet-154 for ImageNet, with and without SE (Hu et al. 2018, sections 3.3, 6).

The keys and the geometry are those of Cadene's checkpoints, which timm calls `legacy_se*`: the stem's pooling
rounds up instead of padding, and SE-ResNet strides in the first 1×1 convolution, as He et al. (2016) do.

Shapes: N images, C channels, H×W positions.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from se_prune.errors import UsageError, nearest
from se_prune.zoo.blocks import LIVE_GAIN, GateGain, SEModule, init_convolutions, require_counts

#: Blocks of the four stages by depth (He et al. 2016, Table 1); SENet-154 has those of 152.
STAGES = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
EXPANSION = 4
#: Where a unit's SE block stands (Hu et al. 2018, arXiv v4, section 6.5 and Figure 5): after the last 1×1
#: convolution; before the first, on the residual branch; after the sum and its ReLU; on the (projected)
#: identity branch; after the 3×3 convolution.
PLACEMENTS = ("standard", "pre", "post", "identity", "3x3")


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What tells the three families apart; widths are multiples of a stage's base, 64 to 512.

    `stride_first`: the first 1×1 convolution strides, else the 3×3. `deep`: a stem of three 3×3 convolutions,
    3×3 projections from the second stage on, and dropout before the classifier.
    """

    width1: float
    width2: float
    groups: int
    stride_first: bool
    deep: bool


FORMS = {
    "resnet": Form(width1=1, width2=1, groups=1, stride_first=True, deep=False),
    "resnext": Form(width1=2, width2=2, groups=32, stride_first=False, deep=False),
    "senet": Form(width1=2, width2=4, groups=64, stride_first=False, deep=True),
}


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions beside an identity or a projection, with an SE block where `placement` says.

    Args:
        in_channels: C_in.
        widths: Output channels of the three convolutions; the last is C.
        strides: Of the first two convolutions.
        groups: Of the 3×3 convolution.
        downsample: The projection (N, C_in, H, W) to (N, C, H/stride, W/stride), or the identity.
        reduction: The SE block's r; None for no SE block.
        placement: One of `PLACEMENTS`.
        gain: The SE block's initial gains.
    """

    def __init__(
        self,
        in_channels: int,
        widths: tuple[int, int, int],
        strides: tuple[int, int],
        *,
        groups: int,
        downsample: nn.Module,
        reduction: int | None,
        placement: str = "standard",
        gain: GateGain = LIVE_GAIN,
    ) -> None:
        super().__init__()
        first, second, channels = widths
        self.conv1 = nn.Conv2d(in_channels, first, 1, strides[0], bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.conv2 = nn.Conv2d(first, second, 3, strides[1], 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(second)
        self.conv3 = nn.Conv2d(second, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.placement = placement
        self.se_module: nn.Module = nn.Identity()
        if reduction is not None:
            scaled = {"pre": in_channels, "3x3": second}.get(placement, channels)
            self.se_module = SEModule(scaled, reduction, gain=gain)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, C_in, H, W) to (N, C, H/stride, W/stride)."""
        u = self.relu(self.bn1(self.conv1(self._gated("pre", x))))
        u = self._gated("3x3", self.relu(self.bn2(self.conv2(u))))
        u = self._gated("standard", self.bn3(self.conv3(u)))
        shortcut = self._gated("identity", self.downsample(x))
        return self._gated("post", self.relu(u + shortcut))

    def _gated(self, placement: str, u: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.se_module(u)) if placement == self.placement else u


class SENet(nn.Module):
    """ResNet-50/101/152, ResNeXt-50/101 (32×4d) and SENet-154, with SE blocks or without.

    Args:
        depth: 50, 101 or 152.
        form: `resnet`, `resnext`, or `senet` (SENet-154 is its depth 152).
        num_classes: Logits.
        in_channels: Channels of the images.
        reduction: r of every SE block; the paper has 4, 8, 16 and 32.
        placement: Where the SE blocks stand, one of `PLACEMENTS`.
        se: Whether there are SE blocks at all.
        gate_gain: The SE blocks' initial gains.

    Raises:
        UsageError: An argument is none of these.
    """

    def __init__(
        self,
        depth: int,
        *,
        form: str = "resnet",
        num_classes: int = 1000,
        in_channels: int = 3,
        reduction: int = 16,
        placement: str = "standard",
        se: bool = True,
        gate_gain: GateGain = LIVE_GAIN,
    ) -> None:
        super().__init__()
        require_counts(num_classes=num_classes, in_channels=in_channels, reduction=reduction)
        _require("depth", depth, STAGES)
        _require("form", form, FORMS)
        _require("placement", placement, PLACEMENTS)
        shape = FORMS[form]
        options = {"reduction": reduction if se else None, "placement": placement, "gain": gate_gain}
        self.layer0 = _stem(in_channels, deep=shape.deep)
        self.pool0 = nn.MaxPool2d(3, 2, ceil_mode=True)
        stages, previous = [], 128 if shape.deep else 64
        for index, units in enumerate(STAGES[depth]):
            stages.append(_stage(shape, index, units, previous, **options))
            previous = 64 * EXPANSION * 2**index
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.2 if shape.deep else 0.0)
        self.last_linear = nn.Linear(previous, num_classes)
        init_convolutions(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (N, in_channels, H, W) to logits (N, num_classes)."""
        x = self.pool0(self.layer0(x))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return cast(torch.Tensor, self.last_linear(self.dropout(torch.flatten(self.avgpool(x), 1))))


def _require(name: str, value: int | str, known: Iterable[int | str]) -> None:
    choices = [str(choice) for choice in known]
    if str(value) not in choices:
        raise UsageError(f"{name} takes {', '.join(choices)}, got {value!r}{nearest(str(value), choices)}.")


def _stem(in_channels: int, *, deep: bool) -> nn.Sequential:
    """Return one 7×7 convolution, or three 3×3; the first has stride 2."""
    sizes = [(in_channels, 64, 3, 2), (64, 64, 3, 1), (64, 128, 3, 1)] if deep else [(in_channels, 64, 7, 2)]
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for index, (before, after, kernel, stride) in enumerate(sizes, 1):
        layers[f"conv{index}"] = nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False)
        layers[f"bn{index}"] = nn.BatchNorm2d(after)
        layers[f"relu{index}"] = nn.ReLU(inplace=True)
    return nn.Sequential(layers)


def _stage(shape: Form, index: int, units: int, in_channels: int, **options: Any) -> nn.Sequential:
    """Return the units of the stage `index` (0 to 3), the first of which strides in all stages but the first."""
    base = 64 * 2**index
    widths = (int(base * shape.width1), int(base * shape.width2), base * EXPANSION)
    kernel = 3 if shape.deep and index > 0 else 1
    made = []
    for unit in range(units):
        stride = 2 if index > 0 and unit == 0 else 1
        strides = (stride, 1) if shape.stride_first else (1, stride)
        shortcut = projection(in_channels, widths[2], stride, kernel)
        made.append(
            Bottleneck(in_channels, widths, strides, groups=shape.groups, downsample=shortcut, **options)
        )
        in_channels = widths[2]
    return nn.Sequential(*made)


def projection(in_channels: int, channels: int, stride: int, kernel: int = 1) -> nn.Module:
    """Return a convolution with BN where a unit changes its map's shape, else the identity."""
    if stride == 1 and in_channels == channels:
        return nn.Identity()
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(channels)
    )
