"""ResNets and SE-ResNets in CIFAR form (He et al. 2016, section 4.2; Hu et al. 2018, section 6.1)."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from se_prune.zoo.blocks import LIVE_GAIN, GateGain, SEBlock, init_convolutions, require_counts


class BasicBlock(nn.Module):
    """Two 3×3 convolutions, then the SE block, then the sum with the (projected) input."""

    def __init__(
        self, in_channels: int, channels: int, stride: int, se: nn.Module, *, projection: bool
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.se = se
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module = nn.Identity()
        if projection:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, C_in, H, W) to (N, C, H/stride, W/stride)."""
        u = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return cast(torch.Tensor, self.relu(self.se(u) + self.downsample(x)))


class CifarResNet(nn.Module):
    """ResNet of 6n + 2 layers, 16-32-64 channels, projection shortcuts, for small images."""

    def __init__(
        self,
        depth: int,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        reduction: int = 4,
        se: bool = True,
        gate_gain: GateGain = LIVE_GAIN,
    ) -> None:
        super().__init__()
        require_counts(num_classes=num_classes, in_channels=in_channels, reduction=reduction)
        if depth % 6 != 2 or depth < 8:
            raise ValueError(f"depth must be 6n + 2, got {depth}")
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)

        def stage(previous: int, channels: int) -> nn.Sequential:
            blocks = []
            for index in range(depth // 6):
                stride = 2 if channels > 16 and index == 0 else 1
                gate = SEBlock(channels, reduction, gain=gate_gain) if se else nn.Identity()
                blocks.append(BasicBlock(previous, channels, stride, gate, projection=previous != channels))
                previous = channels
            return nn.Sequential(*blocks)

        self.layer1 = stage(16, 16)
        self.layer2 = stage(16, 32)
        self.layer3 = stage(32, 64)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        init_convolutions(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (N, in_channels, H, W) to logits (N, num_classes)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return cast(torch.Tensor, self.fc(torch.flatten(self.avgpool(x), 1)))
