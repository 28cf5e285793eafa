"""ShuffleNet 1×, g = 3 (Zhang et al. 2018) with an SE block on each unit's residual branch (Hu et al. 2018, Table 3).

Shapes: N images, C channels, H×W positions.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from se_prune.zoo.blocks import LIVE_GAIN, GateGain, SEBlock, init_convolutions, require_counts

GROUPS = 3
STEM = 24
#: Units and output channels of the three stages.
STAGES = ((4, 240), (8, 480), (4, 960))


class ChannelShuffle(nn.Module):
    """Deal channels over groups: channel i of group g becomes channel i·groups + g."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, C, H, W) to the same shape."""
        n, c, h, w = x.shape
        return x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class ShuffleUnit(nn.Module):
    """Grouped 1×1, shuffle, depthwise 3×3, grouped 1×1, SE; added to the input, or beside it where it strides.

    With `stride` 2 the input is average-pooled and concatenated, so that the branch makes only the channels
    that are missing. The first 1×1 convolution of the network's first unit is not grouped.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        *,
        groups: int,
        reduction: int | None,
        gain: GateGain,
    ) -> None:
        super().__init__()
        middle = channels // 4
        made = channels - in_channels if stride == 2 else channels
        self.conv1 = nn.Conv2d(in_channels, middle, 1, groups=groups, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.shuffle = ChannelShuffle(GROUPS)
        self.depthwise = nn.Conv2d(middle, middle, 3, stride, 1, groups=middle, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, made, 1, groups=GROUPS, bias=False)
        self.bn3 = nn.BatchNorm2d(made)
        self.relu = nn.ReLU(inplace=True)
        self.se: nn.Module = nn.Identity()
        if reduction is not None:
            self.se = SEBlock(made, reduction, bias=False, gain=gain)
        self.pool: nn.Module | None = nn.AvgPool2d(3, 2, 1) if stride == 2 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, C_in, H, W) to (N, C, H/stride, W/stride)."""
        u = self.shuffle(self.relu(self.bn1(self.conv1(x))))
        u = self.se(self.bn3(self.conv3(self.bn2(self.depthwise(u)))))
        joined = u + x if self.pool is None else torch.cat([self.pool(x), u], 1)
        return cast(torch.Tensor, self.relu(joined))


class ShuffleNet(nn.Module):
    """ShuffleNet 1×, g = 3 and its SE form; the FC layers of the gates have no biases (2.476 M parameters).

    Args:
        num_classes: Logits.
        in_channels: Channels of the images.
        reduction: r of every SE block.
        se: Whether there are SE blocks at all.
        gate_gain: The SE blocks' initial gains.

    Raises:
        UsageError: A size is no whole number of at least 1.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        reduction: int = 16,
        se: bool = True,
        gate_gain: GateGain = LIVE_GAIN,
    ) -> None:
        super().__init__()
        require_counts(num_classes=num_classes, in_channels=in_channels, reduction=reduction)
        self.conv1 = nn.Conv2d(in_channels, STEM, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        stages, previous = [], STEM
        for count, channels in STAGES:
            units = []
            for unit in range(count):
                units.append(
                    ShuffleUnit(
                        previous,
                        channels,
                        2 if unit == 0 else 1,
                        groups=1 if previous == STEM else GROUPS,
                        reduction=reduction if se else None,
                        gain=gate_gain,
                    )
                )
                previous = channels
            stages.append(nn.Sequential(*units))
        self.stage2, self.stage3, self.stage4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(previous, num_classes)
        init_convolutions(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (N, in_channels, H, W) to logits (N, num_classes)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.stage4(self.stage3(self.stage2(x)))
        return cast(torch.Tensor, self.fc(torch.flatten(self.avgpool(x), 1)))
