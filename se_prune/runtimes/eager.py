"""torch itself, eager: running a module, timing its leaf modules by hooks, and timing single layers."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from se_prune.latency import interleaved, torch_runner
from se_prune.results import OperationTime
from se_prune.timing import LayerShape

LAYER_RUNS, WARMUP = 9, 2


def open_module(source: Path | nn.Module, images: torch.Tensor, threads: int) -> Callable[[], None]:
    """Return what runs a module once on images (N, C, H, W), on the device where they are."""
    assert isinstance(source, nn.Module), "torch runs modules"
    return torch_runner(source, images, images.device, threads)


def profile(
    source: Path | nn.Module, images: torch.Tensor, threads: int, runs: int
) -> tuple[OperationTime, ...]:
    """Return the time of every module without children, and of what runs outside of them."""
    assert isinstance(source, nn.Module), "torch runs modules"
    leaves = {n: m for n, m in source.named_modules() if not list(m.children()) and n}
    times: dict[str, list[float]] = defaultdict(list)
    started: dict[str, float] = {}

    def begin(name: str) -> Any:
        def hook(*_: Any) -> None:
            started[name] = time.perf_counter()

        return hook

    def end(name: str) -> Any:
        def hook(*_: Any) -> None:
            times[name].append(1e3 * (time.perf_counter() - started[name]))

        return hook

    run = open_module(source, images, threads)
    handles = [m.register_forward_pre_hook(begin(n)) for n, m in leaves.items()]
    handles += [m.register_forward_hook(end(n)) for n, m in leaves.items()]
    try:
        (whole,) = interleaved([run], runs, 0, device=images.device)
    finally:
        for handle in handles:
            handle.remove()
    result = [_operation(n, leaves[n], values, runs) for n, values in times.items()]
    between = max(0.0, float(np.quantile(whole, 0.25)) - sum(o.ms for o in result))
    return (*result, OperationTime(name="outside of modules", kind="functions", ms=between))


def _operation(name: str, module: nn.Module, values: list[float], runs: int) -> OperationTime:
    """Return one module's time in a run; it may run several times in each."""
    calls = max(1, len(values) // runs)
    ms = float(np.quantile(np.asarray(values[-calls * runs :]).reshape(-1, calls).sum(1), 0.25))
    layer = name if isinstance(module, nn.Conv2d | nn.Linear) else None
    return OperationTime(name=name, kind=type(module).__name__, ms=ms, layer=layer)


def time_layers(shapes: Sequence[LayerShape], batch: int, threads: int) -> list[float]:
    """Return the milliseconds of single layers on batches of so many images, on the CPU."""
    result = []
    for shape in shapes:
        run = open_module(layer_module(shape), layer_input(shape, batch), threads)
        (times,) = interleaved([run], LAYER_RUNS, WARMUP, device=torch.device("cpu"))
        result.append(float(np.quantile(times, 0.25)))
    return result


def layer_module(shape: LayerShape) -> nn.Module:
    """Return a layer of a shape."""
    if shape.kind == "linear":
        return nn.Linear(shape.into, shape.out)
    return nn.Conv2d(
        shape.into,
        shape.out,
        shape.kernel,
        stride=shape.stride,
        padding=shape.padding,
        dilation=shape.dilation,
        groups=shape.groups,
    )


def layer_input(shape: LayerShape, batch: int) -> torch.Tensor:
    """Return a batch for a layer: (N, C, H, W), or (N · rows, C)."""
    if shape.kind == "linear":
        return torch.full((batch * shape.size[0] * shape.size[1], shape.into), 0.01)
    return torch.full((batch, shape.into, *shape.input_size), 0.01)
