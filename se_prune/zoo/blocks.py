"""The SE block and the small pieces that the zoo's networks share.

Shapes: N images, C channels, H×W positions, R hidden units.
"""

from __future__ import annotations

import torch
from torch import nn

from se_prune.errors import UsageError

GateGain = tuple[float, float]

#: Kaiming gains of `reduce` and `expand` that give gates which react to the image from the first step; how alive
#: the gates of the bundled networks are after training stands in `reports/bundled.md`.
LIVE_GAIN: GateGain = (3.0, 2.0)


class SEBlock(nn.Module):
    """Squeeze-and-Excitation: `v = s·u`, `s = σ(W2 δ(W1 z))`, `z` the mean of `u` over positions.

    Hu et al., CVPR 2018, section 3, equations 2 to 4; the two FC layers are 1×1 convolutions.
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        *,
        min_hidden: int = 1,
        bias: bool = True,
        gain: GateGain = LIVE_GAIN,
    ) -> None:
        super().__init__()
        require_counts(reduction=reduction)
        hidden = max(min_hidden, channels // reduction)
        self.squeeze = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, hidden, 1, bias=bias)
        self.relu = nn.ReLU(inplace=True)
        self.expand = nn.Conv2d(hidden, channels, 1, bias=bias)
        self.sigmoid = nn.Sigmoid()
        _init_gate(self.reduce, self.expand, gain)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """Scale `u` (N, C, H, W) by its gate (N, C, 1, 1)."""
        gate: torch.Tensor = self.sigmoid(self.expand(self.relu(self.reduce(self.squeeze(u)))))
        return u * gate


class SEModule(nn.Module):
    """The SE block under the names of Cadene's and timm's `legacy_se*` checkpoints: `fc1` reduces, `fc2` expands."""

    def __init__(self, channels: int, reduction: int = 16, *, gain: GateGain = LIVE_GAIN) -> None:
        super().__init__()
        require_counts(reduction=reduction)
        hidden = max(1, channels // reduction)
        self.squeeze = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.relu = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(hidden, channels, 1)
        self.sigmoid = nn.Sigmoid()
        _init_gate(self.fc1, self.fc2, gain)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """Scale `u` (N, C, H, W) by its gate (N, C, 1, 1)."""
        gate: torch.Tensor = self.sigmoid(self.fc2(self.relu(self.fc1(self.squeeze(u)))))
        return u * gate


class ConvNorm(nn.Sequential):
    """A convolution, its BN and a ReLU, as `conv`, `bn` and `relu`; C_in to C channels."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
        *,
        bias: bool = False,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel, stride, padding, bias=bias)
        self.bn = nn.BatchNorm2d(channels, eps=eps)
        self.relu = nn.ReLU(inplace=True)


def _init_gate(reduce: nn.Conv2d, expand: nn.Conv2d, gain: GateGain) -> None:
    for layer, scale in zip((reduce, expand), gain, strict=True):
        nn.init.normal_(layer.weight, std=scale * layer.in_channels**-0.5)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def init_convolutions(network: nn.Module) -> None:
    """He initialisation of every convolution outside SE blocks, without biases; BN starts as the identity."""
    blocks = [m for m in network.modules() if isinstance(m, SEBlock | SEModule)]
    inside = {id(m) for block in blocks for m in block.modules()}
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and id(module) not in inside:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def require_counts(**counts: int) -> None:
    """Check sizes that a user may give.

    Raises:
        UsageError: One of them is no whole number of at least 1.
    """
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UsageError(f"{name} must be a whole number of at least 1, got {value!r}.")
