"""Tiny SE networks whose answers are worked out by hand.

MACs: convolutions and fully connected layers, one multiply-add = 1, for one image. A convolution from A to B
channels with a K×K kernel on P output positions has A·B·K²/groups weights and P times as many MACs. Gate
work: the squeeze reads C·P values, an activation writes C, the multiply writes C·P.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from se_prune.records import Preprocessing


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The hand-computed answers of one network.

    `sites`: name to (channels, hidden units, reduce, expand); `groups`: first layer to (kind, channels), of
    those that can be cut; `uncounted`: operations beside the MACs and the gates, with how often they run.
    """

    build: Callable[[], nn.Module]
    input_size: tuple[int, int, int]
    classes: int
    params: int
    per_layer: dict[str, int]
    macs_conv: int
    macs_linear: int
    macs_se: int
    macs_gate: int
    uncounted: dict[str, int]
    sites: dict[str, tuple[int, int, str, str]]
    groups: dict[str, tuple[str, int]]

    @property
    def macs(self) -> int:
        return self.macs_conv + self.macs_linear

    @property
    def preprocessing(self) -> Preprocessing:
        channels = self.input_size[0]
        return Preprocessing(input_size=self.input_size, mean=(0.5,) * channels, std=(0.25,) * channels)

    def images(self, n: int = 1) -> torch.Tensor:
        return torch.randn(n, *self.input_size, generator=torch.Generator().manual_seed(0))


class ConvSE(nn.Module):
    """SE of 1×1 convolutions with biases, as in the paper's ResNets."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.squeeze = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.relu = nn.ReLU(inplace=True)
        self.expand = nn.Conv2d(hidden, channels, 1)
        self.sigmoid = nn.Sigmoid()

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        return u * self.sigmoid(self.expand(self.relu(self.reduce(self.squeeze(u)))))


class LinearSE(nn.Module):
    """SE of linear layers without biases in a Sequential, as in moskomule's networks."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channels, hidden, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, channels, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        n, c, _, _ = u.shape
        gate = self.fc(self.avg_pool(u).view(n, c)).view(n, c, 1, 1)
        return u * gate.expand_as(u)


class ResidualBlock(nn.Module):
    """conv1, BN, ReLU, conv2, BN, SE, plus the input, ReLU."""

    def __init__(self, channels: int, inner: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.se = ConvSE(channels, hidden)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        u = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(self.se(u) + x)


class ResidualSE(nn.Module):
    """SE-ResNet-like: a stem and two blocks on one residual stream of 4 channels, 8×8 positions all along."""

    def __init__(self, num_classes: int = 5, in_channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.blocks = nn.Sequential(ResidualBlock(4, 6, 2), ResidualBlock(4, 6, 2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pool(self.blocks(self.relu(self.bn(self.stem(x))))).flatten(1))


class SeparableBlock(nn.Module):
    """Depthwise 3×3, BN, ReLU, pointwise, BN, ReLU, SE."""

    def __init__(self, channels: int, out: int, stride: int, hidden: int) -> None:
        super().__init__()
        self.dw = nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.pw = nn.Conv2d(channels, out, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.se = LinearSE(out, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.dw(x)))
        return self.se(self.relu(self.bn2(self.pw(x))))


class DepthwiseSE(nn.Module):
    """SE-MobileNet-like: 8×8 images of one channel, then 4×4 and 2×2 positions; no residual connection."""

    def __init__(self, num_classes: int = 3, in_channels: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 6, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.blocks = nn.Sequential(SeparableBlock(6, 8, 1, 2), SeparableBlock(8, 10, 2, 3))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(10, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pool(self.blocks(self.relu(self.bn(self.stem(x))))).flatten(1))


class FunctionalSE(nn.Module):
    """A gate without a module of its own: `mean((2, 3))`, hard sigmoid as relu6(z + 3) / 6, indexed multiply.

    The other activations are x · sigmoid(x), so that a multiply and a sigmoid that are no gate run as well.
    """

    def __init__(self, num_classes: int = 4, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 5, 3, padding="same")
        self.reduce = nn.Linear(5, 2)
        self.expand = nn.Linear(2, 5)
        self.conv2 = nn.Conv2d(5, 7, 1)
        self.fc = nn.Linear(7, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x)
        x = x * torch.sigmoid(x)
        z = F.silu(self.reduce(x.mean((2, 3))))
        x = x * (F.relu6(self.expand(z) + 3) / 6)[:, :, None, None]
        x = self.conv2(x)
        x = x * torch.sigmoid(x)
        return self.fc(x.mean((2, 3)))


RESIDUAL = Facts(
    build=ResidualSE,
    input_size=(3, 8, 8),
    classes=5,
    # stem 3·4·9 = 108, BN 8; a block: 4·6·9 = 216, BN 12, 6·4·9 = 216, BN 8, reduce 4·2 + 2 = 10,
    # expand 2·4 + 4 = 12, together 474; fc 4·5 + 5 = 25; 108 + 8 + 2·474 + 25
    params=1089,
    per_layer={
        "stem": 6912,  # 64·108
        "blocks.0.conv1": 13824,  # 64·216
        "blocks.0.conv2": 13824,
        "blocks.0.se.reduce": 8,  # one position
        "blocks.0.se.expand": 8,
        "blocks.1.conv1": 13824,
        "blocks.1.conv2": 13824,
        "blocks.1.se.reduce": 8,
        "blocks.1.se.expand": 8,
        "fc": 20,
    },
    macs_conv=62240,  # 6912 + 4·13824 + 4·8
    macs_linear=20,
    macs_se=32,
    macs_gate=1032,  # 2·(4·64 + 4 + 4·64)
    # BN: stem and two a block. ReLU: stem, and in a block after bn1, in the SE block and after the sum.
    uncounted={"adaptive_avg_pool2d": 1, "add": 2, "batch_norm": 5, "relu": 7},
    sites={
        "blocks.0.se": (4, 2, "blocks.0.se.reduce", "blocks.0.se.expand"),
        "blocks.1.se": (4, 2, "blocks.1.se.reduce", "blocks.1.se.expand"),
    },
    # The stream is made by the stem and both conv2; each gate scales its own addend, not the stream.
    groups={
        "stem": ("stream", 4),
        "blocks.0.conv1": ("inner", 6),
        "blocks.0.se.reduce": ("hidden", 2),
        "blocks.1.conv1": ("inner", 6),
        "blocks.1.se.reduce": ("hidden", 2),
    },
)

DEPTHWISE = Facts(
    build=DepthwiseSE,
    input_size=(1, 8, 8),
    classes=3,
    # stem 1·6·9 = 54, BN 12; block 0: 6·9 = 54, BN 12, 6·8 = 48, BN 16, FCs 8·2 + 2·8 = 32, together 162;
    # block 1: 8·9 = 72, BN 16, 8·10 = 80, BN 20, FCs 10·3 + 3·10 = 60, together 248; fc 10·3 + 3 = 33
    params=509,
    per_layer={
        "stem": 864,  # 16·54
        "blocks.0.dw": 864,  # 16·54
        "blocks.0.pw": 768,  # 16·48
        "blocks.0.se.fc.0": 16,
        "blocks.0.se.fc.2": 16,
        "blocks.1.dw": 288,  # 4·72
        "blocks.1.pw": 320,  # 4·80
        "blocks.1.se.fc.0": 30,
        "blocks.1.se.fc.2": 30,
        "fc": 30,
    },
    macs_conv=3104,  # 864 + 864 + 768 + 288 + 320
    macs_linear=122,  # 32 + 60 + 30
    macs_se=92,
    macs_gate=354,  # (8·16 + 8 + 8·16) + (10·4 + 10 + 10·4)
    # BN and ReLU: the stem's and two a block, and one more ReLU in each SE block.
    uncounted={"adaptive_avg_pool2d": 1, "batch_norm": 5, "relu": 7},
    sites={
        "blocks.0.se": (8, 2, "blocks.0.se.fc.0", "blocks.0.se.fc.2"),
        "blocks.1.se": (10, 3, "blocks.1.se.fc.0", "blocks.1.se.fc.2"),
    },
    # A depthwise convolution leaves with the channels that it reads: the stem's with blocks.0.dw, and so on.
    groups={
        "stem": ("inner", 6),
        "blocks.0.pw": ("gated", 8),
        "blocks.0.se.fc.0": ("hidden", 2),
        "blocks.1.pw": ("gated", 10),
        "blocks.1.se.fc.0": ("hidden", 3),
    },
)

FUNCTIONAL = Facts(
    build=FunctionalSE,
    input_size=(3, 6, 6),
    classes=4,
    # conv1 3·5·9 + 5 = 140, reduce 5·2 + 2 = 12, expand 2·5 + 5 = 15, conv2 5·7 + 7 = 42, fc 7·4 + 4 = 32
    params=241,
    per_layer={
        "conv1": 4860,  # 36·135
        "reduce": 10,
        "expand": 10,
        "conv2": 1260,  # 36·35
        "fc": 28,
    },
    macs_conv=6120,
    macs_linear=48,
    macs_se=20,
    macs_gate=375,  # 5·36 read, 5 each for + 3, relu6 and / 6, 5·36 written
    # Beside the gate: the mean before fc, silu in the gate's hidden layer, and two x · sigmoid(x).
    uncounted={"mean": 1, "mul": 2, "sigmoid": 2, "silu": 1},
    sites={"expand": (5, 2, "reduce", "expand")},
    groups={"conv1": ("gated", 5), "reduce": ("hidden", 2), "conv2": ("inner", 7)},
)

ALL = {"residual": RESIDUAL, "depthwise": DEPTHWISE, "functional": FUNCTIONAL}
