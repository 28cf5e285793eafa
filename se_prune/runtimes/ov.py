"""OpenVINO on the CPU: running a file, profiling it by operation, and timing single layers.

Files run at one fixed number of images; left open to any number, a small network took 1.4 times as long. The runtime
counts an operation's time as the mean over all runs of a compiled network, the first and slow one among them, in whole
microseconds. So the first run is counted alone and taken out, and networks are compiled several times, of which the
least time stands: other processes only ever add time. The package is imported in `se_prune.export.openvino`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from se_prune.export.base import INPUT, require_packages
from se_prune.export.openvino import OPENVINO, compiled, without_telemetry
from se_prune.results import OperationTime
from se_prune.runtimes.ort import LAYER_RUNS, Names, bank, parts
from se_prune.timing import LayerShape

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

COMPILED = 3
#: What is computed by a layer with weights.
LAYERS = frozenset({"Convolution", "GroupConvolution", "FullyConnected", "MatMul"})
#: How the runtime names a layer whose bias it adds in the same operation or in another one.
WITHOUT_BIAS = "/WithoutBiases"
#: How it calls what another operation computes as well, and what computes nothing.
FUSED, NOTHING = "undef", frozenset({"Parameter", "Constant", "Result"})
#: A run's time and the mean of all are both cut off to whole microseconds, half of one on average.
CUT_OFF = 1.0


def require() -> None:
    """Import the runtime.

    Raises:
        SePruneError: It is missing; the message names the extra.
    """
    with without_telemetry():
        require_packages("--runtime openvino", OPENVINO.packages, OPENVINO.install)


def open_file(source: Path | nn.Module, images: torch.Tensor, threads: int) -> Callable[[], None]:
    """Return what runs a file once on images (N, C, H, W)."""
    assert not isinstance(source, nn.Module), "OpenVINO opens files"
    request = compiled(source, threads, images.shape).create_infer_request()
    feeds = _feeds(images)

    def run() -> None:
        request.infer(feeds, share_inputs=True, share_outputs=True)

    return run


def _feeds(images: torch.Tensor) -> dict[str, NDArray[np.float32]]:
    return {INPUT: images.detach().cpu().float().numpy()}


def profile(
    source: Path | nn.Module, images: torch.Tensor, threads: int, runs: int
) -> tuple[OperationTime, ...]:
    """Return the time of every operation that OpenVINO runs, in its order, with the layer that it computes."""
    import onnx

    assert not isinstance(source, nn.Module), "OpenVINO opens files"
    names = Names(onnx.load(source, load_external_data=False).graph)
    times = _times(source, _feeds(images), threads, runs, images.shape)
    return tuple(
        OperationTime(
            name=name,
            kind=kind,
            ms=ms,
            layer=names.layer(name.removesuffix(WITHOUT_BIAS)) if kind in LAYERS else None,
        )
        for (name, kind), ms in times.items()
    )


def _times(
    source: Path | bytes,
    feeds: Mapping[str, NDArray[np.float32]],
    threads: int,
    runs: int,
    size: Sequence[int] | None = None,
) -> dict[tuple[str, str], float]:
    """Return milliseconds per run of every operation (name, kind): the mean over `runs`, of the best compilation."""
    best: dict[tuple[str, str], float] = {}
    for _ in range(COMPILED):
        request = compiled(source, threads, size, PERF_COUNT=True).create_infer_request()
        request.infer(feeds)
        first = _counted(request)
        for _ in range(runs):
            request.infer(feeds)
        for key, mean in _counted(request).items():
            ms = (max(0.0, (mean * (runs + 1) - first.get(key, 0.0)) / runs) + CUT_OFF) / 1e3
            best[key] = min(ms, best.get(key, ms))
    return best


def _counted(request: Any) -> dict[tuple[str, str], float]:
    """Return the mean microseconds so far of the operations that run; below one they are 0, and called not run."""
    return {
        (one.node_name, one.node_type): 1e6 * one.real_time.total_seconds()
        for one in request.profiling_info
        if one.exec_type != FUSED and one.node_type not in NOTHING
    }


def time_layers(shapes: Sequence[LayerShape], batch: int, threads: int) -> list[float]:
    """Return the milliseconds of single layers on batches of so many images.

    Equal ones are timed once: the runtime would compute them once.
    """
    found: dict[LayerShape, float] = {}
    for part in parts(list(dict.fromkeys(shapes))):
        model, feeds = bank(part, batch)
        times = {
            name.removesuffix(WITHOUT_BIAS): ms
            for (name, kind), ms in _times(model, feeds, threads, LAYER_RUNS).items()
            if kind in LAYERS
        }
        found |= {shape: times[f"y{i}"] for i, shape in enumerate(part)}
    return [found[shape] for shape in shapes]
