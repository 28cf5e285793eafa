"""SE-ResNets whose FC layers are linear layers without bias, as the checkpoints of moskomule/senet.pytorch have them.

Names of tensors and outputs are those of that project's `se_resnet18` to `152` and, for CIFAR, `20`, `32` and `56`.
Unlike the paper's networks they stride in the 3×3 convolution, as torchvision's ResNets do.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from se_prune.records import Preprocessing
from se_prune.zoo.resnet import BasicBlock, CifarResNet

PREFIX = "moskomule_se_resnet"
REDUCTION = 16
DEPTHS = (18, 34, 50, 101, 152)
CIFAR_DEPTHS = (20, 32, 56)
CIFAR = Preprocessing(input_size=(3, 32, 32), mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))


class LinearSE(nn.Module):
    """Squeeze-and-Excitation on (N, C) vectors: mean, linear, ReLU, linear, sigmoid."""

    def __init__(self, channels: int, reduction: int = REDUCTION) -> None:
        super().__init__()
        hidden = channels // reduction
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channels, hidden, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, channels, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """Scale `u` (N, C, H, W) by its gate (N, C, 1, 1)."""
        gate: torch.Tensor = self.fc(torch.flatten(self.avg_pool(u), 1))
        return u * gate[:, :, None, None]


def linear_se_resnet(
    depth: int, *, num_classes: int = 1000, in_channels: int = 3, reduction: int = REDUCTION
) -> nn.Module:
    """Build the ImageNet form: timm's ResNet of that depth with `LinearSE` before each sum."""
    import timm
    from timm.models.resnet import BasicBlock as Basic
    from timm.models.resnet import Bottleneck

    network: nn.Module = timm.create_model(
        f"resnet{depth}", pretrained=False, num_classes=num_classes, in_chans=in_channels
    )
    for block in network.modules():
        if isinstance(block, Basic | Bottleneck):
            last = block.bn2 if isinstance(block, Basic) else block.bn3
            block.se = LinearSE(last.num_features, reduction)
    return network


def linear_se_cifar(
    depth: int, *, num_classes: int = 10, in_channels: int = 3, reduction: int = REDUCTION
) -> nn.Module:
    """Build the CIFAR form: the zoo's ResNet of that depth with `LinearSE` before each sum."""
    network = CifarResNet(depth, num_classes=num_classes, in_channels=in_channels, se=False)
    for block in network.modules():
        if isinstance(block, BasicBlock):
            block.se = LinearSE(block.bn2.num_features, reduction)
    return network


def reduction_of(shapes: Mapping[str, torch.Size]) -> int:
    """Return the reduction that a checkpoint's FC layers have, which training scripts take as an option."""
    ratios = {
        shape[1] // shape[0]
        for key, shape in shapes.items()
        if key.endswith(".se.fc.0.weight") and len(shape) == 2 and 0 < shape[0] <= shape[1]
    }
    return min(ratios, default=REDUCTION)
