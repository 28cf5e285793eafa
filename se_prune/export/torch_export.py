"""torch.export's own `.pt2`: the graph of a network, for torch itself and for what is built on it.

`torch.export.load` can run code that a file names. The file is for places that trust whoever wrote it.

Shapes: N images.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from se_prune.errors import SePruneError, first_line
from se_prune.export.base import Run, Subject, Target, quiet

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from se_prune.results import LayerNoise

EXTRA = "se_prune.json"


def traced(subject: Subject, batch: int | None = None) -> torch.export.ExportedProgram:
    """Return the graph of a network, for any number of images or for a fixed one.

    Raises:
        SePruneError: torch cannot follow the network.
    """
    dynamic = ({0: torch.export.Dim("batch", min=1)},) if batch is None else None
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(subject.module, (subject.example(batch or 2),), dynamic_shapes=dynamic)
    except Exception as error:  # dynamo has exceptions of its own for every cause
        raise SePruneError(
            f"torch.export cannot follow {subject.arch} ({first_line(error)}); replace the operation in the way."
        ) from error


def write(subject: Subject, path: Path, int8: bool) -> tuple[LayerNoise, ...]:
    """Write the graph and, as its extra file `se_prune.json`, class names and preprocessing."""
    assert not int8, "this target takes no int8"
    with quiet():
        torch.export.save(traced(subject), path, extra_files={EXTRA: json.dumps(subject.metadata())})
    return ()


def open_file(path: Path, subject: Subject, threads: int) -> Run:
    """Return what runs a file that was just written; see above about files of others."""
    del subject
    with quiet("torch.export"):
        module = torch.export.load(path).module()

    def run(images: NDArray[Any]) -> NDArray[np.float32]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with torch.no_grad():
                return np.asarray(module(torch.from_numpy(images)).numpy())
        finally:
            torch.set_num_threads(before)

    return run


TORCH = Target(
    name="torch",
    suffix=".pt2",
    packages=(),
    install="pip install torch",
    write=write,
    open=open_file,
    note="torch.export.load runs code that a tampered .pt2 names: open this file only where its writer is trusted",
)
