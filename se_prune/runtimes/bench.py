"""`bench`: networks in turn, in every runtime at every batch and number of threads; and where the milliseconds go.

Shapes: N images, C channels, H, W pixels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from se_prune import artifact
from se_prune.artifact import Network
from se_prune.errors import SePruneError, UsageError
from se_prune.latency import interleaved
from se_prune.preprocessing import example_input
from se_prune.results import BenchRow, OperationTime
from se_prune.runtimes.base import Runtime, Source
from se_prune.runtimes.memory import peak_memory
from se_prune.runtimes.table import shapes_of
from se_prune.timing import LayerShape
from se_prune.zoo import registry

WARMUP = 5
RESAMPLES = 1000
#: Runtimes like widths that are multiples of this.
ALIGNED = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One row of the bench: where, how many images at once, on how many CPU threads."""

    runtime: Runtime
    batch: int
    threads: int


def ratio_of_medians(
    first: Sequence[float], second: Sequence[float], seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """Return median(first) / median(second) and its 95 % bootstrap interval; rounds are drawn in pairs."""
    a, b = np.asarray(first), np.asarray(second)
    drawn = np.random.default_rng(seed).integers(0, len(a), (RESAMPLES, len(a)))
    ratios = np.median(a[drawn], 1) / np.median(b[drawn], 1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(np.median(a) / np.median(b)), (float(low), float(high))


def bench(
    networks: Sequence[tuple[str, Network]],
    settings: Sequence[Setting],
    *,
    rounds: int = 50,
    memory: bool = True,
    device: torch.device | None = None,
    on_setting: Callable[[int], None] | None = None,
) -> tuple[BenchRow, ...]:
    """Time networks in turn, on random images of their own input size.

    Args:
        networks: Names and networks; the last is the reference of the others' speedups, where there are several.
        settings: Runtimes, batches and threads.
        rounds: Timed rounds; every network runs once in each.
        memory: Measure peak memory as well, each in a process of its own.
        device: Where torch runs; the CPU where None. Other runtimes are timed on the CPU.
        on_setting: Called with 1 after each setting.

    Raises:
        UsageError: `rounds`, a batch or a number of threads is below 1.
        SePruneError: A network cannot be exported for a runtime.
    """
    if rounds < 1 or any(min(s.batch, s.threads) < 1 for s in settings):
        raise UsageError("rounds, batches and threads must be at least 1; 50, 1 and 1 are usual.")
    rows: list[BenchRow] = []
    with tempfile.TemporaryDirectory() as folder:
        for setting in settings:
            rows += _rows(networks, setting, Path(folder), rounds=rounds, memory=memory, device=device)
            if on_setting is not None:
                on_setting(1)
    return tuple(rows)


def _rows(
    networks: Sequence[tuple[str, Network]],
    setting: Setting,
    folder: Path,
    *,
    rounds: int,
    memory: bool,
    device: torch.device | None,
) -> Iterator[BenchRow]:
    runtime = setting.runtime
    place = device if device is not None and runtime.form == "torch" else torch.device("cpu")
    runners = []
    for number, (_, network) in enumerate(networks):
        images = example_input(network.header.preprocessing, setting.batch)
        source = runtime.source(network, folder, str(number), images)
        runners.append(runtime.open(source, images.to(place), setting.threads))
    times = interleaved(runners, rounds, WARMUP, device=place)
    for number, ((name, network), own) in enumerate(zip(networks, times, strict=True)):
        speedup = None if number == len(networks) - 1 else ratio_of_medians(times[-1], own)
        median = float(np.median(own))
        yield BenchRow(
            network=name,
            runtime=runtime.name,
            device=str(place),
            batch_size=setting.batch,
            threads=setting.threads,
            rounds=rounds,
            median_ms=median,
            p95_ms=float(np.quantile(own, 0.95)),
            images_per_second=1e3 * setting.batch / median,
            peak_bytes=_peak(network, setting, folder, str(number), place) if memory else None,
            speedup=None if speedup is None else speedup[0],
            speedup_ci95=None if speedup is None else speedup[1],
        )
        if runtime.form == "torch":
            network.module.cpu()


def _peak(network: Network, setting: Setting, folder: Path, name: str, place: torch.device) -> int:
    """Return the peak memory of one network; on CUDA torch's own count, in this process."""
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place)
        images = example_input(network.header.preprocessing, setting.batch).to(place)
        setting.runtime.open(network.module, images, setting.threads)()
        return int(torch.cuda.max_memory_allocated(place))
    file = folder / f"{name}.onnx"
    if setting.runtime.form == "torch":
        file = folder / f"{name}.safetensors"
        if not file.exists():
            network.module.cpu()
            artifact.save(file, network)
    size = network.header.preprocessing.input_size
    return peak_memory(setting.runtime.name, file, size, setting.batch, setting.threads)


@contextmanager
def opened(network: Network, setting: Setting) -> Iterator[tuple[Source, torch.Tensor]]:
    """Yield what the runtime opens of a network, and a batch for it."""
    images = example_input(network.header.preprocessing, setting.batch)
    with tempfile.TemporaryDirectory() as folder:
        yield setting.runtime.source(network, Path(folder), "network", images), images


def profiled(
    network: Network, setting: Setting, *, runs: int = 20, macs: Mapping[str, int] | None = None
) -> tuple[OperationTime, ...]:
    """Return the time of every operation, with its layer's widths and what multiples of 8 would take instead.

    Args:
        network: The network.
        setting: Where, and with what batch.
        runs: Runs of the profile.
        macs: MACs per layer of one image, as `Cost.per_layer`; counted from the shapes where None.

    Raises:
        SePruneError: The runtime has no profiler.
    """
    runtime = setting.runtime
    if runtime.profile is None:
        raise SePruneError(
            f"{runtime.name} does not tell the time of single layers; use --runtime onnxruntime or torch."
        )
    with opened(network, setting) as (source, images):
        operations = runtime.profile(source, images, setting.threads, runs)
        shapes = shapes_of(network.module, images)
    ratios = _aligned(setting, {shapes[o.layer] for o in operations if o.layer in shapes})
    result = []
    for operation in operations:
        shape = None if operation.layer is None else shapes.get(operation.layer)
        if shape is None:
            result.append(operation)
            continue
        count = shape.macs if macs is None else macs.get(str(operation.layer), shape.macs)
        ratio = ratios.get(shape)
        result.append(
            replace(
                operation,
                into=shape.into,
                out=shape.out,
                macs=count * setting.batch,
                aligned_ms=None if ratio is None else operation.ms * ratio,
            )
        )
    return tuple(result)


def _aligned(setting: Setting, shapes: set[LayerShape]) -> dict[LayerShape, float]:
    """Return for every shape that is off multiples of 8 the time of the next larger multiples over its own."""
    pairs = {shape: larger for shape in shapes if (larger := aligned(shape)) != shape}
    if not pairs:
        return {}
    timed = setting.runtime.layers(
        [s for pair in pairs.items() for s in pair], setting.batch, setting.threads
    )
    return {shape: timed[2 * i + 1] / timed[2 * i] for i, shape in enumerate(pairs)}


def _up(width: int) -> int:
    return -(-width // ALIGNED) * ALIGNED


def aligned(shape: LayerShape) -> LayerShape:
    """Return a layer with its widths rounded up to multiples of 8; those that no plan changes stay.

    Widths up to 3 are images, a grouped convolution needs multiples of its groups, and a linear layer's outputs may be
    classes.
    """
    if shape.groups > 1 and not shape.depthwise:
        return shape
    into = shape.into if shape.into <= 3 else _up(shape.into)
    out = shape.out if shape.kind == "linear" else _up(shape.out)
    return shape.at(into, into if shape.depthwise else out)


@dataclass(frozen=True, slots=True, kw_only=True)
class Alignment:
    """What widths off multiples of 8 cost: the layers that have one, their time, and that of the next multiples."""

    layers: int
    ms: float
    aligned_ms: float
    whole_ms: float


def alignment(operations: Sequence[OperationTime]) -> Alignment:
    """Sum up a profile."""
    off = [o for o in operations if o.aligned_ms is not None]
    return Alignment(
        layers=len(off),
        ms=sum(o.ms for o in off),
        aligned_ms=sum(o.aligned_ms or 0.0 for o in off),
        whole_ms=sum(o.ms for o in operations),
    )


def against_dense(network: Network) -> Network | None:
    """Return the dense network that a cut or folded artifact came from, with random weights: it takes the same time.

    None where nothing was cut, or the architecture was a module in hand.
    """
    header = network.header
    if not (header.geometry or header.folded) or header.arch.ref == artifact.IN_HAND:
        return None
    dense = registry.build(header.arch).eval()
    return Network(module=dense, header=replace(header, geometry={}, folded={}, plan=None))
