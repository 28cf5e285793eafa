"""VGG-16 with BN (Simonyan, Zisserman 2015) with an SE block after each convolution's ReLU (Hu et al. 2018)."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from se_prune.zoo.blocks import LIVE_GAIN, GateGain, SEBlock, init_convolutions, require_counts

#: Convolutions and their channels in each of the five stages; a max-pooling follows each stage.
STAGES = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))


class VGG16(nn.Module):
    """VGG-16-BN and SE-VGG-16-BN; the FC layers of the gates have no biases (138.59 M parameters).

    The layers have torchvision's names in `vgg16_bn`; an SE block stands beside its ReLU, in one Sequential.

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
        layers: list[nn.Module] = []
        previous = in_channels
        for convolutions, channels in STAGES:
            for _ in range(convolutions):
                activation: nn.Module = nn.ReLU(inplace=True)
                if se:
                    gate = SEBlock(channels, reduction, bias=False, gain=gate_gain)
                    activation = nn.Sequential(activation, gate)
                layers += [nn.Conv2d(previous, channels, 3, 1, 1), nn.BatchNorm2d(channels), activation]
                previous = channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 4096), nn.ReLU(inplace=True), nn.Dropout(),
            nn.Linear(4096, 4096), nn.ReLU(inplace=True), nn.Dropout(),
            nn.Linear(4096, num_classes),
        )  # fmt: skip
        init_convolutions(self)
        for module in self.classifier:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (N, in_channels, H, W) to logits (N, num_classes)."""
        return cast(torch.Tensor, self.classifier(torch.flatten(self.avgpool(self.features(x)), 1)))
