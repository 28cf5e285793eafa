"""The registry of runtimes. A new one is a line of `RUNTIMES`: what it opens, and how.

A runtime of the form `onnx` opens the file that `export --to onnx` writes, one of the form `torch` the module itself.
Shapes: N images, C channels, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from se_prune.artifact import Network
from se_prune.errors import UsageError, nearest
from se_prune.export.onnx import onnx_bytes
from se_prune.files import whole_file
from se_prune.results import OperationTime
from se_prune.runtimes import eager, ort, ov
from se_prune.timing import LayerShape

#: What a runtime opens: an ONNX file, or a module.
Source = Path | nn.Module
Runner = Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """How to run and time networks somewhere.

    `open` takes a source, a batch (N, C, H, W) and CPU threads, and returns what runs the batch once. `profile` returns
    the time of every operation over so many runs (None: the runtime has no profiler); `layers` the milliseconds of
    single layers, for a batch size and threads. A measured table belongs to a version of the distribution `package`.
    `require` raises a `SePruneError` where an optional package is missing.
    """

    name: str
    package: str
    form: Literal["onnx", "torch"]
    open: Callable[[Source, torch.Tensor, int], Runner]
    layers: Callable[[Sequence[LayerShape], int, int], list[float]]
    profile: Callable[[Source, torch.Tensor, int, int], tuple[OperationTime, ...]] | None = None
    require: Callable[[], None] = lambda: None

    def source(self, network: Network, folder: Path, name: str, images: torch.Tensor) -> Source:
        """Return what this runtime opens of a network; `NAME.onnx` in `folder` is written where it is missing."""
        if self.form == "torch":
            return network.module.eval()
        path = folder / f"{name}.onnx"
        if not path.exists():
            with whole_file(path) as temporary:
                temporary.write_bytes(onnx_bytes(network, images))
        return path


RUNTIMES: dict[str, Runtime] = {
    runtime.name: runtime
    for runtime in (
        Runtime(
            name="onnxruntime",
            package="onnxruntime",
            form="onnx",
            open=ort.open_file,
            layers=ort.time_layers,
            profile=ort.profile,
        ),
        Runtime(
            name="openvino",
            package="openvino",
            form="onnx",
            open=ov.open_file,
            layers=ov.time_layers,
            profile=ov.profile,
            require=ov.require,
        ),
        Runtime(
            name="torch",
            package="torch",
            form="torch",
            open=eager.open_module,
            layers=eager.time_layers,
            profile=eager.profile,
        ),
    )
}


def require_runtime(name: str) -> Runtime:
    """Return the runtime of a name.

    Raises:
        UsageError: There is none; the message lists all.
        SePruneError: Its package is missing; the message says how to install it.
    """
    if name not in RUNTIMES:
        known = ", ".join(RUNTIMES)
        raise UsageError(f"there is no runtime '{name}'{nearest(name, RUNTIMES)}; --runtime takes {known}.")
    RUNTIMES[name].require()
    return RUNTIMES[name]
