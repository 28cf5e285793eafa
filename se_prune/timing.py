"""What a latency plan counts with: the time of every layer at any width, interpolated from measured ones. Pure.

Shapes: a grid has one row per width of the input and one column per width of the output.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from se_prune.records import LayerCost
from se_prune.schema import FORBID_EXTRA, record


@record
class LayerShape:
    """A convolution or linear layer and the size of its output, of one image: (H, W), or rows and 1 of a linear layer.

    `padding` is zero where the network pads by itself. A depthwise convolution (`groups` equal to `into`) has one
    width.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    kind: Literal["conv", "linear"]
    into: int
    out: int
    size: tuple[int, int]
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def depthwise(self) -> bool:
        """Whether every channel is filtered by itself."""
        return self.groups > 1 and self.groups == self.into

    @property
    def input_size(self) -> tuple[int, int]:
        """The size of the input that gives the output's size."""
        if self.kind == "linear":
            return self.size
        sides = zip(self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        rows, columns = ((n - 1) * s + d * (k - 1) + 1 - 2 * p for n, k, s, p, d in sides)
        return rows, columns

    @property
    def macs(self) -> int:
        """Multiply-adds of one image."""
        positions = self.size[0] * self.size[1]
        return positions * self.out * (self.into // self.groups) * self.kernel[0] * self.kernel[1]

    def key(self) -> str:
        """Name the shape in a table."""
        sides = [self.kernel, self.stride, self.padding, self.dilation, self.size]
        return " ".join([self.kind, f"{self.into}>{self.out}/{self.groups}", *(f"{a}x{b}" for a, b in sides)])

    def at(self, into: int, out: int) -> LayerShape:
        """Return the layer with other widths; groups of a grouped convolution keep their number."""
        return LayerShape(
            kind=self.kind,
            into=into,
            out=out,
            size=self.size,
            kernel=self.kernel,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=into if self.depthwise else self.groups,
        )


@record
class LayerGrid:
    """Measured milliseconds of a layer: `ms[i][j]` at `into[i]` and `out[j]`, ascending widths."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    into: tuple[int, ...]
    out: tuple[int, ...]
    ms: tuple[tuple[float, ...], ...]

    def at(self, into: float, out: float) -> float:
        """Return the time at any widths: linear between the nearest measured ones, constant outside of them."""
        (i, u), (j, v) = _place(self.into, into), _place(self.out, out)
        after_i, after_j = min(i + 1, len(self.into) - 1), min(j + 1, len(self.out) - 1)
        low = (1 - v) * self.ms[i][j] + v * self.ms[i][after_j]
        high = (1 - v) * self.ms[after_i][j] + v * self.ms[after_i][after_j]
        return (1 - u) * low + u * high


def _place(widths: Sequence[int], width: float) -> tuple[int, float]:
    """Return the index of the nearest width that is not larger, and how far from it to the next."""
    index = min(max(bisect.bisect_right(widths, width) - 1, 0), max(len(widths) - 2, 0))
    if len(widths) == 1:
        return 0, 0.0
    step = widths[index + 1] - widths[index]
    return index, min(max((width - widths[index]) / step, 0.0), 1.0)


@record
class LatencyModel:
    """The time of a network at any widths: its layers, and what stands between them.

    `scales` is per layer its time inside the dense network over its time in the grid. `elementwise_ms` grows with the
    values that the layers write, `fixed_ms` does not grow.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    grids: dict[str, LayerGrid]
    scales: dict[str, float]
    elementwise_ms: float
    fixed_ms: float

    def layer_ms(self, name: str, into: int, out: int) -> float:
        """Return the milliseconds of a layer at given widths; 0 for a layer that was not measured."""
        grid = self.grids.get(name)
        return 0.0 if grid is None else self.scales[name] * grid.at(into, out)


@dataclass(slots=True, kw_only=True)
class LayerTimes:
    """A latency model beside what the layers write; `known` holds layers at widths that were asked for before.

    `volumes` is per layer the values that one of its output channels has, `whole` those of all layers at full width.
    """

    model: LatencyModel
    volumes: dict[str, float]
    whole: float
    known: dict[tuple[str, int, int], float] = field(default_factory=dict)

    @classmethod
    def of(cls, model: LatencyModel, costs: Mapping[str, LayerCost]) -> LayerTimes:
        """Return the times of a network of these layers."""
        volumes = {name: c.macs / c.weights if c.weights else 0.0 for name, c in costs.items()}
        whole = sum(volumes[name] * cost.out_channels for name, cost in costs.items())
        return cls(model=model, volumes=volumes, whole=max(whole, 1.0))

    def at(self, name: str, into: int, out: int) -> float:
        """Return the milliseconds of a layer, and of what is done to the values that it writes."""
        key = (name, into, out)
        if key not in self.known:
            elementwise = self.model.elementwise_ms * self.volumes[name] * out / self.whole
            self.known[key] = self.model.layer_ms(name, into, out) + elementwise
        return self.known[key]
