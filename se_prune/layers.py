"""Size and MACs of every layer: what a plan counts with."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from se_prune.artifact import CONV_TYPES, NORM_TYPES
from se_prune.records import LayerCost


def layer_costs(model: nn.Module, macs: Mapping[str, int]) -> dict[str, LayerCost]:
    """Return size and MACs of every convolution, linear and BN layer; `macs` as `Cost.per_layer`."""
    result = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        bias = getattr(module, "bias", None)
        if isinstance(module, CONV_TYPES):
            size = (module.in_channels, module.out_channels)
            channelwise = module.groups == module.in_channels == module.out_channels > 1
        elif isinstance(module, nn.Linear):
            size, channelwise = (module.in_features, module.out_features), False
        elif isinstance(module, NORM_TYPES):
            size, channelwise = (module.num_features, module.num_features), True
        else:
            continue
        result[name] = LayerCost(
            in_channels=size[0],
            out_channels=size[1],
            weights=0 if weight is None else weight.numel(),
            biases=0 if bias is None else bias.numel(),
            macs=macs.get(name, 0),
            channelwise=channelwise,
        )
    return result
