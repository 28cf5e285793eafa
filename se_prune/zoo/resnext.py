"""ResNeXt-29 and SE-ResNeXt-29 in CIFAR form (Xie et al. 2017, section 5.2): three stages of three units."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from se_prune.zoo.blocks import LIVE_GAIN, GateGain, init_convolutions, require_counts
from se_prune.zoo.senet import EXPANSION, Bottleneck, projection


class CifarResNeXt(nn.Module):
    """ResNeXt of 29 layers for small images: 3×3 stem of `channels`, stages of 4, 8 and 16 times as many.

    Args:
        cardinality: Groups of every 3×3 convolution.
        base_width: Channels of a group in the first stage; each stage doubles them.
        channels: 64 in the paper, where the stages have 256, 512 and 1024 channels.
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
        cardinality: int = 8,
        base_width: int = 64,
        channels: int = 64,
        num_classes: int = 10,
        in_channels: int = 3,
        reduction: int = 16,
        se: bool = True,
        gate_gain: GateGain = LIVE_GAIN,
    ) -> None:
        super().__init__()
        require_counts(num_classes=num_classes, in_channels=in_channels, reduction=reduction)
        require_counts(cardinality=cardinality, base_width=base_width, channels=channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        stages, previous = [], channels
        for index in range(3):
            width, out = cardinality * base_width * 2**index, channels * EXPANSION * 2**index
            units = []
            for unit in range(3):
                stride = 2 if index > 0 and unit == 0 else 1
                units.append(
                    Bottleneck(
                        previous,
                        (width, width, out),
                        (1, stride),
                        groups=cardinality,
                        downsample=projection(previous, out, stride),
                        reduction=reduction if se else None,
                        gain=gate_gain,
                    )
                )
                previous = out
            stages.append(nn.Sequential(*units))
        self.layer1, self.layer2, self.layer3 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(previous, num_classes)
        init_convolutions(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (N, in_channels, H, W) to logits (N, num_classes)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return cast(torch.Tensor, self.fc(torch.flatten(self.avgpool(x), 1)))
