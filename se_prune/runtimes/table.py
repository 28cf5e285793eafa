"""The measured table: every layer shape of a network at a few widths in a runtime, kept for this machine.

Times are lower quartiles over runs, since other processes only ever add time; all widths of a shape are timed together,
so that their ratios hold on a busy machine. The table is a JSON file per machine, runtime and its version, threads and
batch, under `$SE_PRUNE_CACHE`, else `$XDG_CACHE_HOME/se-prune`, else `~/.cache/se-prune`.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from se_prune.device import processor
from se_prune.errors import SePruneError
from se_prune.files import cache_folder, write_text
from se_prune.results import OperationTime
from se_prune.runtimes.base import Runtime
from se_prune.schema import FORBID_EXTRA, SCHEMA_VERSION, from_json, record, to_json
from se_prune.timing import LatencyModel, LayerGrid, LayerShape

LOG = logging.getLogger("se_prune")
#: Shares of the dense width at which a layer is timed.
SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4)


@record
class LatencyTable:
    """The grids of one machine and runtime, by shape and rounding."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    schema_version: Literal[1] = SCHEMA_VERSION
    machine: str
    runtime: str
    batch_size: int
    threads: int
    grids: dict[str, LayerGrid]


@torch.no_grad()
def shapes_of(model: nn.Module, example: torch.Tensor) -> dict[str, LayerShape]:
    """Return the shapes of a network's 2-D convolutions and linear layers, from one pass of one image (1, C, H, W)."""
    shapes: dict[str, LayerShape] = {}

    def look(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, _: Any, output: torch.Tensor) -> None:
            shapes[name] = _shape(layer, output)

        return hook

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(look(name)) for name, layer in layers]
    try:
        model.eval()(example[:1])
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def _shape(layer: nn.Module, output: torch.Tensor) -> LayerShape:
    if isinstance(layer, nn.Linear):
        rows = output.numel() // layer.out_features
        return LayerShape(kind="linear", into=layer.in_features, out=layer.out_features, size=(rows, 1))
    assert isinstance(layer, nn.Conv2d)
    shape = LayerShape(
        kind="conv",
        into=layer.in_channels,
        out=layer.out_channels,
        size=_pair(output.shape[2:]),
        kernel=_pair(layer.kernel_size),
        stride=_pair(layer.stride),
        dilation=_pair(layer.dilation),
        groups=layer.groups,
    )
    if isinstance(layer.padding, str):
        return shape
    padded = replace(shape, padding=_pair(layer.padding))
    return padded if min(padded.input_size) > 0 else shape


def _pair(value: Sequence[int]) -> tuple[int, int]:
    return int(value[0]), int(value[1])


def widths(width: int, round_to: int, groups: int = 1) -> tuple[int, ...]:
    """Return the widths at which a layer is timed: the dense one, and odd multiples of `round_to` below it.

    A cut width is a multiple of `round_to`, and half of the time no multiple of anything larger; runtimes like widths
    that are.
    """
    step = math.lcm(round_to, groups)
    chosen = {width}
    chosen |= {odd_multiple(width, share, step) for share in SHARES}
    return tuple(sorted(chosen))


def odd_multiple(width: int, share: float, step: int) -> int:
    """Return the odd multiple of `step` nearest to a share of a width; the width itself where that is no smaller."""
    nearest = step * (2 * max(0, round((share * width / step - 1) / 2)) + 1)
    return min(nearest, width)


def measure_grids(
    runtime: Runtime,
    shapes: Iterable[LayerShape],
    *,
    round_to: int,
    batch: int,
    threads: int,
    on_shape: Callable[[int], None] | None = None,
) -> dict[str, LayerGrid]:
    """Return the grid of every shape, by its key; those of an earlier call are read from the table of this machine.

    Args:
        runtime: Where to measure.
        shapes: Dense shapes.
        round_to: Widths are odd multiples of it.
        batch: Images at once.
        threads: CPU threads.
        on_shape: Called with 1 after each shape.
    """
    path, table = _open_table(runtime, batch, threads)
    wanted = {shape.key(): shape for shape in shapes}
    result: dict[str, LayerGrid] = {}
    fresh: dict[str, LayerGrid] = {}
    for key, shape in wanted.items():
        entry = f"{key} @{round_to}"
        if entry not in table.grids:
            fresh[entry] = _grid(runtime, shape, round_to, batch, threads)
        result[key] = fresh.get(entry) or table.grids[entry]
        if on_shape is not None:
            on_shape(1)
    if fresh:
        _keep(path, replace(table, grids={**table.grids, **fresh}))
    return result


def _grid(runtime: Runtime, shape: LayerShape, round_to: int, batch: int, threads: int) -> LayerGrid:
    outs = widths(shape.out, round_to, 1 if shape.depthwise else shape.groups)
    if shape.depthwise:
        times = runtime.layers([shape.at(w, w) for w in outs], batch, threads)
        return LayerGrid(into=(shape.into,), out=outs, ms=(tuple(times),))
    intos = widths(shape.into, round_to, shape.groups)
    times = runtime.layers([shape.at(a, b) for a in intos for b in outs], batch, threads)
    rows = [tuple(times[i : i + len(outs)]) for i in range(0, len(times), len(outs))]
    return LayerGrid(into=intos, out=outs, ms=tuple(rows))


def _open_table(runtime: Runtime, batch: int, threads: int) -> tuple[Path, LatencyTable]:
    machine = f"{processor()}, {platform.system()} {platform.machine()}, {os.cpu_count()} processors"
    version = f"{runtime.name} {metadata.version(runtime.package)}"
    name = hashlib.sha256(f"{machine}|{version}".encode()).hexdigest()[:12]
    path = cache_folder() / f"latency-{runtime.name}-b{batch}-t{threads}-{name}.json"
    empty = LatencyTable(machine=machine, runtime=version, batch_size=batch, threads=threads, grids={})
    if not path.is_file():
        return path, empty
    try:
        return path, from_json(LatencyTable, path.read_bytes(), what=str(path))
    except (OSError, SePruneError) as error:
        LOG.warning("the table of layer times is measured again: %s", error)
        return path, empty


def _keep(path: Path, table: LatencyTable) -> None:
    """Write the table; a folder that cannot be written costs time on the next call, and nothing else."""
    try:
        write_text(path, to_json(table))
    except SePruneError as error:
        LOG.warning("the table of layer times is not kept (set SE_PRUNE_CACHE to another folder): %s", error)


def latency_model(
    shapes: Mapping[str, LayerShape],
    grids: Mapping[str, LayerGrid],
    operations: Sequence[OperationTime],
    dense_ms: float,
) -> LatencyModel:
    """Return what the planner counts with, from the table and one profile of the dense network.

    Args:
        shapes: The layers of the dense network.
        grids: Their measured times, by the shapes' keys.
        operations: The dense network's profile; without one, grids are taken as they are.
        dense_ms: The whole dense network's time; what no operation explains does not grow with the widths.
    """
    inside: dict[str, float] = {}
    others: list[float] = []
    for operation in operations:
        if operation.layer is not None and operation.layer in shapes:
            inside[operation.layer] = inside.get(operation.layer, 0.0) + operation.ms
        else:
            others.append(operation.ms)
    alone = {name: grids[shape.key()].ms[-1][-1] for name, shape in shapes.items()}
    scales = {name: ms / alone[name] for name, ms in inside.items() if alone[name] > 0}
    usual = sorted(scales.values())[len(scales) // 2] if scales else 1.0
    scales = {name: scales.get(name, usual) for name in shapes}
    explained = sum(scales[name] * alone[name] for name in shapes)
    launch = min([o.ms for o in operations], default=0.0)
    growing = sum(ms - launch for ms in others)
    return LatencyModel(
        grids={name: grids[shape.key()] for name, shape in shapes.items()},
        scales=scales,
        elementwise_ms=growing,
        fixed_ms=max(0.0, dense_ms - explained - growing),
    )
