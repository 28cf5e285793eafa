"""MobileNet (Howard et al. 2017) with an SE block after each pointwise convolution (Hu et al. 2018, Table 3)."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from se_prune.zoo.blocks import LIVE_GAIN, GateGain, SEBlock, init_convolutions, require_counts

#: Output channels of the 13 separable blocks at width 1, with their stride on 224×224 images.
BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))


class SeparableBlock(nn.Module):
    """Depthwise 3×3, BN, ReLU, pointwise 1×1, BN, ReLU, SE."""

    def __init__(self, in_channels: int, channels: int, stride: int, se: nn.Module) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(in_channels, in_channels, 3, stride, 1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.pointwise = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.se = se

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, C_in, H, W) to (N, C, H/stride, W/stride)."""
        x = self.relu(self.bn1(self.depthwise(x)))
        return cast(torch.Tensor, self.se(self.relu(self.bn2(self.pointwise(x)))))


class MobileNet(nn.Module):
    """MobileNet and SE-MobileNet; `small_input` drops the strides that 28×28 or 32×32 images cannot bear.

    With `small_input` the stem and the block to 512 channels keep their resolution, so 28×28 images
    pass through 28, 14, 7 and 4 positions a side.
    """

    def __init__(
        self,
        *,
        width: float = 1.0,
        num_classes: int = 1000,
        in_channels: int = 3,
        reduction: int = 16,
        min_hidden: int = 1,
        se: bool = True,
        small_input: bool = False,
        gate_gain: GateGain = LIVE_GAIN,
    ) -> None:
        super().__init__()
        require_counts(num_classes=num_classes, in_channels=in_channels, reduction=reduction)
        previous = int(32 * width)
        self.conv1 = nn.Conv2d(in_channels, previous, 3, 1 if small_input else 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(previous)
        self.relu = nn.ReLU(inplace=True)
        blocks = []
        for base, stride in BLOCKS:
            channels = int(base * width)
            step = 1 if small_input and base == 512 else stride
            gate: nn.Module = nn.Identity()
            if se:
                gate = SEBlock(channels, reduction, min_hidden=min_hidden, bias=False, gain=gate_gain)
            blocks.append(SeparableBlock(previous, channels, step, gate))
            previous = channels
        self.blocks = nn.Sequential(*blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(previous, num_classes)
        init_convolutions(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (N, in_channels, H, W) to logits (N, num_classes)."""
        x = self.blocks(self.relu(self.bn1(self.conv1(x))))
        return cast(torch.Tensor, self.fc(torch.flatten(self.avgpool(x), 1)))
