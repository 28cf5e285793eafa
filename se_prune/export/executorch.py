"""ExecuTorch: a `.pte` for XNNPACK, one image at a time; int8 by torchao's PT2E.

Class names and preprocessing are a JSON file beside it. The packages are imported inside functions only.

Shapes: N images.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from se_prune.errors import SePruneError, first_line
from se_prune.export.base import Run, Subject, Target, one_by_one, quiet
from se_prune.export.torch_export import traced

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from se_prune.results import LayerNoise


def write(subject: Subject, path: Path, int8: bool) -> tuple[LayerNoise, ...]:
    """Write `path` and the `.json` beside it.

    Raises:
        SePruneError: The network cannot be lowered.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program = _int8(subject) if int8 else traced(subject, batch=1)
    try:
        with quiet():
            lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            path.write_bytes(lowered.to_executorch().buffer)
    except Exception as error:  # the exporter has exceptions of its own for every cause
        raise SePruneError(f"ExecuTorch cannot lower {subject.arch} ({first_line(error)}).") from error
    path.with_suffix(".json").write_text(json.dumps(subject.metadata()), encoding="utf-8")
    return ()


def _int8(subject: Subject) -> torch.export.ExportedProgram:
    """Return the graph with whole numbers: activations int8, weights int8 per channel, calibrated image by image."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    with quiet(), torch.no_grad():
        prepared = prepare_pt2e(traced(subject, batch=1).module(), quantizer)
        for image in torch.split(subject.calibration, 1):
            prepared(image)
        return torch.export.export(convert_pt2e(prepared), (subject.example(1),))


def open_file(path: Path, subject: Subject, threads: int) -> Run:
    """Return what runs a file, image by image, on the runtime's own threads."""
    from executorch.runtime import Runtime

    del subject, threads
    with quiet():
        program = Runtime.get().load_program(path)
        method = program.load_method("forward")
    if method is None:
        raise SePruneError(f"{path.name} has no method forward; export it again.")

    def run(images: NDArray[Any]) -> NDArray[np.float32]:
        assert program is not None, "the method lives as long as its program"
        return np.array(method.execute([torch.from_numpy(images.copy())])[0].numpy())

    return one_by_one(run)


EXECUTORCH = Target(
    name="executorch",
    suffix=".pte",
    others=(".json",),
    packages=("executorch",),
    install="pip install 'se-prune[executorch]'",
    write=write,
    open=open_file,
    takes_int8=True,
    int8_packages=("torchao",),
    note="ExecuTorch ran on as many threads as it chose itself",
)
