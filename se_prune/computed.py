"""Convolutions that compute their weights from parameters, such as by weight standardisation (Qiao et al. 2019).

A row of a standardised weight depends on all its inputs, so that none can leave. What it computes is an ordinary
weight: a plain convolution that holds it computes the same, and can lose inputs.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

#: The layers whose forward uses its parameters as they are.
PLAIN: dict[type[nn.Module], Any] = {
    nn.Conv1d: nn.functional.conv1d,
    nn.Conv2d: nn.functional.conv2d,
    nn.Conv3d: nn.functional.conv3d,
}


def computes_weights(module: nn.Module) -> bool:
    """Say whether a convolution has a forward of its own, which may compute its weights."""
    return _kind(module) is not None


@torch.no_grad()
def mixes_inputs(module: nn.Module) -> bool:
    """Say whether a convolution without an input's weights differs from one that reads zeros there."""
    if not isinstance(module, tuple(PLAIN)) or not computes_weights(module):
        return False
    without: Any = copy.deepcopy(module).eval()
    whole: Any = copy.deepcopy(module).eval()
    without.weight[:, 0] = 0
    images = torch.ones_like(_images(module))
    zeroed = images.clone()
    zeroed[:, :: whole.in_channels // whole.groups] = 0
    return not torch.allclose(without(images), whole(zeroed), rtol=1e-3, atol=1e-5)


def plain(module: nn.Module) -> nn.Module | None:
    """Return the plain convolution that computes the same as one with a forward of its own; None where none does.

    None does where it pads its input itself, or convolves twice, or does anything more.
    """
    kind = _kind(module)
    if kind is None:
        return None
    same = copy.deepcopy(module).eval()
    images = _images(same)
    seen = _Weights(PLAIN[kind])
    with torch.no_grad(), seen:
        expected = same(images)
    if len(seen.found) != 1:
        return None
    new: Any = plain_like(module)
    with torch.no_grad():
        new.weight.copy_(seen.found[0])
        if new.bias is not None:
            new.bias.copy_(same.bias)
        found = new(images)
    tolerance = 1e-5 * float(expected.abs().max())
    fits = found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=tolerance)
    return new if fits else None


def plain_like(module: nn.Module) -> nn.Module:
    """Return a plain convolution of the size of one with a forward of its own, with other weights."""
    kind, like = _kind(module), cast(Any, module)
    assert kind is not None
    names = ("stride", "padding", "dilation", "groups", "padding_mode")
    sizes = {name: getattr(like, name) for name in names}
    new = kind(like.in_channels, like.out_channels, like.kernel_size, bias=like.bias is not None, **sizes)
    return new.to(like.weight).train(like.training)


def _kind(module: nn.Module) -> type[nn.Module] | None:
    own = [kind for kind in PLAIN if isinstance(module, kind) and type(module).forward is not kind.forward]
    return own[0] if own else None


def _images(module: Any) -> torch.Tensor:
    """Return random images (2, C, …) with more positions than the kernel spans."""
    size = [2 * d * (k - 1) + 3 for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, module.in_channels, *size, generator=generator).to(module.weight)


class _Weights(TorchFunctionMode):
    """Notes the weights that convolutions are called with."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.found: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = dict(kwargs or {})
        if func is self.function:
            self.found.append((args[1] if len(args) > 1 else named["weight"]).detach().clone())
        return func(*args, **named)
