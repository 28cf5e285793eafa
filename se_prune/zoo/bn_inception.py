"""BN-Inception (Ioffe, Szegedy 2015) with an SE block after each module's concatenation (Hu et al. 2018, 3.3).

Shapes: N images, C channels, H×W positions.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import cast

import torch
from torch import nn

from se_prune.zoo.blocks import LIVE_GAIN, ConvNorm, GateGain, SEBlock, init_convolutions, require_counts

#: Output channels of a module's branches: 1×1; 3×3 after its reduction; two 3×3 after their reduction; 1×1 after
#: pooling. Modules without the first have stride 2 and no convolution after pooling. The numbers are those of the
#: Caffe network that everyone trains, whose modules 4c to 4e are a little wider than in the article.
MODULES: dict[str, tuple[int, tuple[int, int], tuple[int, int], int]] = {
    "3a": (64, (64, 64), (64, 96), 32),
    "3b": (64, (64, 96), (64, 96), 64),
    "3c": (0, (128, 160), (64, 96), 0),
    "4a": (224, (64, 96), (96, 128), 128),
    "4b": (192, (96, 128), (96, 128), 128),
    "4c": (160, (128, 160), (128, 160), 128),
    "4d": (96, (128, 192), (160, 192), 128),
    "4e": (0, (128, 192), (192, 256), 0),
    "5a": (352, (192, 320), (160, 224), 128),
    "5b": (352, (192, 320), (192, 224), 128),
}


class Inception(nn.Module):
    """One module of `MODULES`: its branches side by side, concatenated, then the SE block."""

    def __init__(
        self,
        in_channels: int,
        sizes: tuple[int, tuple[int, int], tuple[int, int], int],
        *,
        max_pool: bool,
        conv_bias: bool,
    ) -> None:
        super().__init__()
        single, (reduced, middle), (narrowed, double), pooled = sizes
        stride = 1 if single else 2

        def conv(before: int, after: int, kernel: int, step: int = 1) -> ConvNorm:
            return ConvNorm(before, after, kernel, step, kernel // 2, bias=conv_bias)

        self.branches = nn.ModuleList()
        if single:
            self.branches.append(conv(in_channels, single, 1))
        self.branches.append(nn.Sequential(conv(in_channels, reduced, 1), conv(reduced, middle, 3, stride)))
        self.branches.append(
            nn.Sequential(
                conv(in_channels, narrowed, 1), conv(narrowed, double, 3), conv(double, double, 3, stride)
            )
        )
        if single:
            pool = nn.MaxPool2d(3, 1, 1) if max_pool else nn.AvgPool2d(3, 1, 1)
            self.branches.append(nn.Sequential(pool, conv(in_channels, pooled, 1)))
        else:
            self.branches.append(nn.MaxPool2d(3, 2, ceil_mode=True))
        self.channels = single + middle + double + (pooled or in_channels)
        self.se: nn.Module = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, C_in, H, W) to (N, C, H/stride, W/stride)."""
        return cast(torch.Tensor, self.se(torch.cat([branch(x) for branch in self.branches], 1)))


class BNInception(nn.Module):
    """BN-Inception and SE-BN-Inception in their Caffe forms, for inputs whose sides 32 divides.

    The two published networks differ in more than SE: the convolutions of BN-Inception have biases (11.295 M
    parameters), those of SE-BN-Inception have none, and the FC layers of its gates do (11.932 M). A bias before
    BN has no effect on the function, and `conv_bias` makes the two alike where that matters.

    Args:
        num_classes: Logits.
        in_channels: Channels of the images.
        reduction: r of every SE block.
        se: Whether there are SE blocks at all.
        conv_bias: Whether the convolutions have biases; None for what was published, `not se`.
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
        conv_bias: bool | None = None,
        gate_gain: GateGain = LIVE_GAIN,
    ) -> None:
        super().__init__()
        require_counts(num_classes=num_classes, in_channels=in_channels, reduction=reduction)
        bias = not se if conv_bias is None else conv_bias
        self.stem = nn.Sequential(
            ConvNorm(in_channels, 64, 7, 2, 3, bias=bias),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            ConvNorm(64, 64, 1, bias=bias),
            ConvNorm(64, 192, 3, 1, 1, bias=bias),
            nn.MaxPool2d(3, 2, ceil_mode=True),
        )
        previous = 192
        modules: OrderedDict[str, nn.Module] = OrderedDict()
        for name, sizes in MODULES.items():
            module = Inception(previous, sizes, max_pool=name == "5b", conv_bias=bias)
            previous = module.channels
            if se:
                module.se = SEBlock(previous, reduction, gain=gate_gain)
            modules[name] = module
        self.inception = nn.Sequential(modules)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(previous, num_classes)
        init_convolutions(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (N, in_channels, H, W) to logits (N, num_classes)."""
        x = self.inception(self.stem(x))
        return cast(torch.Tensor, self.fc(torch.flatten(self.avgpool(x), 1)))
