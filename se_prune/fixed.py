"""What a module keeps of its channels beside parameters, and what must follow when these are cut.

A fixed filter (the blur of anti-aliased networks, Zhang 2019) is a buffer with the same kernel for each channel. A list
of widths (mixed convolutions, Tan and Le 2019) says how a module splits a map among its layers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def filter_of(module: nn.Module) -> str | None:
    """Return the buffer (C, 1, K, …) of a module that filters its C `channels` alike and has nothing else."""
    if len(module._buffers) != 1 or module._parameters or module._modules:
        return None
    ((name, kernel),) = module._buffers.items()
    channels = getattr(module, "channels", None)
    if kernel is None or kernel.ndim < 3 or kernel.is_meta or tuple(kernel.shape[:2]) != (channels, 1):
        return None
    return name if bool((kernel == kernel[:1]).all()) else None


def resize_filter(module: nn.Module, channels: int) -> None:
    """Let a fixed filter have another number of channels."""
    name = filter_of(module)
    assert name is not None
    kernel: torch.Tensor = getattr(module, name)
    setattr(module, name, kernel[:1].repeat(channels, *[1] * (kernel.ndim - 1)))
    vars(module)["channels"] = channels


def width_lists(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield every list of a module that holds the input widths of the convolutions in it, in order."""
    for module in model.modules():
        widths = _widths(module)
        if widths is not None and len(widths) > 1:
            for name, value in vars(module).items():
                if isinstance(value, list | tuple) and list(value) == widths:
                    yield module, name


def follow(module: nn.Module, name: str) -> None:
    """Set a list of widths to what the convolutions of its module have now."""
    widths = _widths(module)
    assert widths is not None
    setattr(module, name, type(getattr(module, name))(widths))


def _widths(module: nn.Module) -> list[int] | None:
    layers = list(module.children())
    if not all(isinstance(layer, CONVOLUTIONS) for layer in layers):
        return None
    return [layer.in_channels for layer in layers if isinstance(layer, CONVOLUTIONS)]


class ConstantGate(nn.Module):
    """Stands for the last layer of a gate: gives a constant per channel (C,), whatever it reads (N, …)."""

    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (N, C, 1, …) with as many dimensions as `x`."""
        return self.weight.view(1, -1, *[1] * (x.ndim - 2)).expand(x.shape[0], *[-1] * (x.ndim - 1))
