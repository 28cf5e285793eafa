"""Inception-ResNet-v2 (Szegedy et al. 2017) with an SE block on each residual branch (Hu et al. 2018, 3.3).

Shapes: N images, C channels, H×W positions.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from se_prune.zoo.blocks import LIVE_GAIN, ConvNorm, GateGain, SEBlock, init_convolutions, require_counts

#: One convolution of a branch: output channels, kernel, stride; stride 1 keeps the resolution by padding.
Layer = tuple[int, int | tuple[int, int], int]
Branch = tuple[Layer, ...]

EPS = 1e-3
#: The branches of the modules that change the map's width, each with what is pooled beside them.
MIXED_5B: tuple[Branch, ...] = (
    ((96, 1, 1),),
    ((48, 1, 1), (64, 5, 1)),
    ((64, 1, 1), (96, 3, 1), (96, 3, 1)),
)
MIXED_6A: tuple[Branch, ...] = (
    ((384, 3, 2),),
    ((256, 1, 1), (256, 3, 1), (384, 3, 2)),
)
MIXED_7A: tuple[Branch, ...] = (
    ((256, 1, 1), (384, 3, 2)),
    ((256, 1, 1), (288, 3, 2)),
    ((256, 1, 1), (288, 3, 1), (320, 3, 2)),
)
#: The branches of the residual modules on 35×35, 17×17 and 8×8 positions, for 320, 1088 and 2080 channels.
BLOCK_35: tuple[Branch, ...] = (
    ((32, 1, 1),),
    ((32, 1, 1), (32, 3, 1)),
    ((32, 1, 1), (48, 3, 1), (64, 3, 1)),
)
BLOCK_17: tuple[Branch, ...] = (
    ((192, 1, 1),),
    ((128, 1, 1), (160, (1, 7), 1), (192, (7, 1), 1)),
)
BLOCK_8: tuple[Branch, ...] = (
    ((192, 1, 1),),
    ((192, 1, 1), (224, (1, 3), 1), (256, (3, 1), 1)),
)


def _branch(in_channels: int, layers: Branch) -> nn.Module:
    """Return a branch's convolutions; a single one stands by itself."""
    found = []
    for channels, kernel, stride in layers:
        sides = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        padding = (sides[0] // 2, sides[1] // 2) if stride == 1 else 0
        found.append(ConvNorm(in_channels, channels, sides, stride, padding, eps=EPS))
        in_channels = channels
    return found[0] if len(found) == 1 else nn.Sequential(*found)


class Mixed(nn.Module):
    """Branches side by side, the last of them given as a module, and concatenated."""

    def __init__(self, in_channels: int, branches: tuple[Branch, ...], last: nn.Module) -> None:
        super().__init__()
        for index, layers in enumerate(branches):
            self.add_module(f"branch{index}", _branch(in_channels, layers))
        self.add_module(f"branch{len(branches)}", last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, C_in, H, W) to (N, C, H/stride, W/stride)."""
        return torch.cat([branch(x) for branch in self.children()], 1)


class Residual(nn.Module):
    """Branches, a 1×1 convolution with bias over their concatenation, the SE block; scaled and added to the input."""

    def __init__(
        self, channels: int, branches: tuple[Branch, ...], scale: float, se: nn.Module, *, relu: bool = True
    ) -> None:
        super().__init__()
        for index, layers in enumerate(branches):
            self.add_module(f"branch{index}", _branch(channels, layers))
        self.count = len(branches)
        self.conv2d = nn.Conv2d(sum(layers[-1][0] for layers in branches), channels, 1)
        self.se = se
        self.scale = scale
        self.relu: nn.Module = nn.ReLU(inplace=True) if relu else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, C, H, W) to the same shape."""
        branches = [self.get_submodule(f"branch{index}")(x) for index in range(self.count)]
        u = self.se(self.conv2d(torch.cat(branches, 1)))
        return cast(torch.Tensor, self.relu(u * self.scale + x))


class InceptionResNetV2(nn.Module):
    """Inception-ResNet-v2 and SE-Inception-ResNet-v2 for 299×299 images (75×75 at least).

    Without SE this is timm's `inception_resnet_v2`: same keys, same outputs. Its 10, 20 and 10 residual modules
    take 13.16 GMACs; Hu et al. print 11.75, and do not say with which modules. Nor do they say whether the three
    modules that change the width (5b, 6a, 7a) have SE blocks: here only residual modules do, as in their Figure 3.

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

        def residual(
            channels: int, branches: tuple[Branch, ...], scale: float, *, relu: bool = True
        ) -> Residual:
            gate = SEBlock(channels, reduction, gain=gate_gain) if se else nn.Identity()
            return Residual(channels, branches, scale, gate, relu=relu)

        def conv(before: int, after: int, kernel: int, stride: int = 1, padding: int = 0) -> ConvNorm:
            return ConvNorm(before, after, kernel, stride, padding, eps=EPS)

        self.conv2d_1a = conv(in_channels, 32, 3, 2)
        self.conv2d_2a = conv(32, 32, 3)
        self.conv2d_2b = conv(32, 64, 3, 1, 1)
        self.maxpool_3a = nn.MaxPool2d(3, 2)
        self.conv2d_3b = conv(64, 80, 1)
        self.conv2d_4a = conv(80, 192, 3)
        self.maxpool_5a = nn.MaxPool2d(3, 2)
        pooled = nn.Sequential(nn.AvgPool2d(3, 1, 1, count_include_pad=False), conv(192, 64, 1))
        self.mixed_5b = Mixed(192, MIXED_5B, pooled)
        self.repeat = nn.Sequential(*(residual(320, BLOCK_35, 0.17) for _ in range(10)))
        self.mixed_6a = Mixed(320, MIXED_6A, nn.MaxPool2d(3, 2))
        self.repeat_1 = nn.Sequential(*(residual(1088, BLOCK_17, 0.10) for _ in range(20)))
        self.mixed_7a = Mixed(1088, MIXED_7A, nn.MaxPool2d(3, 2))
        self.repeat_2 = nn.Sequential(*(residual(2080, BLOCK_8, 0.20) for _ in range(9)))
        self.block8 = residual(2080, BLOCK_8, 1.0, relu=False)
        self.conv2d_7b = conv(2080, 1536, 1)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classif = nn.Linear(1536, num_classes)
        init_convolutions(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (N, in_channels, H, W) to logits (N, num_classes)."""
        x = self.maxpool_3a(self.conv2d_2b(self.conv2d_2a(self.conv2d_1a(x))))
        x = self.maxpool_5a(self.conv2d_4a(self.conv2d_3b(x)))
        x = self.repeat(self.mixed_5b(x))
        x = self.repeat_1(self.mixed_6a(x))
        x = self.conv2d_7b(self.block8(self.repeat_2(self.mixed_7a(x))))
        return cast(torch.Tensor, self.classif(torch.flatten(self.avgpool(x), 1)))
