"""The SE block and the small pieces that the zoo's networks share.

Shapes: N images, C channels, H×W positions, R hidden units.
"""

from __future__ import annotations

import torch
from torch import nn

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
        hidden = max(min_hidden, channels // reduction)
        self.squeeze = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, hidden, 1, bias=bias)
        self.relu = nn.ReLU(inplace=True)
        self.expand = nn.Conv2d(hidden, channels, 1, bias=bias)
        self.sigmoid = nn.Sigmoid()
        for layer, scale in zip((self.reduce, self.expand), gain, strict=True):
            nn.init.normal_(layer.weight, std=scale * layer.in_channels**-0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """Scale `u` (N, C, H, W) by its gate (N, C, 1, 1)."""
        gate: torch.Tensor = self.sigmoid(self.expand(self.relu(self.reduce(self.squeeze(u)))))
        return u * gate


def init_convolutions(network: nn.Module) -> None:
    """He initialisation of every convolution outside SE blocks; BN starts as the identity."""
    inside = {id(m) for block in network.modules() if isinstance(block, SEBlock) for m in block.modules()}
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and id(module) not in inside:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
