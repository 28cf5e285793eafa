"""How a network wants its images: its preprocessing, the options that overrule it, and an example of its input.

Shapes: N images, C channels, H×W pixels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import nn

from se_prune.artifact import Network
from se_prune.errors import UsageError, first_line
from se_prune.records import Preprocessing


def example_input(preprocessing: Preprocessing, n: int = 1) -> torch.Tensor:
    """Return `n` fixed random images (N, C, H, W) of the network's input size."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, *preprocessing.input_size, generator=generator)


def with_preprocessing(
    network: Network,
    ref: str,
    *,
    input_size: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Network:
    """Return the network, in eval mode, with the given parts of its preprocessing replaced.

    Args:
        network: What to feed otherwise.
        ref: How the user named it, for messages.
        input_size: (C, H, W) or (H, W).
        mean: Mean of pixels in [0, 1] per channel.
        std: Standard deviation of pixels in [0, 1] per channel.

    Raises:
        UsageError: A value is impossible, or the network cannot take images of that size.
    """
    preprocessing = override(network.header.preprocessing, input_size=input_size, mean=mean, std=std)
    network.module.eval()
    if input_size is not None:
        _check_size(network.module, preprocessing, ref)
    return Network(
        module=network.module, header=dataclasses.replace(network.header, preprocessing=preprocessing)
    )


def override(
    base: Preprocessing,
    *,
    input_size: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Preprocessing:
    """Return `base` with the given parts replaced.

    Raises:
        UsageError: A length, a channel count or a value is impossible.
    """
    channels = base.input_size[0]
    size = base.input_size
    if input_size is not None:
        size = _full_size(input_size, channels)
    for name, values in (("--mean", mean), ("--std", std)):
        if values is not None and len(values) != channels:
            raise UsageError(
                f"{name} needs one number per input channel, {channels} for this network, got {len(values)}."
            )
    if std is not None and min(std) <= 0:
        raise UsageError(
            f"--std must be above 0, got {min(std)}; give the standard deviation of pixels in [0, 1]."
        )
    return Preprocessing(
        input_size=size,
        mean=base.mean if mean is None else tuple(mean),
        std=base.std if std is None else tuple(std),
    )


def _full_size(given: Sequence[int], channels: int) -> tuple[int, int, int]:
    shown = ",".join(map(str, given))
    if len(given) not in {2, 3} or min(given) < 1:
        raise UsageError(f"--input-size takes C,H,W or H,W, such as 3,224,224, got '{shown}'.")
    if len(given) == 3 and given[0] != channels:
        raise UsageError(
            f"--input-size {shown} has {given[0]} channels, but the network takes {channels}; give "
            f"--input-size {channels},{given[1]},{given[2]}, or open a network for {given[0]}."
        )
    return channels, given[-2], given[-1]


def _check_size(module: nn.Module, preprocessing: Preprocessing, ref: str) -> None:
    parameter = next(module.parameters(), torch.zeros(()))
    try:
        with torch.no_grad():
            module(torch.zeros(1, *preprocessing.input_size, dtype=parameter.dtype))
    except (RuntimeError, ValueError, AssertionError) as error:
        size = ",".join(map(str, preprocessing.input_size))
        raise UsageError(
            f"{ref} cannot take images of {size} ({first_line(error)}); choose another --input-size."
        ) from error


def parse_size(text: str) -> tuple[int, ...]:
    """Read `--input-size`: "C,H,W" or "H,W" in pixels.

    Raises:
        UsageError: It is something else.
    """
    try:
        size = tuple(int(part) for part in text.split(","))
    except ValueError:
        size = ()
    if len(size) not in {2, 3} or min(size) < 1:
        raise UsageError(f"--input-size takes C,H,W or H,W, such as 3,224,224 or 224,224, got '{text}'.")
    return size


def parse_floats(text: str, option: str) -> tuple[float, ...]:
    """Read an option that takes numbers with commas between, such as `--mean`.

    Raises:
        UsageError: A part is no finite number.
    """
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(map(math.isfinite, values)):
        raise UsageError(
            f"{option} takes numbers with commas between, such as 0.485,0.456,0.406, got '{text}'."
        )
    return values
